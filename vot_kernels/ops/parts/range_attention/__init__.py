"""Softmax attention of ranges of queries over ranges of keys."""
