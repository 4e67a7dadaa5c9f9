"""Kernels of the norm and the rotary positions of queries and keys."""
