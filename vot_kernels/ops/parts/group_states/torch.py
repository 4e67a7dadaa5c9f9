"""Linear attention by states: S_g = sum over the tokens of a group of phi(k) [v, 1]^T, summed over far groups.

    F_g = sum of S_g' over g' <= g - left, plus the sum over g' >= g + right, within one segment.

For blocks of groups, whose distances differ, each has bounds of its own in place of left and right. Prefixes and
suffixes are summed, never computed as "all minus near", which would cancel when few groups are far.
Buffers are head-major `[heads, tokens, width]`; states are `[heads, slots, width, head_dim + 1]`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.parts.range_attention.blocks import Blocks, bucket
from vot_kernels.ops.parts.range_attention.torch import (
    RangeBlocks,
    RangePass,
    folded_rows,
    unfolded_rows,
)


@dataclass(frozen=True, eq=False)
class States:
    """The places of the groups that take part.

    Attributes:
        groups: runs of groups of equal length, each with the slots of its states.
        num_slots: total number of states.
    """

    groups: tuple[tuple[Blocks, Tensor], ...]
    num_slots: int


@dataclass(frozen=True, eq=False)
class StatePlan(States):
    """How states are scanned.

    Attributes:
        runs: segments with the same number of groups and the same offsets, side by side.
    """

    runs: tuple["Run", ...]


class Run(NamedTuple):
    """Segments whose states are scanned together.

    Attributes:
        first: slot of their first state.
        segments, groups: how many there are, and how many groups each has.
        left, right: the scan's offsets, None for a side that is not summed.
    """

    first: int
    segments: int
    groups: int
    left: int | None
    right: int | None


def plan_states(
    segment_groups: np.ndarray,
    cu_groups: np.ndarray,
    left: int | np.ndarray | None,
    right: int | np.ndarray | None,
    device: torch.device,
) -> StatePlan:
    """Return the plan for segments given by their first group and groups by their first row.

    Offsets may differ by segment. Segments with too few groups for any scan to reach another group are left out.
    """
    counts = np.diff(segment_groups)
    nowhere = np.iinfo(np.int64).max
    sides = [np.broadcast_to(nowhere if side is None else side, counts.shape) for side in (left, right)]
    segments = np.flatnonzero(counts > np.minimum(*sides))
    slots, runs, filled = [], [], 0
    for rows in bucket(np.stack([counts, *sides], 1)[segments]):
        members = segments[rows]
        per_segment, *offsets = (int(x[members[0]]) for x in (counts, *sides))
        runs.append(Run(filled, len(members), per_segment, *(None if x == nowhere else x for x in offsets)))
        slots.append((segment_groups[members][:, None] + np.arange(per_segment)).reshape(-1))
        filled += len(members) * per_segment
    order = np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64)
    return StatePlan(_alike(cu_groups[order], cu_groups[order + 1], device), filled, tuple(runs))


def _alike(begin: np.ndarray, end: np.ndarray, device: torch.device) -> tuple[tuple[Blocks, Tensor], ...]:
    """Groups of equal length together; their slots are the places in `begin`."""
    groups = []
    for slots in bucket((end - begin)[:, None]):
        slots = slots[np.argsort(begin[slots], kind="stable")]
        if length := int(end[slots[0]] - begin[slots[0]]):
            blocks = Blocks(begin[slots], length, device)
            groups.append((blocks, torch.from_numpy(slots).to(device, non_blocking=True)))
    return tuple(groups)


Sides = tuple[Tensor | None, Tensor | None]


class FarRun(NamedTuple):
    """Segments with the same number of states.

    Attributes:
        first: slot of their first state.
        segments, states: how many there are, and how many states each has.
        sides: for each state how many are far before it and how many after it, counted from either end of its
            segment, plus (states + 1) times the number of the segment; None for a side without any.
        mirrored: the same with the states that are far of which it is.
    """

    first: int
    segments: int
    states: int
    sides: Sides
    mirrored: Sides


@dataclass(frozen=True, eq=False)
class FarStates(States):
    """Which states of blocks are far from which; `runs` are side by side."""

    runs: tuple[FarRun, ...]


def plan_far_states(
    states: Tensor, segments: Tensor, sides: Sides, mirrored: Sides, device: torch.device
) -> FarStates:
    """Return the plan for states as `FarBlocks` describes them."""
    bounds, begin, end = segments.numpy().astype(np.int64), *states.numpy().astype(np.int64)
    counts, order, runs, filled = np.diff(bounds), [np.zeros(0, dtype=np.int64)], [], 0
    for members in bucket(counts[:, None]):
        each = int(counts[members[0]])
        here = (bounds[members][:, None] + np.arange(each)).reshape(-1)
        place = np.repeat(np.arange(len(members)) * (each + 1), each)
        first = np.repeat(bounds[members], each)
        counts_of = [
            _counts(ends, here, place - first, place + first + each, device) for ends in (sides, mirrored)
        ]
        runs.append(FarRun(filled, len(members), each, *counts_of))
        order.append(here)
        filled += len(here)
    slots = np.concatenate(order)
    return FarStates(_alike(begin[slots], end[slots], device), filled, tuple(runs))


def _counts(ends: Sides, here: np.ndarray, low: np.ndarray, high: np.ndarray, device: torch.device) -> Sides:
    """Where the states `here` end before and begin after, as distances from the ends of their segment."""
    before, after = (None if side is None else side.numpy()[here].astype(np.int64) for side in ends)
    return (
        None if before is None else torch.from_numpy(before + low).to(device),
        None if after is None else torch.from_numpy(high - after).to(device),
    )


def far_states(states: Tensor, plan: FarStates, *, transposed: bool = False) -> Tensor:
    """Return for each slot the sum of the states far from it; transposed, of those from which it is far."""
    sums = torch.zeros_like(states)
    for first, segments, count, sides, mirrored in plan.runs:
        here = slice(first, first + segments * count)
        source = states[:, here].unflatten(1, (segments, count))
        before, after = mirrored if transposed else sides
        if before is not None:
            sums[:, here] += _sums_of_first(source).index_select(1, before)
        if after is not None:
            sums[:, here] += _sums_of_first(source.flip(2)).index_select(1, after)
    return sums


def _sums_of_first(x: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, … of the states of `[heads, segments, states, …]`, those of all segments."""
    return torch.nn.functional.pad(x.cumsum(2), (0, 0, 0, 0, 1, 0)).flatten(1, 2)


def group_states(features: Tensor, values: Tensor, plan: States) -> Tensor:
    """Return S_g of features `[heads, tokens, width]` and values `[heads, tokens, e]`, one state per slot."""
    shape = (features.shape[0], plan.num_slots, features.shape[2], values.shape[2])
    states = features.new_zeros(shape)
    for blocks, slots in plan.groups:
        states[:, slots] = blocks.take(features).transpose(-1, -2) @ blocks.take(values)
    return states


def scan_states(
    states: Tensor, plan: StatePlan, *, transposed: bool = False, log_step: Tensor | None = None
) -> Tensor:
    """Return F_g of every slot; transposed, the gradient of S_g from that of F_g.

    log_step: `[heads]`, log of the factor by which a state shrinks from one group to the next; None means 0.
    """
    scanned = torch.zeros_like(states)
    for first, segments, groups, *sides in plan.runs:
        left, right = reversed(sides) if transposed else sides
        here = slice(first, first + segments * groups)
        source = states[:, here].unflatten(1, (segments, groups))
        target = scanned[:, here].unflatten(1, (segments, groups))
        if left is not None and left < groups:
            target[:, :, left:] += _running_sum(source[:, :, : groups - left], log_step)
        if right is not None and right < groups:
            target[:, :, : groups - right] += _running_sum(source[:, :, right:].flip(2), log_step).flip(2)
    return scanned


def _running_sum(x: Tensor, log_step: Tensor | None) -> Tensor:
    """Compute y_g = x_g + exp(log_step) y_(g-1) over dimension 2 of `[heads, segments, groups, ...]`.

    After the step of width w, every y is the sum of its last 2 w terms, so the number of steps is logarithmic. The
    factor of each step is exp(w log_step) itself, not a product of rounded factors.
    """
    if log_step is None:
        return x.cumsum(2)
    total, width = x.clone(), 1
    while width < x.shape[2]:
        factor = (width * log_step).exp()[:, None, None, None, None]
        total[:, :, width:] += factor * total[:, :, :-width]
        width *= 2
    return total


def apply_states(features: Tensor, states: Tensor, plan: States) -> Tensor:
    """Return features_i F_g(i) `[heads, tokens, e]`; rows outside the plan are 0."""
    heads, tokens, _ = features.shape
    if len(plan.groups) == 1 and plan.groups[0][0].num_rows == tokens:
        blocks, slots = plan.groups[0]
        return (blocks.take(features) @ states[:, slots]).flatten(1, 2)
    out = features.new_zeros(heads, tokens, states.shape[3])
    for blocks, slots in plan.groups:
        blocks.put(out, blocks.take(features) @ states[:, slots])
    return out


def add_pairs(out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, pairs: RangePass) -> None:
    """Add sum_j (queries_i keys_j) values_j to out_i over `pairs` of rows: `[heads, …]`, `[kv_heads, …]`."""
    for item in pairs:
        weights = _pair_weights(item, queries, keys)
        item.queries.add(
            out, unfolded_rows(weights @ item.keys.take(values).transpose(0, 1), item, out.shape[0])
        )


def add_pairs_transposed(
    out: Tensor, queries: Tensor, keys: Tensor, others: Tensor, pairs: RangePass
) -> None:
    """Add sum_i (queries_i keys_j) others_i to out_j: `add_pairs` transposed, over all heads that share a key."""
    for item in pairs:
        weights = _pair_weights(item, queries, keys).transpose(-1, -2)
        item.keys.add(out, (weights @ folded_rows(item, others, out.shape[0])).transpose(0, 1))


def _pair_weights(item: RangeBlocks, queries: Tensor, keys: Tensor) -> Tensor:
    """Return `[runs, kv_heads, repeats * rows, keys]`, 0 for a pair that does not count."""
    rows = folded_rows(item, queries, keys.shape[0])
    weights = rows @ item.keys.take(keys).permute(1, 0, 3, 2)
    hidden = item.hidden(queries.shape[0] // keys.shape[0])
    return weights if hidden is None else weights.masked_fill_(hidden, 0)


def feature_map(x: Tensor, name: str) -> Tensor:
    """Return phi(x) >= 0 over the last dimension: "softmax", "elu" (elu + 1) or "relu"."""
    if name == "softmax":
        return x.softmax(-1)
    if name == "elu":  # exp(x) for x < 0, because (exp(x) - 1) + 1 loses digits
        return x.clamp(max=0).exp_().add_(x.relu())
    return x.relu()


def feature_map_backward(x: Tensor, features: Tensor, d_features: Tensor, name: str) -> Tensor:
    """Return the gradient of x, given features = phi(x) and their gradient."""
    if name == "softmax":
        return torch.ops.aten._softmax_backward_data(d_features, features, -1, features.dtype)
    if name == "elu":  # elu(x) + 1 is its own derivative for x < 0
        return d_features * features.clamp(max=1)
    return d_features * (x > 0)


def log_weight(beta: Tensor | None, query: Tensor) -> Tensor:
    """Return beta as `[heads, 1, 1]` in the dtype of the computation."""
    values = query.new_zeros(query.shape[0]) if beta is None else beta.to(query.dtype)
    return values[:, None, None]


def far_weight(beta: Tensor, lse: Tensor) -> Tensor:
    """Return exp(beta - lse), bounded so that its product with an absent far part is 0 and not NaN."""
    limit = math.log(torch.finfo(lse.dtype).max) - 8
    exponent = beta - lse
    # What the rounding of the difference left out (Knuth's two-sum), which matters where beta is large.
    moved = exponent - beta
    rest = ((beta - (exponent - moved)) - (lse + moved)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return exponent.clamp_(max=limit).exp_().mul_(rest.add_(1))


def join_far(out: Tensor, lse: Tensor, sums: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Join the near result and the far sums [numerator, normaliser] under one normaliser. This overwrites `out`."""
    joint = torch.logaddexp(lse, beta + sums[..., -1:].log())
    near, far = (lse - joint).exp_(), far_weight(beta, joint)
    # 1 up to the rounding of lse, which the gradients could not tolerate in do.o
    total = near + far * sums[..., -1:]
    out = out.mul_(near.div_(total)).addcmul_(sums[..., :-1], far.div_(total))
    return out, joint
