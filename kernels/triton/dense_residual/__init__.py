"""Kernels of the weighted sum of states."""
