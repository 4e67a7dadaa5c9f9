"""The caches of the selected experts, gathered from the stored caches of all experts."""

import triton
import triton.language as tl

from ..common.tiles import locate_tile


@triton.jit(do_not_specialize=["experts", "top_k"])
def _gather_caches_kernel(
    caches_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    experts,
    top_k,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy caches `[tokens, experts, RANK]` to out `[slots, RANK]` in the order of places.

    Grid: (tiles, column blocks).
    """
    expert, first = locate_tile(offsets_ptr, experts, tl.program_id(0), BLOCK_M)
    end = tl.load(offsets_ptr + expert + 1)
    place = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.load(order_ptr + place, place < end, other=0) // top_k
    row = token.to(tl.int64) * experts + expert
    mask = (place < end)[:, None] & (column < RANK)[None, :]
    cache = tl.load(caches_ptr + row[:, None] * RANK + column[None, :], mask)
    tl.store(out_ptr + place.to(tl.int64)[:, None] * RANK + column[None, :], cache, mask)
