"""The tile of a grouped matrix product that a program computes, found on the device from the experts' offsets."""

import triton
import triton.language as tl

from ..common.tiles import locate_tile


@triton.jit
def locate_output_tile(
    offsets_ptr, experts, program, row_tiles, column_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """Return expert, first place, end of the expert's places, and index of the column tile.

    The grid is `row_tiles * column_tiles` with row_tiles = slots // BLOCK_M + experts. Each expert owns at least as
    many row tiles as it needs: first place >= end means that there is nothing to do. GROUP_M row tiles pass over all
    columns together, so that both factors stay in the L2 cache.
    """
    per_group = GROUP_M * column_tiles
    first = program // per_group * GROUP_M
    rows = tl.minimum(row_tiles - first, GROUP_M)
    within = program % per_group
    expert, place = locate_tile(offsets_ptr, experts, first + within % rows, BLOCK_M)
    return expert, place, tl.load(offsets_ptr + expert + 1), within // rows
