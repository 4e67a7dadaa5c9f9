"""Which rows of a packed buffer belong to which rank, and which rows of other ranks each rank's attention depends on.

Ranks hold contiguous rows in order, cut at group boundaries. Everything here follows from the layout and the cuts, so
that all ranks compute the same numbers without asking each other.
"""

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vot_kernels.distributed.collectives import all_gather, rank_of, size_of
from vot_kernels.ops.attention_options import CAUSAL_MODES, Causal, Window
from vot_kernels.ops.checks import check_causal
from vot_kernels.ops.hybrid_attention.geometry import Geometry
from vot_kernels.packing import PackedLayout, brief

_ALL = 2**31 - 1  # a window of so many groups is no limit


def shard(
    layout: PackedLayout,
    rank: int,
    world_size: int,
    *,
    window: Window = 1,
    causal: Causal = None,
    token_cost: float = 1024.0,
) -> slice:
    """The rows of a rank: contiguous, cut at group boundaries, and balanced by cost.

    The cost of a token is counted in keys: those that it sees near, plus `token_cost` for all work that does not
    depend on its neighbours. Each cut lies at the group boundary closest to an equal share, so a rank's cost differs
    from that share by at most one group. With fewer groups than ranks, some ranks have no rows.

    Args:
        layout: of all tokens, the same on all ranks.
        rank, world_size: 0 to world_size - 1, and how many ranks there are.
        window, causal: as for `hybrid_attention`; those of most layers, if they differ.
        token_cost: in keys per token. A layer of width D with projections and an MLP of 4 D costs about 6 D.

    Raises:
        ValueError: `rank` or `world_size` is not such an int, `token_cost` is negative, or an option is malformed.
    """
    for name, value, least in (("world_size", world_size, 1), ("rank", rank, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {brief(value)}.")
    if rank >= world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}.")
    if not token_cost >= 0:
        raise ValueError(f"token_cost must be a number >= 0, got {brief(token_cost)}.")
    costs = group_costs(layout, window, check_causal(causal, CAUSAL_MODES), token_cost)
    groups = layout.host_cu_groups.numpy().astype(np.int64)
    done = np.concatenate([[0.0], np.cumsum(costs)])
    shares = done[-1] * np.arange(1, world_size) / world_size
    after = np.searchsorted(done, shares).clip(max=len(costs))
    before = (after - 1).clip(min=0)
    closest = np.where(shares - done[before] <= done[after] - shares, before, after)
    bounds = [0, *groups[closest].tolist(), layout.num_tokens]
    return slice(bounds[rank], bounds[rank + 1])


def assign(
    layout: PackedLayout,
    world_size: int,
    *,
    window: Window = 1,
    causal: Causal = None,
    token_cost: float = 1024.0,
) -> list[list[int]]:
    """The segments of each rank where ranks have whole ones, as in data parallel training, balanced by cost.

    Segments go one by one, the costliest first, to the rank with the least so far; so all costs differ by at most that
    of one segment. Cost is counted as in `shard`, whose arguments these are.

    Returns:
        For each rank the numbers of its segments, ascending; with fewer segments than ranks, some have none.

    Raises:
        ValueError: as in `shard`.
    """
    shard(layout, 0, world_size, window=window, causal=causal, token_cost=token_cost)  # checks the options
    costs = group_costs(layout, window, check_causal(causal, CAUSAL_MODES), token_cost)
    groups = np.searchsorted(layout.host_cu_groups.numpy(), layout.host_cu_seqlens.numpy())
    done = np.concatenate([[0.0], np.cumsum(costs)])
    segments = np.diff(done[groups])
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for segment in sorted(range(len(segments)), key=lambda n: (-segments[n], n)):
        least = min(range(world_size), key=loads.__getitem__)
        ranks[least].append(segment)
        loads[least] += float(segments[segment])
    return [sorted(own) for own in ranks]


def group_costs(layout: PackedLayout, window: Window, causal: str | None, token_cost: float) -> np.ndarray:
    """The cost of each group, in pairs of a query and a key: float64 `[groups]`."""
    begin, end, low, high = near_rows(layout, window, causal).T.astype(float)
    rows = end - begin
    unseen = rows * (rows - 1) / 2 if causal == "token" else 0.0
    return rows * (high - low + token_cost) - unseen


def near_rows(layout: PackedLayout, window: Window, causal: str | None) -> np.ndarray:
    """int64 `[groups, 4]`: begin and end of each group, begin and end of its near rows."""
    geometry = Geometry.of(layout, window, causal)
    left, right = (_ALL if side is None else side for side in (geometry.left, geometry.right))
    return geometry._replace(left=left, right=right).near_ranges()


class Reach(NamedTuple):
    """The rows that the rows of a rank depend on: those of the whole segments, and of these the near ones.

    Attributes:
        begin, end: the rank's own rows.
        near_begin, near_end: with the rows that are near to any of them.
        segment_begin, segment_end: with all rows that any of them sees.
    """

    begin: int
    end: int
    near_begin: int
    near_end: int
    segment_begin: int
    segment_end: int


def reaches(layout: PackedLayout, bounds: tuple[int, ...], window: Window, causal: str | None) -> list[Reach]:
    """The `Reach` of every rank, given the first row of each and the number of rows."""
    near = near_rows(layout, window, causal)
    near = near[near[:, 1] > near[:, 0]]
    segments = layout.host_cu_seqlens.numpy().astype(np.int64)
    found = []
    for begin, end in pairwise(bounds):
        if begin == end:
            found.append(Reach(*[begin] * 6))
            continue
        first, last = np.searchsorted(near[:, 0], [begin, end - 1], side="right") - 1
        own = np.searchsorted(segments, [begin, end - 1], side="right")
        low, high = int(near[first, 2]), int(near[last, 3])
        whole = int(segments[own[0] - 1]), high if causal else int(segments[own[1]])
        found.append(Reach(begin, end, low, high, *whole))
    return found


@dataclass(frozen=True)
class Transfer:
    """Rows of other ranks that each rank asks for: at most one range of each other rank.

    Attributes:
        wanted: rows of this rank that each rank asks for, (begin, end) counted from its first row; empty for itself.
        received: how many rows this rank receives of each rank.
        rank: this rank.
        idle: whether no rank asks for any.
    """

    wanted: tuple[tuple[int, int], ...]
    received: tuple[int, ...]
    rank: int
    idle: bool

    @property
    def before(self) -> int:
        """How many rows come from earlier ranks."""
        return sum(self.received[: self.rank])

    @classmethod
    def of(cls, asked: list[tuple[range, range]], bounds: tuple[int, ...], rank: int) -> "Transfer":
        """`asked` holds for each rank the rows of earlier ranks and those of later ranks that it asks for."""
        own = range(bounds[rank], bounds[rank + 1])
        wanted = [_common(asked[other][rank > other], own) for other in range(len(asked))]
        ranges = [range(*pair) for pair in pairwise(bounds)]
        received = [
            len(range(*_common(asked[rank][other > rank], rows))) if other != rank else 0
            for other, rows in enumerate(ranges)
        ]
        wanted[rank] = (0, 0)
        idle = not any(len(rows) for pair in asked for rows in pair)
        return cls(tuple(wanted), tuple(received), rank, idle)

    @property
    def sent(self) -> tuple[int, ...]:
        """How many rows this rank sends to each rank."""
        return tuple(end - begin for begin, end in self.wanted)


def _common(wanted: range, rows: range) -> tuple[int, int]:
    """The part of `rows` that is wanted, counted from the first of them."""
    begin, end = max(wanted.start, rows.start), min(wanted.stop, rows.stop)
    return (begin - rows.start, end - rows.start) if begin < end else (0, 0)


_AGREED: "WeakKeyDictionary[PackedLayout, dict[tuple, tuple[int, ...]]]" = WeakKeyDictionary()


def agreed_bounds(
    layout: PackedLayout, rows: Tensor, group: ProcessGroup, window: Window, causal: str | None
) -> tuple[int, ...]:
    """The first row of each rank, and the number of rows, once all ranks have shown that they mean the same.

    The ranks exchange a few numbers at the first call with a layout and these options; later calls exchange nothing.

    Raises:
        ValueError: the ranks' layouts or options differ, or their rows do not make up the layout's, cut at group
            boundaries.
    """
    geometry = Geometry.of(layout, window, causal)
    key = (group, geometry.left, geometry.right, causal)
    known = _AGREED.setdefault(layout, {})
    if key not in known:
        known[key] = _agree(layout, rows, group, geometry)
    bounds, rank = known[key], rank_of(group)
    if rows.shape[0] != bounds[rank + 1] - bounds[rank]:
        raise ValueError(
            f"q must have the {bounds[rank + 1] - bounds[rank]} rows with which rank {rank} first used this layout, "
            f"got {rows.shape[0]}."
        )
    return bounds


def _agree(layout: PackedLayout, rows: Tensor, group: ProcessGroup, geometry: Geometry) -> tuple[int, ...]:
    cuts = [layout.host_cu_seqlens.numpy().tobytes(), layout.host_cu_groups.numpy().tobytes()]
    sides = [-1 if side is None else side for side in (geometry.left, geometry.right)]
    mine = [layout.num_segments, layout.num_groups, layout.num_tokens, *sides]
    mine += [CAUSAL_MODES.index(geometry.causal), zlib.crc32(cuts[1], zlib.crc32(cuts[0])), rows.shape[0]]
    everyone = all_gather(torch.tensor([mine], device=rows.device), group).tolist()
    for rank, theirs in enumerate(everyone):
        if theirs[:-1] != everyone[0][:-1]:
            raise ValueError(
                "All ranks must pass the same layout and options, but "
                f"{_described(0, everyone[0])} and {_described(rank, theirs)}."
            )
    bounds = tuple(np.cumsum([0, *(theirs[-1] for theirs in everyone)]).tolist())
    if bounds[-1] != layout.num_tokens:
        raise ValueError(
            f"The rows of the {size_of(group)} ranks must make up the {layout.num_tokens} tokens of the layout, got "
            f"{brief([theirs[-1] for theirs in everyone])}; shard says which rows a rank has."
        )
    inside = set(bounds) - set(layout.host_cu_groups.tolist())
    if inside and layout.num_tokens:
        raise ValueError(
            f"Ranks must be cut at group boundaries, got a cut inside of a group at row {min(inside)}; "
            "shard says which rows a rank has."
        )
    return bounds


def _described(rank: int, numbers: list[int]) -> str:
    segments, groups, tokens, left, right, causal, checksum, _ = numbers
    window = None if left < 0 else (left, right)
    return (
        f"rank {rank} has {segments} segments, {groups} groups and {tokens} tokens (checksum {checksum:08x}) with "
        f"window={window}, causal={CAUSAL_MODES[causal]!r}"
    )
