"""Kernels that cut images into patches and put them back."""
