"""Exact variable-length attention: see `op.py`."""

from vot_kernels.ops.packed_attention.op import packed_attention

__all__ = ["packed_attention"]
