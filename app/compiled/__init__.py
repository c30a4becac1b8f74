"""Compiled models as the server runs them: arrays and a plan, no scikit-learn, no pandas, no code in the file."""
