"""Launchers of the group state kernels: the state of each group, and running sums of states.

States are float32 `[slots, kv_heads, width * (head_dim + 1)]`: S `[width, head_dim]`, then z `[width]`; see
`kernels/triton/group_states/states.py`. No function here waits for the device.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, contiguous, padded, strides
from vot_kernels.tuning import Config

_TILES = Kernel("group_states", "group_states", "group_states.states:_group_states_kernel")
_REDUCE = Kernel("group_states", "reduce_states", "group_states.states:_reduce_states_kernel")
_SCAN = Kernel("group_states", "scan_states", "group_states.states:_scan_states_kernel")
_FAR = Kernel("group_states", "far_states", "group_states.states:_far_states_kernel")
# Bits that tl.dot keeps of a factor. float16 is multiplied as tf32, because sums over a segment exceed the float16
# range.
_DOT_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a state sums.

    Attributes:
        features: `[tokens, heads, width]`, width >= 16; `feature_map` is applied to them ("none": they are used
            unchanged and have the dtype of the values).
        values: `[tokens, heads, head_dim]`. The columns of both are contiguous.
        weights: float32 `[tokens, heads]`, factors of the features, or None for 1.
        last: float32 `[tokens, heads]`, the column appended to the values, or None for 1.
        by_heads: weights and last are `[heads, tokens]` instead.
    """

    features: Tensor
    values: Tensor
    weights: Tensor | None = None
    last: Tensor | None = None
    by_heads: bool = False


def dot_bits(x: Tensor) -> int:
    """Return the bits that the matrix products of inputs like `x` keep of their factors."""
    return _DOT_BITS[x.dtype]


def states_config(rows: Rows) -> Config:
    """Return the config for the states of `rows`; its TILE is the number of rows of a partial state."""
    sizes = _sizes(rows.features.shape[2], rows.values.shape[2], rows.values.dtype)
    return _TILES.config(rows.values.device, sizes)


@lru_cache(maxsize=64)
def _sizes(width: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    return {"width": padded(width), "head_dim": padded(head_dim), "dot_bits": _DOT_BITS[dtype]}


def group_states(rows: Rows, bounds: Tensor, kv_heads: int, feature_map: str) -> Tensor:
    """Return the state of each group `[groups, kv_heads, width * (head_dim + 1)]`, summed over heads // kv_heads
    heads.

    bounds: int32 `[groups + 1]`, cumulative lengths; rows from bounds[-1] on are not read.
    """
    size = _state_size(rows)
    states = _new_states(rows, bounds.shape[0] - 1, kv_heads)
    partials, tile = _tile_states(rows, bounds, kv_heads, feature_map, states)
    _REDUCE.launch(
        lambda blocks: (states.shape[0] * kv_heads * ceil_div(size, blocks["BLOCK"]),),
        key={"dot_bits": dot_bits(rows.values)},
        states_ptr=states,
        partials_ptr=partials,
        bounds_ptr=contiguous(bounds),
        kv_heads=kv_heads,
        SIZE=size,
        TILE=tile,
    )
    return states


def running_states(
    rows: Rows,
    bounds: Tensor,
    kv_heads: int,
    feature_map: str,
    *,
    log_decay: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Return for each tile the sum of the states of the tiles before it in its segment; reverse: after it.

    log_decay: float32 `[kv_heads]`; then kv_heads counts query heads, and several may read one head of `rows`.
    """
    partials, tile = _tile_states(
        rows, bounds, kv_heads, feature_map, None, log_decay, reverse=reverse and log_decay is not None
    )
    return scan_states(partials, bounds, reverse=reverse, tile=tile, log_decay=log_decay)


def far_states(
    rows: Rows,
    cu_groups: Tensor,
    segment_groups: Tensor,
    kv_heads: int,
    feature_map: str,
    behind: int | None,
    ahead: int | None,
) -> tuple[Tensor, Tensor]:
    """Sum for each group the states of the groups of its segment from `behind` before it back and `ahead` after it on.

    Args:
        cu_groups: int32 `[groups + 1]`, cumulative lengths; rows from cu_groups[-1] on are not read.
        segment_groups: int32 `[segments + 1]`, first group of each segment.
        behind, ahead: distances in groups, None for a side that is left out.

    Returns:
        S `[groups, kv_heads, width, head_dim]`, in bfloat16 for bfloat16 rows, whose products round it to that, and
        else in float32; z float32 `[groups, kv_heads, width]`.
    """
    partials, tile = _tile_states(rows, cu_groups, kv_heads, feature_map, None)
    groups, width, head_dim = cu_groups.shape[0] - 1, rows.features.shape[2], rows.values.shape[2]
    dtype = torch.bfloat16 if rows.values.dtype == torch.bfloat16 else torch.float32
    sums = partials.new_empty((groups, kv_heads, width, head_dim), dtype=dtype)
    normalisers = partials.new_empty((groups, kv_heads, width))
    config = _FAR.config(partials.device, {"dot_bits": dot_bits(rows.values)})
    segments, later = segment_groups.shape[0] - 1, None
    if ahead is not None:
        later = _new_states(rows, groups // config.blocks["TILE_GROUPS"] + segments, kv_heads)
    size = _state_size(rows)
    _FAR.launch(
        lambda blocks: (segments * kv_heads * ceil_div(size, blocks["BLOCK"]),),
        config=config,
        sums_ptr=sums,
        normalisers_ptr=normalisers,
        partials_ptr=partials,
        later_ptr=later,
        cu_groups_ptr=contiguous(cu_groups),
        segment_groups_ptr=contiguous(segment_groups),
        kv_heads=kv_heads,
        behind=behind or 0,
        ahead=ahead or 0,
        WIDTH=width,
        HEAD_DIM=head_dim,
        TILE=tile,
        BEHIND=behind is not None,
        AHEAD=ahead is not None,
    )
    return sums, normalisers


def scan_states(
    states: Tensor,
    bounds: Tensor,
    *,
    lag: int = 1,
    reverse: bool = False,
    tile: int = 0,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Sum the states of the slots j <= i - lag (reverse: j >= i + lag) within each segment.

    Args:
        states: `[slots, kv_heads, size]`.
        bounds: int32 `[segments + 1]`: the first slot of each segment, or with `tile` > 0 its first row, where a slot
            is a tile of that many rows.
        log_decay: float32 `[kv_heads]`, the decay per row: a sum shrinks from tile to tile.
    """
    kv_heads, size = states.shape[1:]
    key = {"dot_bits": dot_bits(states), "decay": int(log_decay is not None)}
    sums = torch.empty_like(states, memory_format=torch.contiguous_format)
    _SCAN.launch(
        lambda blocks: ((bounds.shape[0] - 1) * kv_heads * ceil_div(size, blocks["BLOCK"]),),
        key=key,
        states_ptr=contiguous(states),
        sums_ptr=sums,
        log_decay_ptr=contiguous(log_decay),
        bounds_ptr=contiguous(bounds),
        kv_heads=kv_heads,
        lag=lag,
        SIZE=size,
        TILE=tile,
        REVERSE=reverse,
    )
    return sums


def _tile_states(
    rows: Rows,
    bounds: Tensor,
    kv_heads: int,
    feature_map: str,
    states: Tensor | None,
    log_decay: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, int]:
    """Return the state of each tile, and the rows of a tile; groups of one tile are written to `states` instead."""
    config = states_config(rows)
    tokens, heads, width = rows.features.shape
    tiles = tokens // config.blocks["TILE"] + bounds.shape[0] - 1
    partials = _new_states(rows, tiles, kv_heads)
    _TILES.launch(
        lambda blocks: (tiles * kv_heads * ceil_div(rows.values.shape[2], blocks["BLOCK_V"]),),
        config=config,
        features_ptr=rows.features,
        values_ptr=rows.values,
        weights_ptr=contiguous(rows.weights),
        last_ptr=contiguous(rows.last),
        log_decay_ptr=contiguous(log_decay),
        bounds_ptr=contiguous(bounds),
        states_ptr=states,
        partials_ptr=partials,
        **strides(features=rows.features, values=rows.values),
        numbers_stride=1 if rows.by_heads else heads,
        numbers_head_stride=tokens if rows.by_heads else 1,
        num_groups=bounds.shape[0] - 1,
        kv_heads=kv_heads,
        repeats=max(heads // kv_heads, 1),
        shared=max(kv_heads // heads, 1),
        WIDTH=width,
        HEAD_DIM=rows.values.shape[2],
        FEATURE_MAP=feature_map,
        REVERSE=reverse,
    )
    return partials, config.blocks["TILE"]


def _new_states(rows: Rows, slots: int, kv_heads: int) -> Tensor:
    return rows.values.new_empty((slots, kv_heads, _state_size(rows)), dtype=torch.float32)


def _state_size(rows: Rows) -> int:
    return rows.features.shape[2] * (rows.values.shape[2] + 1)
