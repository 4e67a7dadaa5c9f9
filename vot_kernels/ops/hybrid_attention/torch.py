"""Hybrid attention in PyTorch operations: blocks of equal shape as batches, a few heads at a time.

Near attention runs over ranges of keys, far attention over states of groups (see `parts`), head-major and in at
least float32. Temporaries stay small, and no mask of all pairs is ever made.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
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
from vot_kernels.ops.parts.plans import remember
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
    RangePass,
    plan_pass,
    range_attention,
    range_attention_backward,
)


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse `[tokens, heads]`, at least float32."""
    plan, q = make_plan(geometry), inputs.q
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, kv_heads in head_chunks(q, inputs.k, plan.state_size(inputs)):
        part, part_lse = _forward(plan, _cut(inputs, heads, kv_heads), options)
        to_tokens(part, out[:, heads])
        to_tokens(part_lse, lse[:, heads, None], fill=-math.inf)
    return out, lse


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of the inputs that were given."""
    plan, inputs = make_plan(geometry), saved.inputs
    q, k, v, *optional = (None if x is None else x.new_empty(x.shape) for x in inputs)
    assert q is not None and k is not None and v is not None
    found = Inputs(q, k, v, *optional)
    for heads, kv_heads in head_chunks(q, k, plan.state_size(inputs)):
        some = Saved(_cut(inputs, heads, kv_heads), saved.out[:, heads], saved.lse[:, heads])
        parts = _backward(plan, some, Grads(grads.d_out[:, heads], cut_heads(grads.d_lse, heads)), options)
        for part, total in zip(parts, _cut(found, heads, kv_heads), strict=True):
            if total is None:
                continue
            if part is None:
                total.zero_()
            elif part.ndim == 1:  # beta
                total.copy_(part)
            else:
                to_tokens(part, total)
    return found


def _cut(x: Inputs, heads: slice, kv_heads: slice) -> Inputs:
    """Some heads of the inputs, or of their gradients: views."""
    features = cut_heads(x.q_features, heads), cut_heads(x.k_features, kv_heads)
    beta = None if x.beta is None else x.beta[heads]
    return Inputs(x.q[:, heads], x.k[:, kv_heads], x.v[:, kv_heads], beta, *features)


def _forward(plan: "Plan", inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output `[heads, tokens, d]` and lse `[heads, tokens, 1]` of some heads."""
    query, key, value = (to_heads(x, plan.num_tokens) for x in (inputs.q, inputs.k, inputs.v))
    repeats = query.shape[0] // key.shape[0]
    out, lse = range_attention(query, key, value, plan.passes, options.scale)
    if plan.far is not None:
        query_features = _features(query, options.feature_map, inputs.q_features)
        key_features = _features(key, options.feature_map, inputs.k_features)
        states = scan_states(group_states(key_features, append_column(value, 1.0), plan.far), plan.far)
        sums = apply_states(query_features, repeat_heads(states, repeats), plan.far)
        out, lse = join_far(out, lse, sums, log_weight(inputs.beta, query))
    return out, lse


def _backward(plan: "Plan", saved: Saved, grads: Grads, options: Options) -> tuple[Tensor | None, ...]:
    """Head-major gradients of some heads; those of beta and the features are None without a far part."""
    tokens, inputs = plan.num_tokens, saved.inputs
    query, key, value = (to_heads(x, tokens) for x in (inputs.q, inputs.k, inputs.v))
    out, d_out, joint = (to_heads(x, tokens) for x in (saved.out, grads.d_out, saved.lse[..., None]))
    d_lse = None if grads.d_lse is None else to_heads(grads.d_lse[..., None], tokens)
    repeats = query.shape[0] // key.shape[0]
    near = (key, value, out, joint, plan.passes, options.scale)
    dq, dk, dv = range_attention_backward(d_out, d_lse, query, *near)
    d_beta, d_phi_q, d_phi_k = None, None, None
    if plan.far is not None:
        query_features = _features(query, options.feature_map, inputs.q_features)
        key_features = _features(key, options.feature_map, inputs.k_features)
        weight = far_weight(log_weight(inputs.beta, query), joint)
        delta = (d_out * out).sum(-1, keepdim=True)
        delta = delta if d_lse is None else delta - d_lse
        g = torch.cat([d_out, -delta], -1)  # not times the weight yet: its products with [v, 1] cancel
        weights_q = query_features * weight
        values = append_column(value, 1.0)
        states = scan_states(group_states(key_features, values, plan.far), plan.far)
        d_phi_q = apply_states(g, repeat_heads(states, repeats).transpose(-1, -2), plan.far).mul_(weight)
        d_beta = (query_features * d_phi_q).sum((1, 2))
        d_states = fold_heads(group_states(weights_q, g, plan.far), repeats)
        d_states = scan_states(d_states, plan.far, transposed=True)
        d_phi_k = apply_states(values, d_states.transpose(-1, -2), plan.far)
        dv += apply_states(key_features, d_states, plan.far)[..., :-1]
        if inputs.q_features is None:
            dq += feature_map_backward(query, query_features, d_phi_q, options.feature_map)
            dk += feature_map_backward(key, key_features, d_phi_k, options.feature_map)
    return dq, dk, dv, d_beta, d_phi_q, d_phi_k


def _features(x: Tensor, name: str, given: Tensor | None) -> Tensor:
    return feature_map(x, name) if given is None else to_heads(given, x.shape[1])


@dataclass(frozen=True, eq=False)
class Plan:
    """How one packing is cut into batches of equal shape.

    Attributes:
        num_tokens: packed rows; later rows are slack.
        passes: near ranges, each pass with at most one key range per query.
        far: states and scan of the far groups, None if no group has any.
    """

    num_tokens: int
    passes: tuple[RangePass, ...]
    far: StatePlan | None

    def state_size(self, inputs: Inputs) -> int:
        """Numbers in the far states of one head."""
        width = (inputs.q if inputs.q_features is None else inputs.q_features).shape[2]
        return 0 if self.far is None else self.far.num_slots * width * (inputs.q.shape[2] + 1)


@remember
def make_plan(geometry: Geometry) -> Plan:
    """The plan of a packing on the device where its bounds lie."""
    device = geometry.cu_seqlens.device
    near = geometry.near_ranges()
    if geometry.causal == "token":  # the own group with a triangle, then whole groups before it
        begin, end, key_begin, _ = near.T
        own = plan_pass(np.stack([begin, end, begin, end], axis=1), True, device)
        before = plan_pass(np.stack([begin, end, key_begin, begin], axis=1), False, device)
        passes = [own, before]
    else:
        passes = [plan_pass(near, False, device)]
    far = None
    if geometry.has_far:
        first, groups = (
            x.numpy().astype(np.int64) for x in (geometry.host_segment_groups, geometry.host_cu_groups)
        )
        far = plan_states(first, groups, *geometry.lags, device)
    return Plan(
        int(geometry.host_cu_seqlens[-1]),
        tuple(blocks for blocks in passes if blocks),
        far if far is not None and far.groups else None,
    )
