"""How C++ and PyTorch compute far attention: states of blocks of groups, and pairs of rows beside these blocks.

A state stands for all keys of its block, but it is a matrix: one for each group of a few rows would be far larger than
the rows. So small groups are joined to blocks. The far keys that lie in the own block, or in one that is partly near,
are taken one by one. A short segment needs no states at all.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.hybrid_attention.geometry import Geometry

_BLOCK_ROWS = (
    64,
    128,
)  # about how many rows a block may have, if not those of one group or of the whole segment
_KEY_BLOCK = 128  # the C++ kernels multiply the features of all keys of a block that has a far pair
_STATE_ROWS = (
    150  # a state is written, summed up and read again in the time of as many products of a row with it
)


@dataclass(frozen=True, eq=False)
class FarBlocks:
    """The far part of a packing; tensors are int32.

    Attributes:
        states: `[2, states]`, the first row of each state's block, and one past the last.
        segments: `[segments + 1]`, cumulative numbers of states, of the segments that have any.
        sides: for each state where those end that are far before it, and where those begin that are far after it;
            None for a side without any.
        mirrored: the same for blocks of keys, and the states of rows from which they are far.
        slots: `[rows]`, the state of each row's block, -1 for none.
        reach: `[2, rows]`, which keys a row sees, near or one by one; None if only near ones.
        products: multiplications for the far part of one key head.
    """

    states: Tensor
    segments: Tensor
    sides: tuple[Tensor | None, Tensor | None]
    mirrored: tuple[Tensor | None, Tensor | None]
    slots: Tensor
    reach: Tensor | None
    products: int


def plan_blocks(geometry: Geometry, head_dim: int, width: int, repeats: int) -> FarBlocks:
    """Choose the blocks of each segment that take the fewest products. What a segment gets depends on it alone.

    width: of the features. repeats: query heads that share a key head.
    """
    groups = _Groups.of(geometry)
    ways = [_Blocks(groups, begins) for begins in groups.ways()]
    costs = np.stack([blocks.products(head_dim, width, repeats) for blocks in ways])
    best = costs.argmin(0)[groups.segment]
    begins = np.stack([blocks.begins for blocks in ways])[best, np.arange(len(best))]
    return _Blocks(groups, begins).plan(int(costs.min(0).sum()))


@dataclass(frozen=True, eq=False)
class _Groups:
    """The groups of a packing in order: begin and end of each and of its near keys, and its segment.

    Attributes:
        ranges: `[4, groups]`, as the columns of `Geometry.near_ranges`.
        segment: `[groups]`.
        counts: `[segments]`, groups of each.
        before, after: whether there are far groups on that side.
        near: `[2, rows]`, as `Geometry.near_rows`.
    """

    ranges: np.ndarray
    segment: np.ndarray
    counts: np.ndarray
    before: bool
    after: bool
    near: np.ndarray

    @classmethod
    def of(cls, geometry: Geometry) -> "_Groups":
        counts = np.diff(geometry.host_segment_groups.numpy())
        segment = np.repeat(np.arange(len(counts)), counts)
        before, after = (lag is not None for lag in geometry.lags)
        return cls(geometry.near_ranges().T, segment, counts, before, after, geometry.near_rows())

    @cached_property
    def rows(self) -> np.ndarray:
        return self.ranges[1] - self.ranges[0]

    def ways(self) -> list[np.ndarray]:
        """Ways to join groups to blocks: whether a block begins with a group."""
        first = np.diff(self.segment, prepend=-1) > 0
        rows = np.bincount(self.segment, self.rows, len(self.counts))
        place = self.ranges[0] - np.repeat(self.ranges[0][first], self.counts[self.counts > 0])
        ways = [np.ones_like(first), first]
        for size in _BLOCK_ROWS:
            blocks = np.maximum(1, np.rint(rows / size))[self.segment]
            index = place * blocks // np.maximum(1, rows[self.segment])
            ways.append(first | (np.diff(index, prepend=-1) > 0))
        return ways


class _Blocks:
    """One way to join groups to blocks.

    A state is far from a block if all its rows are far from all rows of the block. In between lies what the rows reach.
    """

    def __init__(self, groups: _Groups, begins: np.ndarray) -> None:
        self.groups, self.begins = groups, begins
        first = np.flatnonzero(begins)
        begin, end, low, high = groups.ranges
        self.bounds = np.append(begin[first], end[-1:])
        self.segment = groups.segment[first]
        self.owned = np.append(0, np.cumsum(np.bincount(self.segment, minlength=len(groups.counts))))
        limits = self.owned[self.segment], self.owned[self.segment + 1]
        last = np.append(first[1:], len(begin))[: len(first)] - 1
        self.before, self.after = limits
        if groups.before:
            self.before = np.clip(np.searchsorted(self.bounds, low[first], "right") - 1, *limits)
        if groups.after:
            self.after = np.clip(np.searchsorted(self.bounds, high[last]), *limits)
        reach_high = self.bounds[self.after] if groups.after else high[last]
        self.reach = self.bounds[self.before], reach_high
        has_states = (self.before > limits[0]) | (self.after < limits[1])
        self.has_states = np.bincount(self.segment, has_states, len(groups.counts)) > 0

    @property
    def rows(self) -> np.ndarray:
        return np.diff(self.bounds)

    def products(self, head_dim: int, width: int, repeats: int) -> np.ndarray:
        """Multiplications for the far part of one key head, of each segment."""
        groups, owner = self.groups, np.cumsum(self.begins) - 1
        reach = (self.reach[1] - self.reach[0])[owner]
        far = reach - (groups.ranges[3] - groups.ranges[2])
        looked_at = np.minimum(reach, far + 2 * _KEY_BLOCK)
        pairs = np.where(far > 0, groups.rows * (looked_at * width + far * head_dim), 0)
        states = (
            width * (head_dim + 1) * ((1 + repeats) * self.rows + _STATE_ROWS) * self.has_states[self.segment]
        )
        segments = len(groups.counts)
        return repeats * np.bincount(groups.segment, pairs, segments) + np.bincount(
            self.segment, states, segments
        )

    def plan(self, products: int) -> FarBlocks:
        groups, some = self.groups, self.has_states[self.segment]
        slots = np.where(some, np.cumsum(some) - 1, -1)
        offset = (slots - np.arange(len(slots)))[some]  # from blocks to states, the same within a segment
        blocks = np.flatnonzero(some)
        sides = self.before[some], self.after[some]
        mirrored = np.searchsorted(self.after, blocks, "right"), np.searchsorted(self.before, blocks, "right")
        has, mirrored_has = (groups.before, groups.after), (groups.after, groups.before)
        reach_low, reach_high = (np.repeat(x, self.rows) for x in self.reach)
        low, high = groups.near
        reach_high = reach_high if groups.after else high
        reaches = (reach_low < low).any() or (reach_high > high).any()
        counts = np.diff(self.owned)[self.has_states]
        return FarBlocks(
            _int32(np.stack([self.bounds[:-1][some], self.bounds[1:][some]])),
            _int32(np.append(0, np.cumsum(counts))),
            _sides(sides, offset, has),
            _sides(mirrored, offset, mirrored_has),
            _int32(np.repeat(slots, self.rows)),
            _int32(np.stack([reach_low, reach_high])) if reaches else None,
            products,
        )


def _sides(
    sides: tuple[np.ndarray, np.ndarray], offset: np.ndarray, has: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    before, after = (_int32(x + offset) if some else None for x, some in zip(sides, has, strict=True))
    return before, after


def _int32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))
