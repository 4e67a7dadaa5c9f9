"""The keys that each query of a packed buffer sees: one range [low, high) per row, computed once per call.

Both ends never decrease along a segment, whatever the window and the causal mode. The attention kernels rely on this
alone: a tile of rows takes its bounds from its first and last row, and blocks of keys that all its rows see need no
mask. The rows that see each key follow the same rule with both windows reversed.
"""

import triton
import triton.language as tl

from .tiles import locate_tile


@triton.jit
def find_interval(bounds_ptr, count, position):
    """Return the last i < count with bounds[i] <= position, for ascending bounds with bounds[0] <= position."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(bounds_ptr + middle) <= position
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(
    do_not_specialize=["groups", "segments", "rows", "left", "right", "tokens_left", "tokens_right"],
)
def _key_ranges_kernel(
    ranges_ptr,
    row_groups_ptr,
    key_groups_ptr,
    segment_groups_ptr,
    groups,
    segments,
    rows,
    left,
    right,
    tokens_left,
    tokens_right,
    BLOCK_T: tl.constexpr,
):
    """Write ranges int32 `[2, rows]`: the first key of each row, and one past the last.

    row_groups, key_groups: int32 `[groups + 1]`, cumulative lengths on either side; segment_groups: int32
    `[segments + 1]`, first group of each segment, or None where every group is a segment. A row sees the
    groups from `left` before its own to `right` after it, and the tokens from `tokens_left` before its
    counterpart to `tokens_right` after it; the last tokens of a segment are counterparts.
    """
    group, first_row = locate_tile(row_groups_ptr, groups, tl.program_id(0), BLOCK_T)
    first_group = group
    end_group = group + 1
    if segment_groups_ptr is not None:
        segment = find_interval(segment_groups_ptr, segments, group)
        first_group = tl.load(segment_groups_ptr + segment)
        end_group = tl.load(segment_groups_ptr + segment + 1)
    begin = tl.load(key_groups_ptr + group - tl.minimum(left, group - first_group)).to(tl.int64)
    end = tl.load(key_groups_ptr + group + 1 + tl.minimum(right, end_group - 1 - group)).to(tl.int64)
    offset = tl.load(key_groups_ptr + end_group).to(tl.int64) - tl.load(row_groups_ptr + end_group)

    row = first_row + tl.arange(0, BLOCK_T)
    counterpart = row + offset
    low = tl.minimum(tl.maximum(counterpart - tokens_left, begin), end)
    high = tl.minimum(tl.maximum(counterpart + tokens_right + 1, low), end)
    mask = row < tl.load(row_groups_ptr + group + 1)
    tl.store(ranges_ptr + row, low.to(tl.int32), mask)
    tl.store(ranges_ptr + rows.to(tl.int64) + row, high.to(tl.int32), mask)


@triton.jit
def tile_ranges(ranges_ptr, rows, first_row, end_row, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Return the ranges of the rows from `first_row` up to `end_row` (exclusive), and the blocks of keys that they
    need.

    Returns:
        low, high: `[BLOCK_ROWS]`, empty ranges for the rows from `end_row` on.
        begin, end: first key that any row sees, and one past the last.
        count: number of blocks from `begin` to `end`.
        first_full, end_full: the first of the blocks in which every row sees every key, and one past the last.
    """
    row = first_row + tl.arange(0, BLOCK_ROWS)
    high_ptr = ranges_ptr + rows.to(tl.int64)
    low = tl.load(ranges_ptr + row, row < end_row, other=0)
    high = tl.load(high_ptr + row, row < end_row, other=0)
    occupied = first_row < end_row
    last_row = tl.minimum(first_row + BLOCK_ROWS, end_row) - 1
    begin = tl.load(ranges_ptr + first_row, occupied, other=0)
    end = tl.load(high_ptr + last_row, occupied, other=0)
    count = tl.cdiv(end - begin, BLOCK_KEYS)
    first_full = tl.cdiv(tl.load(ranges_ptr + last_row, occupied, other=0) - begin, BLOCK_KEYS)
    first_full = tl.minimum(first_full, count)
    end_full = (tl.load(high_ptr + first_row, occupied, other=0) - begin) // BLOCK_KEYS
    return low, high, begin, end, count, first_full, tl.maximum(end_full, first_full)


@triton.jit
def masked_block(block, first_full, end_full):
    """Return the index of the `block`-th block that needs a mask: those before the full blocks, then those after."""
    return tl.where(block < first_full, block, block + end_full - first_full)
