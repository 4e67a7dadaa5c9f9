"""A row per segment added to the segment's tokens, and the sums over the tokens of each segment.

A program finds the tile of rows that it works on from the cumulative lengths (`common.tiles`). The sums of the backward
have two stages: each tile writes its own, and then each segment adds those of its tiles. Their order is fixed.
"""

import triton
import triton.language as tl

from ..common.rows import load_block, store_block
from ..common.tiles import locate_packed_tile


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def _segment_add_kernel(
    x_ptr,
    embedding_ptr,
    bounds_ptr,
    out_ptr,
    x_stride,
    num_tokens,
    num_segments,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write out = x + the row of the segment; 0 in rows past the last segment.

    x `[num_tokens, WIDTH]`, its stride in units of STRIDE_UNIT elements; embedding `[num_segments, WIDTH]`, bounds
    int32 `[num_segments + 1]` and out are contiguous.
    Grid: (num_tokens // TILE + num_segments + 1) * cdiv(WIDTH, BLOCK_D).
    """
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_D)
    tile = tl.program_id(0) // COLUMN_BLOCKS
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D
    segment, _, end, first, stop = locate_packed_tile(bounds_ptr, num_tokens, num_segments, tile, TILE)
    if first >= end:
        return
    index = column + tl.arange(0, BLOCK_D)
    present = segment < num_segments
    place = embedding_ptr + segment.to(tl.int64) * WIDTH + index
    row = tl.load(place, (index < WIDTH) & present, other=0.0).to(tl.float32)
    last = tl.where(present, stop, first)  # rows that are read: none of those past the last segment
    for i in range(tl.cdiv(stop - first, BLOCK_T)):
        start = first + i * BLOCK_T
        x = load_block(x_ptr, start, last, x_stride * STRIDE_UNIT, column, WIDTH, BLOCK_T, BLOCK_D)
        total = x.to(tl.float32) + row[None, :]
        store_block(out_ptr, total, start, stop, WIDTH, column, WIDTH, BLOCK_T, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def _segment_add_bwd_kernel(
    d_out_ptr,
    bounds_ptr,
    d_x_ptr,
    partials_ptr,
    d_out_stride,
    num_tokens,
    num_segments,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write d_x, which is d_out with 0 past the last segment, and the sum of each tile's rows.

    partials: float32 `[tiles, WIDTH]`, where only tiles of segments with rows are written; the rest is as in the
    forward.
    """
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_D)
    tile = tl.program_id(0) // COLUMN_BLOCKS
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D
    segment, _, end, first, stop = locate_packed_tile(bounds_ptr, num_tokens, num_segments, tile, TILE)
    if first >= end:
        return
    last = tl.where(segment < num_segments, stop, first)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(tl.cdiv(stop - first, BLOCK_T)):
        start = first + i * BLOCK_T
        rows = load_block(d_out_ptr, start, last, d_out_stride * STRIDE_UNIT, column, WIDTH, BLOCK_T, BLOCK_D)
        store_block(d_x_ptr, rows, start, stop, WIDTH, column, WIDTH, BLOCK_T, BLOCK_D)
        sums += rows.to(tl.float32)
    index = column + tl.arange(0, BLOCK_D)
    mask = (index < WIDTH) & (segment < num_segments)
    tl.store(partials_ptr + tile.to(tl.int64) * WIDTH + index, tl.sum(sums, 0), mask)


@triton.jit
def _sum_tiles_kernel(
    partials_ptr,
    bounds_ptr,
    sums_ptr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of the tiles of each segment; 0 for segments without rows.

    partials as `_segment_add_bwd_kernel` writes them; sums float32 `[segments, WIDTH]`.
    Grid: segments * cdiv(WIDTH, BLOCK_D).
    """
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_D)
    segment = tl.program_id(0) // COLUMN_BLOCKS
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D
    begin = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    tile = begin // TILE + segment
    tiles = tl.cdiv(end - begin, TILE)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in range(tl.cdiv(tiles, BLOCK_R)):
        first = tile + i * BLOCK_R
        sums += load_block(partials_ptr, first, tile + tiles, WIDTH, column, WIDTH, BLOCK_R, BLOCK_D)
    index = column + tl.arange(0, BLOCK_D)
    tl.store(sums_ptr + segment.to(tl.int64) * WIDTH + index, tl.sum(sums, 0), index < WIDTH)
