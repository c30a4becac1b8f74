"""Reading the files that people save models in, such that nothing in them can run. `loaders.py` is what others call."""
