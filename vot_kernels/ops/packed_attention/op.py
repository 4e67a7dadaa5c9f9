"""Exact softmax attention within each segment of a packed buffer."""

from typing import Literal, overload

from torch import Tensor

from vot_kernels.ops.attention_options import TOKEN_CAUSAL_MODES, Causal
from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import check_causal, check_choice, check_packed, check_scale
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs
from vot_kernels.ops.hybrid_attention.op import _hybrid_attention_fwd
from vot_kernels.ops.packed_attention import reference
from vot_kernels.ops.parts.attention import VARIANTS
from vot_kernels.packing import PackedLayout


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    causal: Causal = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    causal: Causal = False,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    _variant: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@autocasts("q", "k", "v")
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    causal: Causal = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Variable-length softmax attention: every token attends to all tokens of its own segment.

    It is `hybrid_attention` with `window=None`; the groups of the layout play no part.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64. Rows past the layout's tokens
            are slack: they are never read as keys, their output and gradient are 0, their lse is -inf.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment.
        causal: False or None for no mask; True or "token" if a token sees only itself and the tokens before it.
        scale: factor on q.k, by default head_dim ** -0.5.
        return_lse: also return the log of the normaliser, which is differentiable.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        The output `[tokens, heads, head_dim]` in the dtype of q; with `return_lse` also lse
        `[tokens, heads]`, float32 (float64 for float64 inputs). `hybrid_attention` says when gradients are bitwise
        reproducible.

    Raises:
        TypeError: q, k or v is not a tensor, `layout` is not a PackedLayout, q is not floating point, or the dtypes
            of q, k and v differ.
        ValueError: shapes or devices do not fit together, the layout has more tokens than q has rows, `causal` or
            `backend` is not one of the values above, or no such backend can serve the inputs.
    """
    check_packed(q, k, v, layout)
    causal = check_causal(causal, TOKEN_CAUSAL_MODES)
    check_choice("_variant", _variant, VARIANTS)
    backend = select("packed_attention", backend, q)
    check_choice("return_lse", return_lse, (False, True))
    scale = check_scale("scale", scale, q.shape[2])
    if backend == "reference":
        out, lse = reference.packed_attention(q, k, v, layout, causal=causal, scale=scale)
    else:
        inputs, geometry = Inputs(q, k, v), Geometry.of(layout, None, causal)
        out, lse = _hybrid_attention_fwd(*inputs, *geometry, "softmax", scale, False, _variant, backend)
    return (out, lse) if return_lse else out
