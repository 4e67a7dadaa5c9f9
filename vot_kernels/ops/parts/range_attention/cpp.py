"""Range attention on the C++ kernels, see `csrc/kernels/range_attention.h`: plans of packings, and the calls.

Tensors `[tokens, heads, head_dim]` are read where they lie, if their columns lie side by side.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.launch import contiguous, rows_contiguous
from vot_kernels.ops.parts.group_states.cpp import FEATURE_MAPS
from vot_kernels.ops.parts.plans import remember
from vot_kernels.ops.parts.range_attention.triton import KeyRanges

_MOST_ROWS = 768  # (row, head) pairs of a task: as many share the work of arranging a block of keys
_LEAST_ROWS = 192  # where there are too few tasks for the threads
_PART_KEYS, _MOST_PARTS = 1024, 8  # a long segment's keys are dealt out in parts, each with a dq of its own
_KEY_BLOCK = 128
_SUMMED_ROWS = 256  # of a task that adds parts


@dataclass(frozen=True, eq=False)
class Plan:
    """What the rows of a packing see, and the tasks of the kernels; tasks are int32, as their structs have them.

    Attributes:
        rows, keys: packed; later ones are slack.
        ranges: int32 `[2, rows]`, first key of each row and one past the last.
        row_tasks, key_tasks, sum_tasks: of the forward and the first step of the backward, of its second and last step.
        parts: buffers of dq that the second step of the backward fills.
        complete: every row sees or reaches a key.
    """

    rows: int
    keys: int
    ranges: Tensor
    row_tasks: Tensor
    key_tasks: Tensor
    sum_tasks: Tensor
    parts: int
    complete: bool


@dataclass(frozen=True, eq=False)
class FarPart:
    """Linear attention of rows to far groups, or of keys to the gradients of such rows.

    Attributes:
        states: as `group_states.cpp.far_states` returns them, None without any.
        slots: int32 `[tokens]`, the state of each row, or key; -1 for none.
        features: `[tokens, heads, width]`: q or k, or given features.
        others: the same of the other side, which pairs need.
        feature_map: what to apply to them, a name of `FEATURE_MAPS`.
        reach: int32 `[2, rows]`, the keys around the near ones that each row sees as far, one by one; None if none.
        beta: `[heads]`, log of the weight of far tokens; None is 0.
    """

    states: Tensor | None
    slots: Tensor
    features: Tensor
    others: Tensor
    feature_map: str
    reach: Tensor | None = None
    beta: Tensor | None = None


def plan_ranges(ranges: KeyRanges, heads: int, kv_heads: int) -> Plan:
    """The plan of a packing, made once for all layers of a model."""
    fields = (ranges.cu_rows, ranges.cu_keys, ranges.row_groups, ranges.key_groups, ranges.segment_groups)
    sides = (ranges.left, ranges.right, ranges.tokens_left, ranges.tokens_right)
    return _plan_once(*fields, *sides, heads, kv_heads, torch.get_num_threads())


@remember
def _plan_once(*arguments: Any) -> Plan:
    *ranges, heads, kv_heads, threads = arguments
    bounds = RangeBounds.of(KeyRanges(*ranges))
    return make_plan(bounds, bounds.near, heads, kv_heads, threads)


def range_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    far: FarPart | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Output in `dtype`, by default that of q, and lse float32 `[rows, heads]`.

    Rows that see nothing get 0 and -inf.
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    kernels().range_attention_forward(
        q, k, v, plan.ranges, plan.row_tasks, scale, *_far(far), *_pairs(far), _beta(far), out, lse
    )
    if plan.rows < q.shape[0]:
        out[plan.rows :].zero_()
        lse[plan.rows :].fill_(-math.inf)
    return out, lse


@dataclass(frozen=True, eq=False)
class RowGradients:
    """What the first step of the backward finds for each row.

    Attributes:
        delta: float32 `[rows, heads]`, d_out.out - d_lse.
        dq: float32 `[rows, heads, head_dim]`, its part through the feature map; None without one.
        far_weight: float32 `[rows, heads]`, exp(beta - lse); None without a far part.
        d_beta: float32 `[rows, heads]`, to be summed over the rows; None without a far part.
        d_features: gradient of given features, else None; float32 where pairs have a share in it.
    """

    delta: Tensor
    dq: Tensor | None = None
    far_weight: Tensor | None = None
    d_beta: Tensor | None = None
    d_features: Tensor | None = None


def range_attention_rows_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kv_heads: int,
    plan: Plan,
    far: FarPart | None = None,
) -> RowGradients:
    """The first step of the backward; `far` is that of the forward. Slack rows are 0."""
    d_out, out = rows_contiguous(d_out), rows_contiguous(out)
    found = RowGradients(_new_rows(lse, plan.rows))
    if far is not None:
        given = far.feature_map == "none"
        dtype = None if given and far.reach is None else torch.float32
        gradient = _new_rows(far.features, plan.rows, dtype)
        found = RowGradients(
            found.delta,
            None if given else gradient,
            _new_rows(lse, plan.rows),
            _new_rows(lse, plan.rows),
            gradient if given else None,
        )
    kernels().range_attention_rows_backward(
        d_out,
        contiguous(d_lse, torch.float32),
        out,
        lse.contiguous(),
        kv_heads,
        plan.row_tasks,
        *_far(far),
        _beta(far),
        found.delta,
        found.far_weight,
        found.d_beta,
        found.dq if found.d_features is None else found.d_features,
    )
    return found


class KeyGradients(NamedTuple):
    """The gradients of `q`, `k`, `v`, beta `[heads]` and given features; None for what was not given."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_beta: Tensor | None
    d_q_features: Tensor | None
    d_k_features: Tensor | None


def range_attention_keys_backward(
    d_out: Tensor,
    lse: Tensor,
    found: RowGradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    far: FarPart | None = None,
) -> KeyGradients:
    """The other steps. Gradients are 0 in slack rows.

    found: what the first step found. far: the key side: for each block the gradient states of the blocks far from
    which it is, and the features of k.
    """
    d_out, q, k, v = (rows_contiguous(x) for x in (d_out, q, k, v))
    dk, dv = _new_rows(k, plan.keys), _new_rows(v, plan.keys)
    given = far is not None and far.feature_map == "none"
    d_features = _new_rows(far.features, plan.keys) if far is not None and given else None
    at_once = plan.parts == 1 and q.dtype == torch.float32
    if not at_once:
        sums = _part_buffers(q, plan)
    elif found.dq is not None:
        sums = found.dq
    else:
        sums = (
            _new_rows(q, plan.rows)
            if plan.complete
            else torch.zeros_like(q, memory_format=torch.contiguous_format)
        )
    pairs = far if far is not None and far.reach is not None else None
    buffers = None if pairs is None or not given else _part_buffers(pairs.others, plan)
    d_beta = None if pairs is None or pairs.beta is None else lse.new_zeros(plan.parts, *lse.shape)
    kernels().range_attention_keys_backward(
        d_out,
        lse.contiguous(),
        found.delta,
        q,
        k,
        v,
        plan.ranges,
        plan.key_tasks,
        scale,
        found.dq if at_once else None,
        *_far(far),
        *_pairs(far),
        found.far_weight,
        sums,
        dk,
        dv,
        d_features,
        d_beta,
        buffers,
    )
    dq = sums if at_once else _sum_parts(found.dq, sums, q, plan)
    d_row_features = found.d_features
    if pairs is not None and buffers is not None:
        d_row_features = _sum_parts(found.d_features, buffers, pairs.others, plan)
    d_beta = _sum_beta(found.d_beta, d_beta)
    return KeyGradients(dq, dk, dv, d_beta, d_row_features, d_features)


def _part_buffers(x: Tensor, plan: Plan) -> Tensor:
    return x.new_empty(plan.parts, *x.shape, dtype=torch.float32)


def _sum_parts(begun: Tensor | None, parts: Tensor, like: Tensor, plan: Plan) -> Tensor:
    total = _new_rows(like, plan.rows)
    kernels().range_attention_sum_parts(begun, parts, plan.sum_tasks, total)
    return total


def _sum_beta(of_states: Tensor | None, of_pairs: Tensor | None) -> Tensor | None:
    if of_states is None or of_pairs is None:
        return None if of_states is None else of_states.sum(0)
    return of_states.sum(0) + of_pairs.sum((0, 1))


def range_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv without a far part."""
    found = range_attention_rows_backward(d_out, d_lse, out, lse, k.shape[1], plan)
    gradients = range_attention_keys_backward(d_out, lse, found, q, k, v, plan, scale)
    return gradients.dq, gradients.dk, gradients.dv


def _new_rows(like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, uninitialized but for the slack from `rows` on, which is 0."""
    new = like.new_empty(like.shape, dtype=dtype)
    if rows < like.shape[0]:
        new[rows:].zero_()
    return new


def _far(far: FarPart | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    if far is None:
        return None, None, None, 0
    return far.states, far.slots, far.features, FEATURE_MAPS[far.feature_map]


def _pairs(far: FarPart | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if far is None or far.reach is None else (far.reach, far.others)


def _beta(far: FarPart | None) -> Tensor | None:
    return None if far is None else contiguous(far.beta, torch.float32)


class RangeBounds(NamedTuple):
    """Cumulative lengths of the segments of rows and of keys, and `[2, rows]` the near keys of each row."""

    rows: np.ndarray
    keys: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, ranges: KeyRanges) -> "RangeBounds":
        groups = _Groups.of(_bounds(ranges.row_groups), _bounds(ranges.key_groups), ranges.segment_groups)
        near = groups.key_ranges(ranges.left, ranges.right, ranges.tokens_left, ranges.tokens_right)
        return cls(_bounds(ranges.cu_rows), _bounds(ranges.cu_keys), np.stack(near))


def make_plan(bounds: RangeBounds, reach: np.ndarray, heads: int, kv_heads: int, threads: int) -> Plan:
    """The plan of rows that reach the keys `[2, rows]`, the near ones among them."""
    rows, keys, near = bounds
    low, high = reach
    pairs = rows[-1] * heads // (4 * threads) if threads > 1 else _MOST_ROWS
    at_once = int(np.clip(pairs, _LEAST_ROWS, _MOST_ROWS)) * kv_heads // heads
    pieces = _pieces(rows, low, high)
    owner, begin, end = _cut(pieces, -(-np.diff(pieces) // max(1, at_once)))
    row_tasks = np.stack([begin, end, low[pieces[owner]]], axis=1)
    counts = np.clip(-(-np.diff(keys) // _PART_KEYS), 1, _MOST_PARTS)
    owner, begin, end = _cut(keys, counts, _KEY_BLOCK)
    part = np.arange(len(owner)) - np.searchsorted(owner, owner)
    key_tasks = np.stack([begin, end, rows[owner], rows[owner + 1], part], axis=1)
    return Plan(
        int(rows[-1]),
        int(keys[-1]),
        _int32(near),
        _int32(row_tasks),
        _int32(key_tasks),
        _int32(_sum_tasks(rows, low, high, begin, part)),
        int(counts.max(initial=1)),
        bool((low < high).all()),
    )


def _pieces(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Bounds of the segments of rows, and of their parts that see no key in common.

    What rows see decides them alone. So a row has the same bits in any op that shows it, and those that see keys with
    it, the same keys: groups that see no other one are as good as segments.
    """
    apart = (low[1:] >= high[:-1]) & (high[:-1] > low[:-1])
    return np.union1d(rows, 1 + np.flatnonzero(apart))


def _cut(bounds: np.ndarray, counts: np.ndarray, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments in `counts` pieces, multiples of `step` long: owners, begins and ends of those that are not empty."""
    lengths = np.diff(bounds)
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    size = -(-lengths // (np.maximum(counts, 1) * step)) * step
    begin = bounds[owner] + np.minimum(place * size[owner], lengths[owner])
    end = np.minimum(begin + size[owner], bounds[owner + 1])
    some = begin < end
    return owner[some], begin[some], end[some]


def _sum_tasks(
    rows: np.ndarray, low: np.ndarray, high: np.ndarray, key_begin: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """Runs of rows that the same parts of keys have a share of dq for."""
    first = np.searchsorted(key_begin, low, side="right") - 1
    last = np.searchsorted(key_begin, high - 1, side="right") - 1
    shares = (
        np.where(low < high, [part[first], part[last] + 1], 0) if len(part) else np.zeros((2, len(low)), int)
    )
    new = (np.diff(shares, axis=1, prepend=-1) != 0).any(0)
    new[::_SUMMED_ROWS] = True
    begin = np.flatnonzero(new)
    return np.stack([begin, np.append(begin, rows[-1])[1:], *shares[:, begin]], axis=1).reshape(-1, 4)


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of rows and of keys, on the host.

    Attributes:
        row_bounds, key_bounds: cumulative lengths.
        first, end: the first group of each group's segment, and one past the last.
    """

    row_bounds: np.ndarray
    key_bounds: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, row_bounds: np.ndarray, key_bounds: np.ndarray, segment_groups: Tensor | None) -> "_Groups":
        groups = len(row_bounds) - 1
        bounds = np.arange(groups + 1) if segment_groups is None else _bounds(segment_groups)
        counts = np.diff(bounds)
        return cls(row_bounds, key_bounds, np.repeat(bounds[:-1], counts), np.repeat(bounds[1:], counts))

    @property
    def rows(self) -> np.ndarray:
        """Of each group, how many."""
        return np.diff(self.row_bounds)

    @property
    def keys(self) -> np.ndarray:
        """Of each group, how many."""
        return np.diff(self.key_bounds)

    def key_ranges(
        self, left: int | None, right: int | None, tokens_left: int | None, tokens_right: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """First key of each row, and one past the last: `KeyRanges` says what the sides are."""
        group = np.arange(len(self.first))
        behind = group - self.first if left is None else np.minimum(left, group - self.first)
        ahead = self.end - 1 - group if right is None else np.minimum(right, self.end - 1 - group)
        offset = self.key_bounds[self.end] - self.row_bounds[self.end]
        begin, end, offset = (
            np.repeat(x, self.rows)
            for x in (self.key_bounds[group - behind], self.key_bounds[group + 1 + ahead], offset)
        )
        counterpart = np.arange(len(begin)) + offset
        low = begin if tokens_left is None else np.clip(counterpart - tokens_left, begin, end)
        high = end if tokens_right is None else np.clip(counterpart + tokens_right + 1, low, end)
        return low, high


def _bounds(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64)


def _int32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))
