"""Hybrid attention: exact softmax over near groups and linear attention over far ones, with one normaliser.

For a query i in group g of a packed segment, with near(g) the groups inside the window and far(g) the others,

    kappa_ij = exp(scale q_i.k_j)              j in near(g)
             = exp(beta_h) phi(q_i).phi(k_j)   j in far(g)
    o_i = sum_j kappa_ij v_j / Z_i,   Z_i = sum_j kappa_ij,   lse_i = log Z_i.

The cost grows linearly with the number of tokens. `window=None` is exact softmax attention; beta = -inf is window
attention.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vot_kernels.ops.attention_options import CAUSAL_MODES, Causal, Window
from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import (
    check_causal,
    check_choice,
    check_groups,
    check_options,
    check_packed,
    check_scale,
)
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import VARIANTS, Grads, Options
from vot_kernels.packing import PackedLayout


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window = 1,
    beta: Tensor | None = None,
    far_weight: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: Causal = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor: ...


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window = 1,
    beta: Tensor | None = None,
    far_weight: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: Causal = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    _variant: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@autocasts("q", "k", "v", "q_features", "k_features")
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window = 1,
    beta: Tensor | None = None,
    far_weight: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: Causal = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention to the groups in the window and linear attention to the rest of the segment.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64. Sums and exponentials are computed in
            float32 or wider (docs/attention.md says what each backend rounds). Rows past the layout's tokens are
            slack: they are never read, and their output and gradient are 0, their lse -inf.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment and group.
        window: groups that are near: an int (on both sides, or to the left when causal), a pair
            (left, right), or None for all, which is exact softmax attention. 0 means only a token's own group.
        beta: `[heads]`, log of the weight of far tokens; None means 0, and -inf leaves them out.
        far_weight: `[heads]` >= 0, that weight itself, in place of beta. It has a gradient at 0 too, so training can
            begin with window attention and let the far tokens in; with beta = -inf it never would.
        feature_map: phi of the far part, on q and k as given: "softmax" over head_dim, "elu" (elu + 1)
            or "relu".
        q_features: `[tokens, heads, width]` >= 0 in place of phi(q); requires `k_features`.
        k_features: `[tokens, kv_heads, width]` >= 0 in place of phi(k).
        causal: None or False for no mask; "group" if groups see no later group, but all of their own (streaming
            video); "token" or True if tokens see no later token. Then only groups wholly before the window are far.
        scale: factor on q.k of near tokens, by default head_dim ** -0.5.
        return_lse: also return lse, which is differentiable: results over disjoint keys can be merged.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        The output `[tokens, heads, head_dim]` in the dtype of q; with `return_lse` also lse
        `[tokens, heads]`, float32 (float64 for float64 inputs).
        The same inputs give bitwise equal outputs. Gradients are bitwise equal too under
        `torch.use_deterministic_algorithms(True)`; without it, a GPU's config table may select a faster Triton
        backward, which sums dq in no fixed order.

    Raises:
        TypeError: a tensor argument is not a tensor, `layout` is not a PackedLayout, q or beta is not floating point,
            or the dtypes of q, k, v and the features differ.
        ValueError: shapes or devices do not fit together, the layout has more tokens than q has rows, one of the
            features is missing, `window`, `feature_map`, `causal` or `backend` is not one of the values above, or no
            such backend can serve the inputs.
    """
    check_packed(q, k, v, layout)
    check_options(q, k, beta, feature_map, q_features, k_features, far_weight)
    causal = check_causal(causal, CAUSAL_MODES)
    check_choice("_variant", _variant, VARIANTS)
    backend = select("hybrid_attention", backend, q, features=q_features)
    weighs = far_weight is not None
    inputs = Inputs(q, k, v, far_weight if weighs else beta, q_features, k_features)
    geometry = Geometry.of(layout, window, causal)
    check_groups(layout, window, causal)
    check_choice("return_lse", return_lse, (False, True))
    scale = check_scale("scale", scale, q.shape[2])
    if backend == "reference":
        out, lse = reference.hybrid_attention(
            q,
            k,
            v,
            layout,
            window=window,
            beta=beta,
            far_weight=far_weight,
            feature_map=feature_map,
            q_features=q_features,
            k_features=k_features,
            causal=causal,
            scale=scale,
        )
    else:
        out, lse = _hybrid_attention_fwd(*inputs, *geometry, feature_map, scale, weighs, _variant, backend)
    return (out, lse) if return_lse else out


# The ops take the layout's tensors, on the device for kernels and on the host for planning, and no integer that
# depends on a batch, so that one compiled graph serves every packing.
_LAYOUT = (
    *("cu_seqlens", "cu_groups", "segment_groups"),
    *("host_cu_seqlens", "host_cu_groups", "host_segment_groups"),
)


@custom_op("vot_kernels::hybrid_attention_fwd", _LAYOUT)
@without_autocast
def _hybrid_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    segment_groups: Tensor,
    host_cu_seqlens: Tensor,
    host_cu_groups: Tensor,
    host_segment_groups: Tensor,
    left: int | None,
    right: int | None,
    causal: str | None,
    feature_map: str,
    scale: float,
    weighs: bool,
    variant: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return output and lse. The arguments are `Inputs`, `Geometry` and `Options` one by one, then the backend.

    `weighs` says that `beta` is the far weight itself, not its log.
    """
    device, host = (
        (cu_seqlens, cu_groups, segment_groups),
        (host_cu_seqlens, host_cu_groups, host_segment_groups),
    )
    beta = _widened(beta).log() if weighs and beta is not None else beta
    inputs = Inputs(q, k, v, beta, q_features, k_features)
    geometry = Geometry(*device, *host, left, right, causal)
    options = Options(feature_map, scale, variant=variant)
    return load("hybrid_attention", backend).forward(inputs, geometry, options)


@_hybrid_attention_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


@custom_op("vot_kernels::hybrid_attention_bwd", _LAYOUT)
@without_autocast
def _hybrid_attention_bwd(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    segment_groups: Tensor,
    host_cu_seqlens: Tensor,
    host_cu_groups: Tensor,
    host_segment_groups: Tensor,
    left: int | None,
    right: int | None,
    causal: str | None,
    feature_map: str,
    scale: float,
    weighs: bool,
    variant: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, q_features and k_features; empty for an argument that is None."""
    device, host = (
        (cu_seqlens, cu_groups, segment_groups),
        (host_cu_seqlens, host_cu_groups, host_segment_groups),
    )
    log_weight = _some_log_weight(beta, lse) if weighs and beta is not None else beta
    inputs = Inputs(q, k, v, log_weight, q_features, k_features)
    saved = Saved(inputs, out, lse)
    geometry = Geometry(*device, *host, left, right, causal)
    options = Options(feature_map, scale, torch.are_deterministic_algorithms_enabled(), variant)
    found = load("hybrid_attention", backend).backward(saved, Grads(d_out, d_lse), geometry, options)
    dq, dk, dv, d_beta, d_q_features, d_k_features = (q.new_empty(0) if x is None else x for x in found)
    if weighs and beta is not None and log_weight is not None:
        root = (-log_weight / 2).exp()  # 1 / weight itself may overflow where the gradient does not
        d_beta = (d_beta * root * root).to(beta.dtype)
    return dq, dk, dv, d_beta, d_q_features, d_k_features


@_hybrid_attention_bwd.register_fake
def _(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(out.new_empty(0) if x is None else x.new_empty(x.shape) for x in Inputs(*arguments[:6]))


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _some_log_weight(weight: Tensor, lse: Tensor) -> Tensor:
    """Logs of far weights, where those of 0 are too small to matter to any gradient but their own.

    Backends differentiate by log weights, which says nothing of a weight of 0: there that gradient is 0 times another.
    What a weight adds to a row is relative to exp(lse), so the least lse of a head decides what is small: exp(-8) of
    a rounding. Smaller weights would do harm, because their logs are rounded in larger steps.
    """
    log_weight = _widened(weight).log()
    if not lse.shape[0]:
        return log_weight.clamp(min=0)
    least = lse.masked_fill(lse == -torch.inf, torch.inf).amin(0).nan_to_num(nan=0.0, posinf=0.0)
    return torch.maximum(log_weight, least.to(log_weight) + math.log(torch.finfo(log_weight.dtype).eps) - 8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:12])
    ctx.options = inputs[12:]


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = _hybrid_attention_bwd(d_out, d_lse, out, lse, *inputs, *ctx.options)
    given = [g if x is not None else None for g, x in zip(grads, inputs[:6], strict=True)]
    return (*given, *[None] * (len(inputs) - 6 + len(ctx.options)))


_hybrid_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
