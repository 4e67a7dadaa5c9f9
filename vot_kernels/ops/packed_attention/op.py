"""Exact softmax attention within each segment of a packed buffer."""

from torch import Tensor

from vot_kernels.ops.checks import check_choice, check_qkv
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.hybrid_attention.op import attend
from vot_kernels.ops.parts.range_attention.triton import VARIANTS
from vot_kernels.packing import PackedLayout


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Variable-length softmax attention: every token attends to all tokens of its own segment.

    It is `hybrid_attention` with `window=None`: the groups of the layout play no part.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64. Rows past the layout's tokens
            are slack: they are never read as keys, their output and gradient are 0, their lse is -inf.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment.
        causal: a token sees itself and the tokens before it.
        scale: factor on q.k, by default head_dim ** -0.5.
        return_lse: also return the log of the normaliser, which is differentiable.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        The output `[tokens, heads, head_dim]` in the dtype of q; with `return_lse` also lse
        `[tokens, heads]`, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.
    """
    check_qkv(q, k, v, layout)
    check_choice("causal", causal, (False, True))
    check_choice("_variant", _variant, (None, *VARIANTS))
    chosen = select("packed_attention", backend, q)
    out, lse = attend(
        q,
        k,
        v,
        layout,
        window=None,
        causal="token" if causal else None,
        scale=scale,
        backend=chosen,
        variant=_variant,
    )
    return (out, lse) if return_lse else out
