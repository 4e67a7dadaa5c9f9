"""The functions of the flash-attn package: see `op.py`."""

from vot_kernels.ops.flash_attention.op import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
