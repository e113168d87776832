"""From a file of a data set to a batch: what `datasets.py` is made of."""
