"""Exact attention within segments: hybrid attention in which everything is near."""

from torch import Tensor

from vot_kernels.ops.attention_options import Causal
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.packing import PackedLayout


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    causal: Causal = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return exact softmax attention within each segment: output and lse."""
    return reference.hybrid_attention(
        q, k, v, layout, window=None, causal="token" if causal else None, scale=scale
    )
