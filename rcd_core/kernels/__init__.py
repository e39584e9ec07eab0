"""Reductions over the vocabulary, the part of the method that a device can be slow or fast at."""
