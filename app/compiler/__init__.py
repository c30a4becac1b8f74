"""From fitted scikit-learn objects to compiled models, proved equal. For publishers, and for bare models as they load."""
