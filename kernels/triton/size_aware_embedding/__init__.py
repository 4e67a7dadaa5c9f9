"""Kernels that add a row per segment to the segment's tokens."""
