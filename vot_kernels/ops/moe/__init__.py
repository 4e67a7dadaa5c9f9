"""A mixture of SwiGLU experts with given routing: see `op.py`."""

from vot_kernels.ops.moe.op import moe

__all__ = ["moe"]
