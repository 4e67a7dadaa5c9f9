"""Hybrid attention on the Triton kernels: group states, their sums over far groups, and range attention."""

import torch
from torch import Tensor

from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.launch import rows_contiguous
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.triton import Rows, far_states
from vot_kernels.ops.parts.range_attention.triton import (
    FarPart,
    fuses_backward,
    range_attention_backward,
    range_attention_forward,
    range_attention_keys_backward,
    range_attention_rows_backward,
)


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output and lse, float32 `[tokens, heads]`."""
    q, k, v = inputs.q, inputs.k, inputs.v
    ranges = geometry.key_ranges()
    if not geometry.has_far:
        return range_attention_forward(q, k, v, ranges, options.scale, variant=options.variant)
    v = _compact(v)
    queries, keys, name = _features(inputs, options.feature_map)
    states = _far_states(geometry, Rows(keys, v), k.shape[1], name)
    far = FarPart(*states, queries, name, inputs.beta)
    return range_attention_forward(q, k, v, ranges, options.scale, far, variant=options.variant)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Return the gradients of the inputs that were given.

    The far states are recomputed, not saved, because with small groups they are larger than the inputs.
    """
    inputs, out, lse = saved
    q, k, v, beta, q_features, k_features = inputs
    ranges = geometry.key_ranges()
    if not geometry.has_far:
        choice = options.variant, options.deterministic
        near = range_attention_backward(*grads, out, lse, q, k, v, ranges, options.scale, *choice)
        unused = (None if x is None else torch.zeros_like(x) for x in (beta, q_features, k_features))
        return Inputs(*near, *unused)
    d_out, v = _compact(grads.d_out), _compact(v)  # gradients may be expanded, as those of a sum are
    near_part = (q, k, v, ranges, options.scale)
    queries, keys, name = _features(inputs, options.feature_map)
    states = _far_states(geometry, Rows(keys, v), k.shape[1], name)
    far = FarPart(*states, queries, name, beta)
    fused = fuses_backward(q, options.variant, options.deterministic, far=True)
    rows = range_attention_rows_backward(
        d_out, grads.d_lse, out, lse, *near_part, far, fused=fused, variant=options.variant
    )
    gradients = Rows(queries, d_out, rows.far_weight, rows.minus_delta, by_heads=True)
    states = _far_states(geometry, gradients, k.shape[1], name, mirrored=True)
    far, dq = FarPart(*states, keys, name), rows.dq if fused else None
    dk, dv, d_keys = range_attention_keys_backward(d_out, rows, *near_part, far, dq=dq)
    d_beta = None if beta is None or rows.d_beta is None else rows.d_beta.sum(1).to(beta.dtype)
    return Inputs(rows.dq.to(q.dtype), dk, dv, d_beta, rows.d_features, d_keys)


def _far_states(
    geometry: Geometry, rows: Rows, kv_heads: int, feature_map: str, *, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """Return for each group the sums over the groups that are far from it; mirrored: from which it is far."""
    behind, ahead = reversed(geometry.lags) if mirrored else geometry.lags
    groups = geometry.cu_groups, geometry.segment_groups
    return far_states(rows, *groups, kv_heads, feature_map, behind, ahead)


def _features(inputs: Inputs, feature_map: str) -> tuple[Tensor, Tensor, str]:
    """Return what phi is applied to on either side, and the feature map that is still to be applied."""
    if inputs.q_features is None or inputs.k_features is None:
        return _compact(inputs.q), _compact(inputs.k), feature_map
    return _compact(inputs.q_features), _compact(inputs.k_features), "none"


def _compact(x: Tensor) -> Tensor:
    return rows_contiguous(x, compact=True)
