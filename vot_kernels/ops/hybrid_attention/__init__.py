"""Softmax attention to near groups and linear attention to far ones under one normaliser: see `op.py`."""

from vot_kernels.ops.hybrid_attention.op import hybrid_attention
from vot_kernels.ops.hybrid_attention.step import HybridAttentionState, hybrid_attention_step

__all__ = ["HybridAttentionState", "hybrid_attention", "hybrid_attention_step"]
