"""Normalised linear attention: see `op.py`."""

from vot_kernels.ops.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
