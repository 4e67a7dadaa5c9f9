"""Hybrid attention: exact softmax over near groups and linear attention over far ones, one normaliser.

For a query i in group g of a packed segment, with near(g) the groups inside the window and far(g) the others,

    kappa_ij = exp(scale q_i.k_j)              j in near(g)
             = exp(beta_h) phi(q_i).phi(k_j)   j in far(g)
    o_i = sum_j kappa_ij v_j / Z_i,   Z_i = sum_j kappa_ij,   lse_i = log Z_i.

The cost grows linearly with the tokens. `window=None` is exact softmax attention, beta = -inf is window
attention.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.attention_options import CAUSAL_MODES, Window, window_sides
from vot_kernels.ops.checks import check_choice, check_options, check_qkv
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.hybrid_attention.step import HybridAttentionState, hybrid_attention_step
from vot_kernels.ops.hybrid_attention.triton import (
    Geometry,
    hybrid_attention_backward,
    hybrid_attention_forward,
)
from vot_kernels.ops.parts.group_states.torch import (
    StatePlan,
    apply_states,
    far_weight,
    feature_map,
    feature_map_backward,
    group_states,
    join_far,
    log_weight,
    plan_states,
    scan_states,
)
from vot_kernels.ops.parts.range_attention.blocks import (
    append_column,
    cut_heads,
    fold_heads,
    head_chunks,
    repeat_heads,
    to_heads,
    to_tokens,
)
from vot_kernels.ops.parts.range_attention.torch import (
    Pass,
    plan_pass,
    range_attention,
    range_attention_backward,
)
from vot_kernels.ops.parts.range_attention.triton import VARIANTS
from vot_kernels.packing import PackedLayout

__all__ = ["HybridAttentionState", "hybrid_attention", "hybrid_attention_step"]

_feature_map = feature_map  # the public functions have an argument of that name


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window = 1,
    beta: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    _variant: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention to the groups in the window and linear attention to the rest of the segment.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64; sums and exponentials in float32
            at least (docs/attention.md says what each backend rounds). Rows past the layout's tokens are
            slack: never read, output and gradient 0, lse -inf.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment and group.
        window: groups that are near: an int (on both sides, or to the left when causal), a pair
            (left, right), or None for all, which is exact softmax attention. 0 is the own group only.
        beta: `[heads]`, log of the weight of far tokens; None is 0, -inf leaves them out.
        feature_map: phi of the far part, on q and k as given: "softmax" over head_dim, "elu" (elu + 1)
            or "relu".
        q_features: `[tokens, heads, width]` >= 0 in place of phi(q); requires `k_features`.
        k_features: `[tokens, kv_heads, width]` >= 0 in place of phi(k).
        causal: None; "group", groups see no later group but all of their own (streaming video);
            "token", tokens see no later token. A far group lies wholly before the window then.
        scale: factor on q.k of near tokens, by default head_dim ** -0.5.
        return_lse: also return lse, which is differentiable: results over disjoint keys can be merged.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        The output `[tokens, heads, head_dim]` in the dtype of q; with `return_lse` also lse
        `[tokens, heads]`, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.
    """
    check_qkv(q, k, v, layout)
    check_options(q, k, beta, feature_map, q_features, k_features)
    check_choice("causal", causal, CAUSAL_MODES)
    check_choice("_variant", _variant, (None, *VARIANTS))
    chosen = select("hybrid_attention", backend, q, features=q_features)
    out, lse = attend(
        q,
        k,
        v,
        layout,
        window=window,
        beta=beta,
        feature_map=feature_map,
        q_features=q_features,
        k_features=k_features,
        causal=causal,
        scale=scale,
        backend=chosen,
        variant=_variant,
    )
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window,
    causal: str | None,
    backend: str,
    beta: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    scale: float | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of checked inputs on a chosen backend; `packed_attention` enters here too."""
    left, right = window_sides(window, causal)
    if backend == "reference":
        return reference.hybrid_attention(
            q,
            k,
            v,
            layout,
            window=window,
            beta=beta,
            feature_map=feature_map,
            q_features=q_features,
            k_features=k_features,
            causal=causal,
            scale=scale,
        )
    return _hybrid_attention_fwd(
        q,
        k,
        v,
        beta,
        q_features,
        k_features,
        layout.cu_seqlens,
        layout.cu_groups,
        layout.segment_groups,
        layout.host_cu_seqlens,
        layout.host_cu_groups,
        layout.host_segment_groups,
        left,
        right,
        causal or "none",
        feature_map,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        backend,
        variant,
    )


# The ops take the layout's tensors, on the device for kernels and on the host for planning, and no integer
# of a particular batch: a compiled graph then serves every packing.


@torch.library.custom_op("vot_kernels::hybrid_attention_fwd", mutates_args=())
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
    window_left: int | None,
    window_right: int | None,
    causal: str,
    feature_map: str,
    scale: float,
    backend: str = "torch",
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        bounds = (cu_seqlens, cu_groups, segment_groups, host_segment_groups)
        geometry = Geometry(*bounds, window_left, window_right, causal)
        tensors = (q, k, v, beta, q_features, k_features)
        return hybrid_attention_forward(*tensors, geometry, feature_map, scale, variant)
    host = (host_cu_seqlens, host_cu_groups, host_segment_groups)
    plan = make_plan(*host, window_left, window_right, causal, q.device)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, kv_heads in head_chunks(q, k, plan.state_size(q, q_features)):
        part = _forward(
            plan,
            q[:, heads],
            k[:, kv_heads],
            v[:, kv_heads],
            None if beta is None else beta[heads],
            cut_heads(q_features, heads),
            cut_heads(k_features, kv_heads),
            feature_map,
            scale,
        )
        to_tokens(part[0], out[:, heads])
        to_tokens(part[1], lse[:, heads, None], fill=-math.inf)
    return out, lse


def _forward(
    plan: "Plan",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[heads, tokens, d]` and lse `[heads, tokens, 1]` of some heads."""
    query, key, value = (to_heads(x, plan.num_tokens) for x in (q, k, v))
    repeats = query.shape[0] // key.shape[0]
    near_key, near_value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    out, lse = range_attention(query, near_key, near_value, plan.passes, scale)
    if plan.far is not None:
        query_features = _features(query, feature_map, q_features)
        key_features = _features(key, feature_map, k_features)
        states = scan_states(group_states(key_features, append_column(value, 1.0), plan.far), plan.far)
        sums = apply_states(query_features, repeat_heads(states, repeats), plan.far)
        out, lse = join_far(out, lse, sums, log_weight(beta, query))
    return out, lse


@_hybrid_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute)


@torch.library.custom_op("vot_kernels::hybrid_attention_bwd", mutates_args=())
def _hybrid_attention_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
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
    window_left: int | None,
    window_right: int | None,
    causal: str,
    feature_map: str,
    scale: float,
    backend: str = "torch",
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, q_features and k_features; empty for an argument that is None."""
    if backend == "triton":
        bounds = (cu_seqlens, cu_groups, segment_groups, host_segment_groups)
        geometry = Geometry(*bounds, window_left, window_right, causal)
        tensors = (grad, grad_lse, out, lse, q, k, v, beta, q_features, k_features)
        found = hybrid_attention_backward(*tensors, geometry, feature_map, scale, variant)
        d_beta, d_q_features, d_k_features = (
            q.new_empty(0) if x is None else torch.zeros_like(x) if found_grad is None else found_grad
            for x, found_grad in zip((beta, q_features, k_features), found[3:], strict=True)
        )
        return *found[:3], d_beta, d_q_features, d_k_features
    host = (host_cu_seqlens, host_cu_groups, host_segment_groups)
    plan = make_plan(*host, window_left, window_right, causal, q.device)
    arguments = (q, k, v, beta, q_features, k_features)
    dq, dk, dv, *optional = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments)
    d_beta, d_q_features, d_k_features = optional
    grads = (dq, dk, dv, d_beta, d_q_features, d_k_features)
    for heads, kv_heads in head_chunks(q, k, plan.state_size(q, q_features)):
        parts = _backward(
            plan,
            grad[:, heads],
            cut_heads(grad_lse, heads),
            out[:, heads],
            lse[:, heads],
            q[:, heads],
            k[:, kv_heads],
            v[:, kv_heads],
            None if beta is None else beta[heads],
            cut_heads(q_features, heads),
            cut_heads(k_features, kv_heads),
            feature_map,
            scale,
        )
        owners = (heads, kv_heads, kv_heads, heads, heads, kv_heads)
        for x, total, part, own in zip(arguments, grads, parts, owners, strict=True):
            if x is beta and beta is not None:
                total[own] = 0 if part is None else part
            elif x is not None:
                rows = total[:, own]
                rows.zero_() if part is None else to_tokens(part, rows)
    return grads


def _backward(
    plan: "Plan",
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Head-major gradients of some heads; those of beta and the features are None without a far part."""
    tokens = plan.num_tokens
    query, key, value, do, o = (to_heads(x, tokens) for x in (q, k, v, grad, out))
    joint = to_heads(lse[..., None], tokens)
    d_lse = None if grad_lse is None else to_heads(grad_lse[..., None], tokens)
    repeats = query.shape[0] // key.shape[0]
    near_key, near_value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    near = (near_key, near_value, o, joint, plan.passes, scale)
    dq, dk, dv = range_attention_backward(do, d_lse, query, *near)
    dk, dv = fold_heads(dk, repeats), fold_heads(dv, repeats)
    d_beta, d_phi_q, d_phi_k = None, None, None
    if plan.far is not None:
        query_features = _features(query, feature_map, q_features)
        key_features = _features(key, feature_map, k_features)
        weight = far_weight(log_weight(beta, query), joint)
        delta = (do * o).sum(-1, keepdim=True)
        delta = delta if d_lse is None else delta - d_lse
        weighted = torch.cat([do, -delta], -1).mul_(weight)
        values = append_column(value, 1.0)
        states = scan_states(group_states(key_features, values, plan.far), plan.far)
        d_phi_q = apply_states(weighted, repeat_heads(states, repeats).transpose(-1, -2), plan.far)
        d_beta = (query_features * d_phi_q).sum((1, 2))
        d_states = fold_heads(group_states(query_features, weighted, plan.far), repeats)
        d_states = scan_states(d_states, plan.far, transposed=True)
        d_phi_k = apply_states(values, d_states.transpose(-1, -2), plan.far)
        dv += apply_states(key_features, d_states, plan.far)[..., :-1]
        if q_features is None:
            dq += feature_map_backward(query, query_features, d_phi_q, feature_map)
            dk += feature_map_backward(key, key_features, d_phi_k, feature_map)
    return dq, dk, dv, d_beta, d_phi_q, d_phi_k


@_hybrid_attention_bwd.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    like = arguments[:6]
    return tuple(out.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:12])
    ctx.options = inputs[12:]


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    grads = _hybrid_attention_bwd(grad, grad_lse, out, lse, *inputs, *ctx.options)
    given = [g if x is not None else None for g, x in zip(grads, inputs[:6], strict=True)]
    return (*given, *[None] * (len(inputs) - 6 + len(ctx.options)))


_hybrid_attention_fwd.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True, eq=False)
class Plan:
    """How one packing is cut into batches of equal shape.

    Attributes:
        num_tokens: packed rows; later rows are slack.
        passes: near ranges, each pass with at most one key range per query.
        far: states and scan of the far groups, None if no group has any.
    """

    num_tokens: int
    passes: tuple[Pass, ...]
    far: StatePlan | None

    def state_size(self, q: Tensor, q_features: Tensor | None) -> int:
        """Numbers in the far states of one head."""
        width = (q if q_features is None else q_features).shape[2]
        return 0 if self.far is None else self.far.num_slots * width * (q.shape[2] + 1)


def make_plan(
    host_cu_seqlens: Tensor,
    host_cu_groups: Tensor,
    host_segment_groups: Tensor,
    left: int | None,
    right: int | None,
    causal: str,
    device: torch.device,
) -> Plan:
    """The plan of a packing, remembered by its contents: layers of one model share a packing."""
    numbers = (x.numpy().tobytes() for x in (host_cu_seqlens, host_cu_groups, host_segment_groups))
    return _plan(*numbers, left, right, causal, device)


@lru_cache(maxsize=32)
def _plan(
    cu_seqlens: bytes,
    cu_groups: bytes,
    segment_groups: bytes,
    left: int | None,
    right: int | None,
    causal: str,
    device: torch.device,
) -> Plan:
    seqlens, groups, first = (
        np.frombuffer(numbers, dtype=np.int32).astype(np.int64)
        for numbers in (cu_seqlens, cu_groups, segment_groups)
    )
    if left is None and causal != "group":  # everything is near, so a segment is one group
        left, right, groups, first = 0, 0, seqlens, np.arange(len(seqlens))
    counts = np.diff(first)
    lowest, highest = np.repeat(first[:-1], counts), np.repeat(first[1:] - 1, counts)
    index = np.arange(len(groups) - 1)
    low = lowest if left is None else np.maximum(lowest, index - left)
    high = highest if right is None else np.minimum(highest, index + right)
    begin, end, key_begin, key_end = groups[:-1], groups[1:], groups[low], groups[high + 1]
    if causal == "token":  # the own group with a triangle, then whole groups before it
        own = plan_pass(np.stack([begin, end, begin, end], axis=1), True, device)
        before = plan_pass(np.stack([begin, end, key_begin, begin], axis=1), False, device)
        passes = tuple(blocks for blocks in (own, before) if blocks)
    else:
        near = plan_pass(np.stack([begin, end, key_begin, key_end], axis=1), False, device)
        passes = (near,) if near else ()
    far = None
    if left is not None and len(first) > 1:
        behind = left + 1
        ahead = None if causal != "none" or right is None else right + 1
        far = plan_states(first, groups, behind, ahead, device)
    return Plan(int(seqlens[-1]), passes, far if far is not None and far.groups else None)


def _features(x: Tensor, name: str, given: Tensor | None) -> Tensor:
    return _feature_map(x, name) if given is None else to_heads(given, x.shape[1])
