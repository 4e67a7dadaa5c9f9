"""RMS norm and rotary positions of queries and keys: see `op.py`."""

from vot_kernels.ops.rope_qk_norm.op import default_sections, rope_qk_norm

__all__ = ["default_sections", "rope_qk_norm"]
