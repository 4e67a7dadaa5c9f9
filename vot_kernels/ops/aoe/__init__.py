"""Autonomy-of-Experts: see `op.py`."""

from vot_kernels.ops.aoe.op import WEIGHTINGS, AoEAux, aoe

__all__ = ["AoEAux", "WEIGHTINGS", "aoe"]
