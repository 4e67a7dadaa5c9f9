"""Ablations on DigitWorld: each part of the system against what others do in its place, seed by seed."""
