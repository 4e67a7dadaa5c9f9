"""The rows of a packed buffer that a program works on, found on the device from the cumulative lengths.

Segment s owns the tiles bounds[s] // BLOCK + s up to those of s + 1, which are at least as many as its rows need. The
grid tokens // BLOCK + segments is known without reading the lengths; a superfluous tile begins past its segment.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(bounds_ptr, count, tile, BLOCK: tl.constexpr):
    """Return the segment (or group) of `tile` and the tile's first row, which may be at or past the segment's end.

    bounds_ptr: int32 `[count + 1]`, cumulative lengths; count >= 1; 0 <= tile < bounds[count] // BLOCK + count.
    """
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(bounds_ptr + middle) // BLOCK + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    begin = tl.load(bounds_ptr + low)
    return low, begin + (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def locate_tile_by_steps(bounds_ptr, count, tile, BLOCK: tl.constexpr):
    """`locate_tile` without a while loop, which warp specialization does not support; extra steps change nothing."""
    low = 0
    high = count
    for _ in range(tl.log2(count.to(tl.float32)).to(tl.int32) + 2):
        middle = (low + high) // 2
        below = tl.load(bounds_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    begin = tl.load(bounds_ptr + low)
    return low, begin + (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def locate_packed_tile(bounds_ptr, num_tokens, num_segments, tile, TILE: tl.constexpr):
    """Return the segment of `tile`, the segment's rows (begin, end) and the tile's (first, stop).

    The segment past the last is the slack up to num_tokens. A superfluous tile has first >= end.
    """
    segment, first = locate_tile(bounds_ptr, num_segments + 1, tile, TILE)
    begin = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + tl.minimum(segment + 1, num_segments))
    end = tl.where(segment < num_segments, end, num_tokens)
    return segment, begin, end, first, tl.minimum(first + TILE, end)
