"""Hybrid attention in PyTorch operations: blocks of equal shape as batches, a few heads at a time.

Near attention runs over ranges of keys, far attention over states of blocks and pairs of rows beside them (see
`far_blocks`), head-major and in at least float32. Segments of a block or two take all their pairs at once, see
`short_segments`. Temporaries stay small, and no mask of all pairs is ever made.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.hybrid_attention import short_segments
from vot_kernels.ops.hybrid_attention.far_blocks import FarBlocks, plan_blocks
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.hybrid_attention.short_segments import ShortSegments, plan_short_segments
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.torch import (
    FarStates,
    add_pairs,
    add_pairs_transposed,
    apply_states,
    far_states,
    far_weight,
    feature_map,
    feature_map_backward,
    group_states,
    join_far,
    log_weight,
    plan_far_states,
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

# Groups of fewer rows on average than _SMALL are joined to blocks of _LEAST_ROWS to _MOST_ROWS rows. Segments of up to
# _SHORT rows that need no states take all pairs at once.
_SMALL = 32
_LEAST_ROWS, _MOST_ROWS = 16, 128
_SHORT = 256


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse `[tokens, heads]`, at least float32."""
    plan, q = _plan(inputs, geometry), inputs.q
    if plan.far is None and plan.views is not None:
        return attend_rows(q, inputs.k, inputs.v, plan.views, options.scale)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
    out[plan.num_tokens :], lse[plan.num_tokens :] = 0, -math.inf
    for heads, kv_heads in plan.head_chunks(inputs):
        part, part_lse = _forward(plan, _cut(inputs, heads, kv_heads), options)
        to_tokens(part, out[:, heads])
        to_tokens(part_lse, lse[:, heads, None], fill=-math.inf)
    short_segments.forward(inputs, plan.short, options, out, lse)
    return out, lse


def forward_step(inputs: Inputs, far: Tensor | None, options: Options) -> Tensor:
    """Output of rows that see all of k and v as near, and `far` [kv_heads, width, head_dim + 1]."""
    q, k, v, beta, q_features, _ = inputs
    query, key, value = (to_heads(x, x.shape[0]) for x in (q, k, v))
    ranges = np.array([[0, q.shape[0], 0, k.shape[0]]])
    out, lse = range_attention(query, key, value, [plan_pass(ranges, False, q.device)], options.scale)
    if far is not None:
        given = None if q_features is None else to_heads(q_features, q.shape[0])
        features = feature_map(query, options.feature_map) if given is None else given
        sums = features @ repeat_heads(far, q.shape[1] // k.shape[1])
        out, _ = join_far(out, lse, sums, log_weight(beta, query))
    rows = q.new_empty(q.shape)
    to_tokens(out, rows)
    return rows


def state_of_group(k: Tensor, v: Tensor, k_features: Tensor | None, name: str) -> Tensor:
    """The sum of phi(k) [v, 1]^T, [kv_heads, width, head_dim + 1], at least float32."""
    tokens = k.shape[0]
    features = feature_map(to_heads(k, tokens), name) if k_features is None else to_heads(k_features, tokens)
    return features.transpose(-1, -2) @ append_column(to_heads(v, tokens), 1.0)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of the inputs that were given."""
    inputs = saved.inputs
    plan = _plan(inputs, geometry)
    if plan.far is None and plan.views is not None and grads.d_lse is None:
        near = attend_rows_backward(grads.d_out, *inputs[:3], saved.out, saved.lse, plan.views, options.scale)
        return Inputs(*near, *(None if x is None else torch.zeros_like(x) for x in inputs[3:]))
    found = _new_gradients(plan, inputs)
    for heads, kv_heads in plan.head_chunks(inputs):
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
    short_segments.backward(saved, grads, plan.short, options, found)
    beta = None if found.beta is None or inputs.beta is None else found.beta.to(inputs.beta.dtype)
    return found._replace(beta=beta)


def _new_gradients(plan: "Plan", inputs: Inputs) -> Inputs:
    """Room for the gradients; that of beta is 0, in a dtype of at least float32, and so are slack rows."""
    q, k, v, _, *features = (None if x is None else x.new_empty(x.shape) for x in inputs)
    assert q is not None and k is not None and v is not None
    for x in (q, k, v, *features):
        if x is not None:
            x[plan.num_tokens :] = 0
    beta = None if inputs.beta is None else q.new_zeros(q.shape[1], dtype=accumulator(q.dtype))
    return Inputs(q, k, v, beta, *features)


def _plan(inputs: Inputs, geometry: Geometry) -> "Plan":
    """The plan of a packing for these tensors; without a far part if its weights are known to be 0."""
    width = row_width(*inputs[:3])
    if not geometry.needs_far(inputs.beta):
        return make_plan(geometry, width)
    features = inputs.q if inputs.q_features is None else inputs.q_features
    repeats = inputs.q.shape[1] // inputs.k.shape[1]
    return make_plan(
        geometry, width, (inputs.q.shape[2], features.shape[2], repeats), _all_weigh(inputs.beta)
    )


def _all_weigh(beta: Tensor | None) -> bool:
    """Whether the far weights of all heads are known not to be 0. Those on a GPU are not read.

    A head without far weight has the bits of near attention, which no other way to compute it has.
    """
    return beta is None or (beta.device.type == "cpu" and bool((beta > -math.inf).all()))


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
        states = far_states(group_states(key_features, append_column(value, 1.0), plan.far), plan.far)
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
        states = far_states(group_states(key_features, values, plan.far), plan.far)
        d_phi_q = apply_states(g, repeat_heads(states, repeats).transpose(-1, -2), plan.far)
        add_pairs(d_phi_q, g, values, key_features, plan.pairs)
        d_phi_q.mul_(weight)
        d_beta = (query_features * d_phi_q).sum((1, 2))
        d_states = fold_heads(group_states(weights_q, g, plan.far), repeats)
        d_states = far_states(d_states, plan.far, transposed=True)
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
        far: states of blocks, None without a far part.
        pairs: far rows beside these blocks, one by one.
        short: segments that are in nothing of the above.
    """

    num_tokens: int
    passes: tuple[RangePass, ...]
    views: RangePass | None
    far: FarStates | None = None
    pairs: RangePass = ()
    short: tuple[ShortSegments, ...] = ()

    @property
    def all_short(self) -> bool:
        return sum(item.rows.num_rows for item in self.short) == self.num_tokens > 0

    def head_chunks(self, inputs: Inputs) -> list[tuple[slice, slice]]:
        """The query heads and key heads to work on at a time, for all but short segments."""
        return [] if self.all_short else head_chunks(inputs.q, inputs.k, self._state_size(inputs))

    def _state_size(self, inputs: Inputs) -> int:
        """Numbers in the far states, and in the weights of pairs, of one key head."""
        if self.far is None:
            return 0
        width = (inputs.q if inputs.q_features is None else inputs.q_features).shape[2]
        weights = max((item.queries.num_rows * item.keys.length for item in self.pairs), default=0)
        repeats = inputs.q.shape[1] // inputs.k.shape[1]
        return self.far.num_slots * width * (inputs.q.shape[2] + 1) + repeats * weights


@remember
def make_plan(
    geometry: Geometry,
    width: int | None = None,
    far: tuple[int, int, int] | None = None,
    all_weigh: bool = False,
) -> Plan:
    """The plan of a packing on the device where its bounds lie, for rows of a `row_width`.

    far: head_dim, the width of features and the query heads that share a key head; None for no far part.
    all_weigh: whether every head has a far part.
    """
    if geometry.causal == "group" and not (geometry.host_cu_groups.diff() > 1).any():
        geometry = geometry._replace(causal="token")  # the same, and without a window a plain triangle
    device, tokens = geometry.cu_seqlens.device, int(geometry.host_cu_seqlens[-1])
    ranges, counts = geometry.near_ranges(), geometry.host_segment_groups.diff().numpy()
    if far is None or not geometry.has_far:
        return Plan(tokens, *_plan_any_near(geometry, ranges, width, device))
    blocks = plan_blocks(geometry, *far)
    alone = _short_segments(geometry, blocks) if all_weigh else np.zeros(0, dtype=np.int64)
    short = plan_short_segments(geometry, ranges, alone, device)
    in_short = np.isin(np.repeat(np.arange(len(counts)), counts), alone)
    others = np.where(in_short[:, None], ranges[:, :1], ranges)  # where short segments have no rows
    near = _plan_any_near(geometry, others, width, device)
    states = plan_far_states(blocks.states, blocks.segments, blocks.sides, blocks.mirrored, device)
    return Plan(tokens, *near, states, _plan_pairs(geometry, blocks, others, device), short)


def _plan_any_near(geometry: Geometry, ranges: np.ndarray, width: int | None, device: torch.device) -> Passes:
    return _plan_own(geometry, ranges, width, device) or Passes(_plan_near(geometry, ranges, device))


def _short_segments(geometry: Geometry, blocks: FarBlocks) -> np.ndarray:
    """Segments of up to _SHORT rows with far pairs, but without states; those without far pairs, too, if no others."""
    low, high = geometry.near_rows()
    reach = np.stack([low, high]) if blocks.reach is None else blocks.reach.numpy()
    lengths = geometry.host_cu_seqlens.diff().numpy()
    segment = np.repeat(np.arange(len(lengths)), lengths)
    has_states, has_pairs = (
        np.bincount(segment, rows, len(lengths)) > 0
        for rows in (blocks.slots.numpy() >= 0, (reach[0] < low) | (high < reach[1]))
    )
    short = (lengths <= _SHORT) & ~has_states
    return np.flatnonzero(short & ((lengths > 0) if short.all() else has_pairs))


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


def _plan_pairs(geometry: Geometry, blocks: FarBlocks, ranges: np.ndarray, device: torch.device) -> RangePass:
    """The far rows that each row takes one by one, for the rows of `ranges`; pieces of blocks share a mask."""
    if blocks.reach is None:
        return ()
    rows, (low, high) = _rows_of(ranges), geometry.near_rows()
    reach_low, reach_high = blocks.reach.numpy().astype(np.int64)
    starts, begins = geometry.host_cu_seqlens.numpy(), np.diff(blocks.slots.numpy(), prepend=-2) != 0
    begins[starts[starts < len(begins)]] = True
    first = np.flatnonzero(begins)
    place = np.arange(len(begins)) - np.repeat(first, np.diff(np.append(first, len(begins))))
    pieces = np.cumsum(place % _MOST_ROWS == 0)
    return plan_limits(rows, reach_low[rows], low[rows], pieces[rows], device) + plan_limits(
        rows, high[rows], reach_high[rows], pieces[rows], device
    )


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
