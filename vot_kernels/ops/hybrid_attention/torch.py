"""Hybrid attention in PyTorch operations: blocks of equal shape as batches, a few heads at a time.

Near attention runs over ranges of keys, far attention over states of groups (see `parts`), head-major and in at
least float32. Temporaries stay small, and no mask of all pairs is ever made.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.torch import (
    StatePlan,
    add_pairs,
    add_pairs_transposed,
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
from vot_kernels.ops.parts.range_attention.segments import Passes, plan_segments, row_width
from vot_kernels.ops.parts.range_attention.torch import (
    RangePass,
    attend_rows,
    attend_rows_backward,
    join_ranges,
    plan_limits,
    plan_pass,
    range_attention,
    range_attention_backward,
)

# Groups of fewer rows on average than _SMALL are joined to blocks of _LEAST_ROWS to _MOST_ROWS rows; those of up to
# _TINY rows share states of about _STATE_ROWS rows.
_SMALL = 32
_LEAST_ROWS, _MOST_ROWS = 16, 128
_TINY, _STATE_ROWS = 8, 64


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse `[tokens, heads]`, at least float32."""
    plan, q = _plan(inputs, geometry), inputs.q
    if plan.far is None and plan.views is not None:
        return attend_rows(q, inputs.k, inputs.v, plan.views, options.scale)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
    for heads, kv_heads in head_chunks(q, inputs.k, plan.state_size(inputs)):
        part, part_lse = _forward(plan, _cut(inputs, heads, kv_heads), options)
        to_tokens(part, out[:, heads])
        to_tokens(part_lse, lse[:, heads, None], fill=-math.inf)
    return out, lse


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of the inputs that were given."""
    inputs = saved.inputs
    plan = _plan(inputs, geometry)
    if plan.far is None and plan.views is not None and grads.d_lse is None:
        near = attend_rows_backward(grads.d_out, *inputs[:3], saved.out, saved.lse, plan.views, options.scale)
        return Inputs(*near, *(None if x is None else torch.zeros_like(x) for x in inputs[3:]))
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


def _plan(inputs: Inputs, geometry: Geometry) -> "Plan":
    """The plan of a packing for these tensors; without a far part if its weights are known to be 0."""
    plan = make_plan(geometry, row_width(*inputs[:3]))
    return plan if geometry.needs_far(inputs.beta) else replace(plan, far=None, pairs=())


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
        add_pairs(sums, query_features, key_features, append_column(value, 1.0), plan.pairs)
        out, lse = join_far(out, lse, sums, log_weight(inputs.beta, query))
    return out, lse


def _backward(plan: "Plan", saved: Saved, grads: Grads, options: Options) -> tuple[Tensor | None, ...]:
    """Head-major gradients of some heads; those of beta and the features are None without a far part."""
    tokens, inputs = plan.num_tokens, saved.inputs
    query, key, value = (to_heads(x, tokens) for x in (inputs.q, inputs.k, inputs.v))
    out, d_out, joint = (to_heads(x, tokens) for x in (saved.out, grads.d_out, saved.lse[..., None]))
    d_lse = None if grads.d_lse is None else to_heads(grads.d_lse[..., None], tokens)
    if plan.far is not None and saved.out.dtype != out.dtype:
        # do.(v - o) cancels, and a far weight may exceed 1 by much: then the rounding of o would be all of it.
        out, _ = _forward(plan, inputs, options)
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
        d_phi_q = apply_states(g, repeat_heads(states, repeats).transpose(-1, -2), plan.far)
        add_pairs(d_phi_q, g, values, key_features, plan.pairs)
        d_phi_q.mul_(weight)
        d_beta = (query_features * d_phi_q).sum((1, 2))
        d_states = fold_heads(group_states(weights_q, g, plan.far), repeats)
        d_states = scan_states(d_states, plan.far, transposed=True)
        d_phi_k = apply_states(values, d_states.transpose(-1, -2), plan.far)
        d_values = apply_states(key_features, d_states, plan.far)
        add_pairs_transposed(d_phi_k, g, values, weights_q, plan.pairs)
        add_pairs_transposed(d_values, weights_q, key_features, g, plan.pairs)
        dv += d_values[..., :-1]
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
        passes: near ranges, each pass with at most one key range per query. Where near attention is exact attention
            of some segments they are what that has, so that a far weight of 0 gives the same bits.
        views: see `Passes`; for plans without a far part.
        far: states of the far groups and their scan, None if no group has any. Small groups share a state.
        pairs: far rows that a shared state leaves out, since some of its groups are near, or too many of another
            group's: taken one by one.
    """

    num_tokens: int
    passes: tuple[RangePass, ...]
    views: RangePass | None
    far: StatePlan | None
    pairs: RangePass = ()

    def state_size(self, inputs: Inputs) -> int:
        """Numbers in the far states, and in the weights of pairs, of one key head."""
        if self.far is None:
            return 0
        width = (inputs.q if inputs.q_features is None else inputs.q_features).shape[2]
        weights = max((item.queries.num_rows * item.keys.length for item in self.pairs), default=0)
        repeats = inputs.q.shape[1] // inputs.k.shape[1]
        return self.far.num_slots * width * (inputs.q.shape[2] + 1) + repeats * weights


@remember
def make_plan(geometry: Geometry, width: int | None = None) -> Plan:
    """The plan of a packing on the device where its bounds lie, for rows of a `row_width`."""
    if geometry.causal == "group" and not (geometry.host_cu_groups.diff() > 1).any():
        geometry = geometry._replace(causal="token")  # the same, and without a window a plain triangle
    device, ranges = geometry.cu_seqlens.device, geometry.near_ranges()
    far, pairs = _plan_far(geometry, ranges, device) if geometry.has_far else (None, ())
    near = _plan_own(geometry, ranges, width, device) or Passes(_plan_near(geometry, ranges, device))
    return Plan(int(geometry.host_cu_seqlens[-1]), *near, far, pairs)


def _plan_own(
    geometry: Geometry, ranges: np.ndarray, width: int | None, device: torch.device
) -> Passes | None:
    """The plan of exact attention where it comes to that: rows see the rows among which they lie, and no others."""
    token = geometry.causal == "token"
    own = ranges[ranges[:, 1] > ranges[:, 0]]
    own = own if token else join_ranges(own)
    if (own[:, :2] != own[:, 2:]).any():
        return None
    return plan_segments(own, None, 0 if token else None, width, device)


def _plan_near(geometry: Geometry, ranges: np.ndarray, device: torch.device) -> tuple[RangePass, ...]:
    """Passes over the near ranges. Small groups are joined to blocks of rows that each see a range of their own."""
    token = geometry.causal == "token"
    earlier: RangePass = ()
    sizes = _Sizes.of(geometry, ranges)
    most = np.clip(sizes.mean_keys / 2, _LEAST_ROWS, _MOST_ROWS)
    most = np.where(sizes.mean_rows * sizes.counts <= _MOST_ROWS, _MOST_ROWS, most)
    at_once = np.where(sizes.mean_rows < _SMALL, np.maximum(1, most // sizes.mean_rows), 1)
    large = sizes.rows > _SMALL
    new = (sizes.place % at_once[sizes.segment] == 0) | large | np.append(False, large[:-1])
    owner = np.cumsum(new) - 1
    shared = np.bincount(owner)[owner] > 1 if len(owner) else new
    rows = _rows_of(ranges[shared])
    low, high, owners = (
        np.repeat(x, sizes.rows[shared]) for x in (ranges[shared, 2], ranges[shared, 3], owner[shared])
    )
    if geometry.causal and geometry.left is None and len(rows):  # no mask for what lies before a block
        first = np.flatnonzero(np.diff(owners, prepend=-1))
        begin, end = rows[first], rows[np.append(first[1:], len(rows)) - 1] + 1
        earlier = plan_pass(np.stack([begin, end, low[first], begin], axis=1), False, device)
        low = np.repeat(begin, np.diff(np.append(first, len(rows))))
    joined, ranges = plan_limits(rows, low, rows + 1 if token else high, owners, device), ranges[~shared]
    if token:  # the own group with a triangle, then whole groups before it
        begin, end, key_begin, _ = ranges.T
        own = plan_pass(np.stack([begin, end, begin, end], axis=1), True, device)
        before = plan_pass(np.stack([begin, end, key_begin, begin], axis=1), False, device)
        passes = [joined + own, before]
    else:
        passes = [joined + plan_pass(ranges, False, device), earlier]
    return tuple(blocks for blocks in passes if blocks)


def _plan_far(
    geometry: Geometry, ranges: np.ndarray, device: torch.device
) -> tuple[StatePlan | None, RangePass]:
    """States of far groups, and the pairs of rows that they leave out.

    With m groups to a state, a window of w groups ends within the ceil(w / m) states before or after a row's own: the
    scan begins beyond them, and what is far in them, and in the own, makes the pairs.
    """
    sizes = _Sizes.of(geometry, ranges)
    shared = np.rint(_STATE_ROWS / sizes.mean_rows)
    few = sizes.counts <= 3 * shared  # of states: rather none
    shared = np.where(few, np.maximum(1, sizes.counts), shared)
    at_once = np.where(sizes.mean_rows <= _TINY, shared, 1).astype(np.int64)
    counts = -(-sizes.counts // at_once)
    first = np.concatenate([[0], np.cumsum(counts)])
    state = first[sizes.segment] + sizes.place // at_once[sizes.segment]
    groups = geometry.host_cu_groups.numpy().astype(np.int64)
    bounds = np.append(groups[:-1][np.diff(state, prepend=-1) > 0], groups[-1])
    behind, ahead = (None if lag is None else 1 - (1 - lag) // at_once for lag in geometry.lags)
    far = plan_states(first, bounds, behind, ahead, device)
    some = at_once[sizes.segment] > 1
    rows, begin, end, owner, segment = (
        _rows_of(ranges[some]),
        *(np.repeat(x[some], sizes.rows[some]) for x in (ranges[:, 2], ranges[:, 3], state, sizes.segment)),
    )
    pieces = owner * (len(rows) + 1) + (rows - bounds[owner]) // _MOST_ROWS
    pairs: RangePass = ()
    if behind is not None and ahead is not None:  # of a segment that is one state both sides at once
        alone = counts[segment] == 1
        within = bounds[first[segment[alone]]], bounds[first[segment[alone]] + 1]
        pairs += plan_limits(rows[alone], begin[alone], end[alone], pieces[alone], device, within)
        rows, begin, end, owner, segment, pieces = (
            x[~alone] for x in (rows, begin, end, owner, segment, pieces)
        )
    if behind is not None:
        start = np.maximum(owner - behind[segment] + 1, first[segment])
        pairs += plan_limits(rows, bounds[start], begin, pieces, device)
    if ahead is not None:
        stop = np.minimum(owner + ahead[segment], first[segment + 1])
        pairs += plan_limits(rows, end, bounds[stop], pieces, device)
    return (far, pairs) if far.groups or pairs else (None, ())


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Groups in numbers: rows, segment and place in it of each; of each segment how many, and means over them."""

    rows: np.ndarray
    segment: np.ndarray
    place: np.ndarray
    counts: np.ndarray
    mean_rows: np.ndarray
    mean_keys: np.ndarray

    @classmethod
    def of(cls, geometry: Geometry, ranges: np.ndarray) -> "_Sizes":
        first = geometry.host_segment_groups.numpy().astype(np.int64)
        counts = np.diff(first)
        segment = np.repeat(np.arange(len(counts)), counts)
        rows, keys = ranges[:, 1] - ranges[:, 0], ranges[:, 3] - ranges[:, 2]
        mean_rows, mean_keys = (
            np.maximum(1, np.bincount(segment, x, len(counts)) / np.maximum(counts, 1)) for x in (rows, keys)
        )
        return cls(rows, segment, np.arange(len(rows)) - first[segment], counts, mean_rows, mean_keys)


def _rows_of(ranges: np.ndarray) -> np.ndarray:
    """Rows of ranges, one after the other."""
    lengths = ranges[:, 1] - ranges[:, 0]
    return np.arange(lengths.sum()) + np.repeat(ranges[:, 0] - (np.cumsum(lengths) - lengths), lengths)
