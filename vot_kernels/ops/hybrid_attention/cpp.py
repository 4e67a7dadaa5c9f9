"""Hybrid attention on the C++ kernels: states of groups, their sums over the far ones, and range attention."""

import torch
from torch import Tensor

from vot_kernels.ops.hybrid_attention import torch as composition
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.launch import rows_contiguous
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.cpp import far_states, group_states
from vot_kernels.ops.parts.range_attention.cpp import (
    FarPart,
    Plan,
    plan_ranges,
    range_attention_backward,
    range_attention_forward,
    range_attention_keys_backward,
    range_attention_rows_backward,
)

# A state has a row for each feature. Those of groups of up to _FEW_ROWS rows are much larger than the rows; beyond
# _MOST_NUMBERS in all PyTorch is faster, where several groups share a state.
_FEW_ROWS, _MOST_NUMBERS = 8, 2**20


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse, float32 `[tokens, heads]`."""
    needs_far = geometry.needs_far(inputs.beta)
    if needs_far and _shares_states(inputs, geometry):
        return composition.forward(inputs, geometry, options)
    plan = _plan(inputs, geometry)
    far = _far_rows(inputs, geometry, options) if needs_far else None
    return range_attention_forward(*inputs[:3], plan, options.scale, far)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of the inputs that were given. The far states are made again instead of kept."""
    inputs, out, lse = saved
    needs_far = geometry.needs_far(inputs.beta)
    if needs_far and _shares_states(inputs, geometry):
        return composition.backward(saved, grads, geometry, options)
    q, k, v, beta, q_features, k_features = inputs
    plan = _plan(inputs, geometry)
    if not needs_far:
        near = range_attention_backward(*grads, out, lse, q, k, v, plan, options.scale)
        unused = (None if x is None else torch.zeros_like(x) for x in (beta, q_features, k_features))
        return Inputs(*near, *unused)
    far = _far_rows(inputs, geometry, options)
    if out.dtype != torch.float32:
        # d_out.(v - out) cancels, and a far weight may exceed 1 by much: then the rounding of out would be all of it.
        out, _ = range_attention_forward(q, k, v, plan, options.scale, far, torch.float32)
    found = range_attention_rows_backward(*grads, out, lse, k.shape[1], plan, far)
    d_out = rows_contiguous(grads.d_out)
    gradients = (far.features, d_out, geometry.cu_groups, k.shape[1], far.feature_map)
    states = group_states(*gradients, found.far_weight, -found.delta)
    keys, name = _features(k, k_features, options)
    far = FarPart(far_states(states, geometry.segment_groups, *reversed(geometry.lags)), keys, name)
    dq, dk, dv, d_keys = range_attention_keys_backward(d_out, lse, found, q, k, v, plan, options.scale, far)
    d_beta = None if beta is None or found.d_beta is None else found.d_beta.sum(0).to(beta.dtype)
    return Inputs(dq, dk, dv, d_beta, found.d_features, d_keys)


def _shares_states(inputs: Inputs, geometry: Geometry) -> bool:
    """Whether the groups are too small for states of their own."""
    groups, tokens = geometry.host_cu_groups.shape[0] - 1, int(geometry.host_cu_groups[-1])
    width = (inputs.q if inputs.q_features is None else inputs.q_features).shape[2]
    numbers = groups * inputs.v.shape[1] * inputs.v.shape[2] * width
    return tokens <= _FEW_ROWS * groups and numbers > _MOST_NUMBERS


def _plan(inputs: Inputs, geometry: Geometry) -> Plan:
    return plan_ranges(geometry.key_ranges(), inputs.q.shape[1], inputs.k.shape[1])


def _far_rows(inputs: Inputs, geometry: Geometry, options: Options) -> FarPart:
    """For each group the sum of the states of the groups far from it, and what reads it."""
    keys, name = _features(inputs.k, inputs.k_features, options)
    states = group_states(keys, rows_contiguous(inputs.v), geometry.cu_groups, inputs.k.shape[1], name)
    queries, _ = _features(inputs.q, inputs.q_features, options)
    return FarPart(far_states(states, geometry.segment_groups, *geometry.lags), queries, name, inputs.beta)


def _features(x: Tensor, given: Tensor | None, options: Options) -> tuple[Tensor, str]:
    """What phi is made of, and the feature map that is still to be applied."""
    return (rows_contiguous(x), options.feature_map) if given is None else (rows_contiguous(given), "none")
