"""Linear attention in PyTorch operations: the states of segments or chunks in batches, a few heads at a time.

The causal form works on chunks: a scan gives the states of earlier chunks, a small triangular product the own chunk.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.linear_attention.geometry import Geometry, Inputs, Options, Saved
from vot_kernels.ops.parts.attention import Grads
from vot_kernels.ops.parts.group_states.torch import (
    StatePlan,
    apply_states,
    feature_map,
    feature_map_backward,
    group_states,
    plan_states,
    scan_states,
)
from vot_kernels.ops.parts.plans import remember
from vot_kernels.ops.parts.range_attention.blocks import (
    append_column,
    fold_heads,
    head_chunks,
    repeat_heads,
    to_heads,
    to_tokens,
)

_CHUNK = 64  # tokens; with about head_dim of them, triangular products cost as much as the states do
# This scales values and normaliser: with a subnormal Z, products would lose digits and 1 / Z would overflow.
# `vot_kernels.distributed`, which adds to both, asks a backend for it.
SCALE = 2.0**32


def least_normaliser(dtype: torch.dtype) -> float:
    """Return the Z SCALE below which it counts as 0: 1 / Z, or gradients that it multiplies, would be infinite."""
    return torch.finfo(dtype).tiny * 2.0**16


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output and 1 / (Z SCALE) `[tokens, heads]`, which is 0 where Z is 0."""
    plan, q = make_plan(geometry), inputs.q
    out = q.new_empty(q.shape)
    inverse = q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
    for heads, kv_heads in _head_chunks(plan, inputs):
        decay = _cut_decay(plan, inputs.log_decay, heads, inverse)
        part, part_inverse = _forward(plan, _cut(inputs, heads, kv_heads), geometry, options, decay)
        to_tokens(part, out[:, heads])
        to_tokens(part_inverse, inverse[:, heads, None])
    return out, inverse


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Return the gradients of q, k and v, and that of log_decay if the options ask for it.

    With g_i = [do_i, -do_i.o_i] / Z_i, the formulas for the far part of hybrid attention hold. Here phi(q_i) is
    divided by Z_i instead: the products of g_i and [v_j, 1] cancel, which rounded quotients would not do.
    """
    plan, inputs = make_plan(geometry), saved.inputs
    dq, dk, dv = (x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v))
    wanted = inputs.log_decay is not None and options.decay_gradient
    d_decay = torch.empty_like(inputs.log_decay) if inputs.log_decay is not None and wanted else None
    for heads, kv_heads in _head_chunks(plan, inputs):
        some = Saved(_cut(inputs, heads, kv_heads), saved.out[:, heads], saved.inverse[:, heads])
        decay = _cut_decay(plan, inputs.log_decay, heads, saved.inverse)
        *parts, part_decay = _backward(plan, some, grads.d_out[:, heads], geometry, options, decay)
        for part, rows in zip(parts, (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]), strict=True):
            to_tokens(part, rows)
        if d_decay is not None and part_decay is not None:
            d_decay[heads] = part_decay.to(d_decay.dtype)
    return Inputs(dq, dk, dv, d_decay)


def _cut(x: Inputs, heads: slice, kv_heads: slice) -> Inputs:
    """Select some heads; `_cut_decay` selects those of the decay."""
    return Inputs(x.q[:, heads], x.k[:, kv_heads], x.v[:, kv_heads])


def _forward(
    plan: "Plan", inputs: Inputs, geometry: Geometry, options: Options, decay: "_Decay | None"
) -> tuple[Tensor, Tensor]:
    """Return output `[heads, tokens, d]` and 1 / (Z SCALE) `[heads, tokens, 1]` of some heads."""
    query, key, value = (to_heads(x, plan.num_tokens) for x in (inputs.q, inputs.k, inputs.v))
    repeats = query.shape[0] // key.shape[0]
    query, key, value = (
        feature_map(query, options.feature_map),
        feature_map(key, options.feature_map),
        append_column(value, 1.0).mul_(SCALE),
    )
    if decay is None:
        states = scan_states(group_states(key, value, plan.states), plan.states)
        sums = apply_states(query, repeat_heads(states, repeats), plan.states)
    if geometry.causal:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    if decay is not None:
        states = group_states(key * decay.to_end, value, plan.states)
        states = scan_states(states, plan.states, log_step=decay.log_step)
        sums = apply_states(query * decay.from_start, states, plan.states)
    if geometry.causal:
        for chunks, _ in plan.own.groups:
            weights = (chunks.take(query) @ chunks.take(key).transpose(-1, -2)).tril_()
            if decay is not None:
                weights = weights * decay.triangle(chunks.length)
            chunks.add(sums, weights @ chunks.take(value))
    total = sums[..., -1:]
    nothing = total < least_normaliser(total.dtype)
    total = total.masked_fill(nothing, 1)
    return sums[..., :-1] / total, total.reciprocal().masked_fill_(nothing, 0)


def _backward(
    plan: "Plan",
    saved: Saved,
    d_out: Tensor,
    geometry: Geometry,
    options: Options,
    decay: "_Decay | None",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk and dv of some heads, head-major, and the gradient of their log_decay."""
    tokens, inputs = plan.num_tokens, saved.inputs
    query, key, value = (to_heads(x, tokens) for x in (inputs.q, inputs.k, inputs.v))
    out, d_out, inverse = (to_heads(x, tokens) for x in (saved.out, d_out, saved.inverse[..., None]))
    if (
        saved.out.dtype != out.dtype
    ):  # do.(v - o) cancels: where Z is small, the rounding of o would be all of it
        out, _ = _forward(plan, inputs, geometry, options, decay)
    repeats = query.shape[0] // key.shape[0]
    phi_q, phi_k, value = (
        feature_map(query, options.feature_map),
        feature_map(key, options.feature_map),
        append_column(value, 1.0),
    )
    weights_q = phi_q * inverse
    g = torch.cat([d_out, -(d_out * out).sum(-1, keepdim=True)], -1)
    d_decay = None
    if decay is None:
        states = scan_states(group_states(phi_k, value, plan.states), plan.states)
        d_phi_q = apply_states(g, repeat_heads(states, repeats).transpose(-1, -2), plan.states)
        d_states = fold_heads(group_states(weights_q, g, plan.states), repeats)
        d_states = scan_states(d_states, plan.states, transposed=True)
        d_phi_k = apply_states(value, d_states.transpose(-1, -2), plan.states)
        dv = apply_states(phi_k, d_states, plan.states)
    else:
        d_phi_q, d_phi_k, dv, d_decay = _decayed_backward(plan, decay, weights_q, phi_k, value, g)
    if geometry.causal:
        near_k, near_v = repeat_heads(phi_k, repeats), repeat_heads(value, repeats)
        own_k, own_v = torch.zeros_like(near_k), torch.zeros_like(near_v)
        for chunks, _ in plan.own.groups:
            own_q, own_g = chunks.take(weights_q), chunks.take(g)
            weights = (own_q @ chunks.take(near_k).transpose(-1, -2)).tril_()
            d_weights = (own_g @ chunks.take(near_v).transpose(-1, -2)).tril_()
            if decay is not None and d_decay is not None:
                triangle = decay.triangle(chunks.length)
                d_weights = d_weights * triangle
                d_decay = d_decay + decay.count(weights * d_weights)
                weights = weights * triangle
            chunks.add(d_phi_q, d_weights @ chunks.take(near_k))
            chunks.put(own_k, d_weights.transpose(-1, -2) @ own_q)
            chunks.put(own_v, weights.transpose(-1, -2) @ own_g)
        d_phi_k, dv = d_phi_k + fold_heads(own_k, repeats), dv + fold_heads(own_v, repeats)
    return (
        feature_map_backward(query, phi_q, d_phi_q, options.feature_map).mul_(inverse).mul_(SCALE),
        feature_map_backward(key, phi_k, d_phi_k, options.feature_map).mul_(SCALE),
        dv[..., :-1].mul_(SCALE),
        None if d_decay is None else d_decay * SCALE,
    )


def _decayed_backward(
    plan: "Plan", decay: "_Decay", weights_q: Tensor, phi_k: Tensor, value: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the part through the states: gradients of phi(q) before its division by Z, phi(k), values and log_decay.

    The distance i - j is the sum of three: from the start of its chunk to i, from j to the end of its chunk, and the
    chunks between. The gradient of log_decay sums each on its own, because positions in the segment would cancel.
    """
    repeats = weights_q.shape[0] // phi_k.shape[0]
    phi_k, value = repeat_heads(phi_k, repeats), repeat_heads(value, repeats)
    near_q, near_k = weights_q * decay.from_start, phi_k * decay.to_end
    states = scan_states(group_states(near_k, value, plan.states), plan.states, log_step=decay.log_step)
    d_states = group_states(near_q, g, plan.states)
    d_states = scan_states(d_states, plan.states, transposed=True, log_step=decay.log_step)
    d_near_q = apply_states(g, states.transpose(-1, -2), plan.states)
    d_near_k = apply_states(value, d_states.transpose(-1, -2), plan.states)
    dv = apply_states(near_k, d_states, plan.states)
    before, after = (near_q * d_near_q).sum(-1), (near_k * d_near_k).sum(-1)
    between = _CHUNK * decay.log_step.exp() * (states * d_states).sum((1, 2, 3))
    d_decay = (before * decay.places).sum(-1) + (after * (_CHUNK - decay.places)).sum(-1) + between
    d_phi_k = fold_heads(d_near_k * decay.to_end, repeats)
    return d_near_q * decay.from_start, d_phi_k, fold_heads(dv, repeats), d_decay


@dataclass(frozen=True, eq=False)
class Plan:
    """The packed rows, the states to scan, and the chunks whose tokens see only part of them (causal only)."""

    num_tokens: int
    states: StatePlan
    own: StatePlan
    device: torch.device

    def state_size(self, q: Tensor) -> int:
        """Return the number of elements in the states of one head."""
        return self.states.num_slots * q.shape[2] * (q.shape[2] + 1)

    @cached_property
    def places(self) -> Tensor:
        """The position of every token in its chunk `[tokens]` (causal only)."""
        places = np.arange(self.num_tokens)
        for chunks, _ in self.own.groups:
            places[chunks.starts[:, None] + np.arange(chunks.length)] = np.arange(chunks.length)
        with torch.inference_mode(False):
            return torch.from_numpy(places).to(self.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _Decay:
    """The factors of a decay. Each is the exponential of log_decay times a distance >= 0, so none exceeds 1.

    Attributes:
        log_decay: `[heads]`, in the dtype of the computation.
        places: `[tokens]`, the position of every token in its chunk.
    """

    log_decay: Tensor
    places: Tensor

    @property
    def log_step(self) -> Tensor:
        """`[heads]`, log of the decay over a chunk. Only the last chunk of a segment is short, and none follows it."""
        return _CHUNK * self.log_decay

    @cached_property
    def from_start(self) -> Tensor:
        """`[heads, tokens, 1]`, the decay from the start of a query's chunk to the query."""
        return self._over(self.places)[..., None]

    @cached_property
    def to_end(self) -> Tensor:
        """`[heads, tokens, 1]`, the decay from a key to the start of the next chunk."""
        return self._over(_CHUNK - self.places)[..., None]

    def triangle(self, length: int) -> Tensor:
        """`[heads, 1, length, length]`, the decay from the keys to the queries of a chunk; 1 above the diagonal."""
        return self._over(self._distances(length))[:, None]

    def count(self, weights: Tensor) -> Tensor:
        """Multiply `[heads, chunks, length, length]` by the distances and sum to `[heads]`."""
        return (weights.sum(1) * self._distances(weights.shape[-1])).sum((1, 2))

    def _distances(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.places.device)
        return (place[:, None] - place).clamp_(min=0)

    def _over(self, distance: Tensor) -> Tensor:
        """Return the decay `[heads, ...]` over distances; over a distance of 0 it is 1, whatever log_decay is."""
        log_decay = self.log_decay.view(-1, *[1] * distance.ndim)
        return torch.where(distance == 0, 0, log_decay * distance).exp_()


def _cut_decay(plan: Plan, log_decay: Tensor | None, heads: slice, like: Tensor) -> _Decay | None:
    """Return the decay of some heads, if there is one, in the dtype of `like`."""
    return None if log_decay is None else _Decay(log_decay[heads].to(like.dtype), plan.places)


def _head_chunks(plan: Plan, inputs: Inputs) -> list[tuple[slice, slice]]:
    """Return the heads to work on at a time; with a decay, heads that share a key have states of their own."""
    q, k = inputs.q, inputs.k
    shared = 1 if inputs.log_decay is None else q.shape[1] // k.shape[1]
    return head_chunks(q, k, shared * plan.state_size(q))


@remember
def make_plan(geometry: Geometry) -> Plan:
    """Return the plan of a packing on the device of its bounds."""
    bounds, device = geometry.host_cu_seqlens.numpy().astype(np.int64), geometry.cu_seqlens.device
    if not geometry.causal:  # one state per segment, which every token of it reads
        first = np.arange(len(bounds))
        states = plan_states(first, bounds, 0, None, device)
        return Plan(int(bounds[-1]), states, states, device)
    lengths = np.diff(bounds)
    chunks = -(-lengths // _CHUNK)
    first = np.concatenate([[0], np.cumsum(chunks)])
    within = np.arange(first[-1]) - np.repeat(first[:-1], chunks)
    starts = np.repeat(bounds[:-1], chunks) + within * _CHUNK
    groups = np.append(starts, bounds[-1])
    earlier, own = (plan_states(first, groups, offset, None, device) for offset in (1, 0))
    return Plan(int(bounds[-1]), earlier, own, device)
