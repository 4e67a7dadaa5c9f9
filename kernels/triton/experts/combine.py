"""The weighted sum of the results of a token's slots."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def _combine_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    tokens,
    rows_stride,
    STRIDE_UNIT: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum weights[t, j] * rows[places[t * TOP_K + j]] over j, in ascending order; place -1 adds nothing.

    rows `[slots, N]`, `rows_stride` in units of STRIDE_UNIT elements; places: int32 `[tokens * TOP_K]`; weights:
    float32 `[tokens, TOP_K]` or None for 1; out `[tokens, N]`; everything but the rows is contiguous.
    Grid: cdiv(tokens, BLOCK_T) * cdiv(N, BLOCK_N).
    """
    COLUMN_TILES: tl.constexpr = triton.cdiv(N, BLOCK_N)
    token = (tl.program_id(0) // COLUMN_TILES).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < N)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    # The loop is unrolled, so that the rows of four slots are loaded together.
    for j in tl.range(0, TOP_K, loop_unroll_factor=4):
        slot = token * TOP_K + j
        place = tl.load(places_ptr + slot, token < tokens, other=-1)
        pointers = rows_ptr + place.to(tl.int64)[:, None] * (rows_stride * STRIDE_UNIT) + column[None, :]
        terms = tl.load(pointers, (place >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            terms *= tl.load(weights_ptr + slot, place >= 0, other=0.0)[:, None]
        sums += terms
    pointers = out_ptr + token[:, None] * N + column[None, :]
    tl.store(pointers, sums.to(out_ptr.dtype.element_ty), (token < tokens)[:, None] & inside)
