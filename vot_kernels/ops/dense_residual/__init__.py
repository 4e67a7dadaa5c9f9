"""The weighted sum of past block outputs: see `op.py`."""

from vot_kernels.ops.dense_residual.op import dense_residual

__all__ = ["dense_residual"]
