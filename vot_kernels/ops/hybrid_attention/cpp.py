"""Hybrid attention on the C++ kernels: states of blocks, their sums over the far ones, and range attention."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vot_kernels.ops.hybrid_attention.far_blocks import FarBlocks, plan_blocks
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.launch import rows_contiguous
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.cpp import far_states, group_states, state_row
from vot_kernels.ops.parts.plans import remember
from vot_kernels.ops.parts.range_attention.cpp import (
    FarPart,
    Plan,
    RangeBounds,
    make_plan,
    plan_ranges,
    range_attention_backward,
    range_attention_forward,
    range_attention_keys_backward,
    range_attention_rows_backward,
)


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse, float32 `[tokens, heads]`."""
    plan, blocks = _plan(inputs, geometry)
    far = None if blocks is None else _far_rows(inputs, blocks, options)
    return range_attention_forward(*inputs[:3], plan, options.scale, far)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of the inputs that were given. The far states are made again instead of kept."""
    inputs, out, lse = saved
    q, k, v, beta, q_features, k_features = inputs
    plan, blocks = _plan(inputs, geometry)
    if blocks is None:
        near = range_attention_backward(*grads, out, lse, q, k, v, plan, options.scale)
        unused = (None if x is None else torch.zeros_like(x) for x in (beta, q_features, k_features))
        return Inputs(*near, *unused)
    far = _far_rows(inputs, blocks, options)
    if out.dtype != torch.float32:
        # d_out.(v - out) cancels, and a far weight may exceed 1 by much: then the rounding of out would be all of it.
        out, _ = range_attention_forward(q, k, v, plan, options.scale, far, torch.float32)
    found = range_attention_rows_backward(*grads, out, lse, k.shape[1], plan, far)
    d_out, states = rows_contiguous(grads.d_out), None
    if far.states is not None:
        weights = found.far_weight, -found.delta
        states = group_states(far.features, d_out, blocks.states, k.shape[1], far.feature_map, *weights)
        states = far_states(states, blocks.segments, *blocks.mirrored)
    keys = FarPart(states, blocks.slots, far.others, far.features, far.feature_map, far.reach, far.beta)
    gradients = range_attention_keys_backward(d_out, lse, found, q, k, v, plan, options.scale, keys)
    d_beta = None if beta is None or gradients.d_beta is None else gradients.d_beta.to(beta.dtype)
    return Inputs(*gradients._replace(d_beta=d_beta))


def forward_step(inputs: Inputs, far: Tensor | None, options: Options) -> Tensor:
    """Output of rows that see all of k and v as near, and `far` [kv_heads, width, head_dim + 1]."""
    q, k, v, beta, _, _ = inputs
    heads, kv_heads, head_dim = q.shape[1], *k.shape[1:]
    plan = _plan_step(q.shape[0], k.shape[0], heads, kv_heads, torch.get_num_threads())
    part = None
    if far is not None and Geometry.weighs(beta):
        features, name = _features(q, inputs.q_features, options)
        states = pad(far, (0, state_row(head_dim) - head_dim - 1))[None]
        slots = torch.zeros(q.shape[0], dtype=torch.int32)
        part = FarPart(states, slots, features, features, name, None, beta)
    return range_attention_forward(q, k, v, plan, options.scale, part)[0]


def state_of_group(k: Tensor, v: Tensor, k_features: Tensor | None, name: str) -> Tensor:
    """The sum of phi(k) [v, 1]^T, float32 [kv_heads, width, head_dim + 1]."""
    features, name = _features(k, k_features, Options(name))
    rows = torch.tensor([[0], [k.shape[0]]], dtype=torch.int32)
    return group_states(features, rows_contiguous(v), rows, k.shape[1], name)[
        0, ..., : v.shape[2] + 1
    ].contiguous()


@remember
def _plan_step(rows: int, keys: int, heads: int, kv_heads: int, threads: int) -> Plan:
    near = np.stack([np.zeros(rows, int), np.full(rows, keys)])
    bounds = RangeBounds(np.array([0, rows]), np.array([0, keys]), near)
    return make_plan(bounds, near, heads, kv_heads, threads)


def _plan(inputs: Inputs, geometry: Geometry) -> tuple[Plan, FarBlocks | None]:
    """What rows see, and the far part if its weights are not known to be 0."""
    heads, kv_heads, head_dim = inputs.q.shape[1], *inputs.k.shape[1:]
    width = head_dim if inputs.q_features is None else inputs.q_features.shape[2]
    weighs = Geometry.weighs(inputs.beta)
    return _plan_once(geometry, weighs, heads, kv_heads, head_dim, width, torch.get_num_threads())


@remember
def _plan_once(
    geometry: Geometry, weighs: bool, heads: int, kv_heads: int, head_dim: int, width: int, threads: int
) -> tuple[Plan, FarBlocks | None]:
    if not (weighs and geometry.has_far):
        return plan_ranges(geometry.key_ranges(), heads, kv_heads), None
    return _plan_far(geometry, heads, kv_heads, head_dim, width, threads)


def _plan_far(
    geometry: Geometry, heads: int, kv_heads: int, head_dim: int, width: int, threads: int
) -> tuple[Plan, FarBlocks]:
    bounds = RangeBounds.of(geometry.key_ranges())
    blocks = plan_blocks(geometry, head_dim, width, heads // kv_heads)
    reach = bounds.near if blocks.reach is None else blocks.reach.numpy()
    return make_plan(bounds, reach, heads, kv_heads, threads), blocks


def _far_rows(inputs: Inputs, blocks: FarBlocks, options: Options) -> FarPart:
    """For each block the sum of the states of the blocks far from it, and what reads it."""
    queries, name = _features(inputs.q, inputs.q_features, options)
    keys, _ = _features(inputs.k, inputs.k_features, options)
    states = None
    if blocks.states.shape[1]:
        states = group_states(keys, rows_contiguous(inputs.v), blocks.states, inputs.k.shape[1], name)
        states = far_states(states, blocks.segments, *blocks.sides)
    return FarPart(states, blocks.slots, queries, keys, name, blocks.reach, inputs.beta)


def _features(x: Tensor, given: Tensor | None, options: Options) -> tuple[Tensor, str]:
    """What phi is made of, and the feature map that is still to be applied."""
    return (rows_contiguous(x), options.feature_map) if given is None else (rows_contiguous(given), "none")
