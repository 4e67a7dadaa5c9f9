"""The squared norms of the caches x W_downᵀ of every expert for every token; the caches are not stored.

This is one matrix product of x `[tokens, dim]` with the concatenated rows of all experts' W_down, each expert padded
to whole spans of SPAN columns. A program squares its tile of the product in the float32 accumulator and sums each
span. No span belongs to two experts or two programs, so no tile is wasted on an expert that ends inside it, and no sum
depends on the order of programs. `_sum_spans_kernel` then adds the spans of an expert.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def _cache_norms_kernel(
    x_ptr,
    w_ptr,
    sums_ptr,
    cache_ptr,
    tokens,
    X_STRIDE: tl.constexpr,
    W_EXPERT_STRIDE: tl.constexpr,
    W_RANK_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """Write sums float32 `[tokens, EXPERTS * spans]`, spans = ceil(RANK / SPAN), and the cache `[tokens, EXPERTS,
    RANK]`
    unless cache_ptr is None.

    x: `[tokens, DIM]`; w: `[EXPERTS, RANK, DIM]`, columns of both contiguous. SPAN divides BLOCK_C. The strides
    are constexprs so that the compiler knows the alignment of the rows, whatever power of two divides DIM. GROUP_T row
    tiles pass over all columns together: they and the tiles of w that run at the same time stay in the L2 cache.
    """
    tl.static_assert(BLOCK_C % SPAN == 0)
    PADDED: tl.constexpr = (RANK + SPAN - 1) // SPAN * SPAN
    COLUMNS: tl.constexpr = EXPERTS * PADDED
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C

    program = tl.program_id(0)
    group = program // (GROUP_T * COLUMN_TILES) * GROUP_T
    rows = tl.minimum(tl.cdiv(tokens, BLOCK_T) - group, GROUP_T)
    within = program % (GROUP_T * COLUMN_TILES)
    row = (group + within % rows).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile = within // rows

    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    expert = column // PADDED
    rank = column % PADDED
    inside = column < COLUMNS
    if RANK != PADDED:
        inside = inside & (rank < RANK)
    depth = tl.arange(0, BLOCK_D)
    # Rows past the end repeat the last one, because a mask would take registers from the accumulator.
    x_pointers = x_ptr + tl.minimum(row, tokens - 1)[:, None] * X_STRIDE + depth[None, :]
    w_row = tl.minimum(expert, EXPERTS - 1).to(tl.int64) * W_EXPERT_STRIDE
    w_row += tl.minimum(rank, RANK - 1).to(tl.int64) * W_RANK_STRIDE
    w_pointers = w_ptr + w_row[:, None] + depth[None, :]

    cache = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, DIM, BLOCK_D):
        if DIM % BLOCK_D == 0:
            x = tl.load(x_pointers)
            w = tl.load(w_pointers)
        else:
            mask = (depth < DIM - start)[None, :]
            x = tl.load(x_pointers, mask, other=0.0)
            w = tl.load(w_pointers, mask, other=0.0)
        cache = tl.dot(x, w.T, cache, input_precision="ieee")
        x_pointers += BLOCK_D
        w_pointers += BLOCK_D

    present = (row < tokens)[:, None]
    if cache_ptr is not None:
        place = column if RANK == PADDED else expert * RANK + rank
        pointers = cache_ptr + row[:, None] * (EXPERTS * RANK) + place[None, :]
        tl.store(pointers, cache.to(cache_ptr.dtype.element_ty), present & inside[None, :])
    if RANK != PADDED:
        cache = tl.where(inside[None, :], cache, 0.0)
    sums = tl.sum(tl.reshape(cache * cache, [BLOCK_T, BLOCK_C // SPAN, SPAN]), 2)
    span = tile * (BLOCK_C // SPAN) + tl.arange(0, BLOCK_C // SPAN)
    pointers = sums_ptr + row[:, None] * (COLUMNS // SPAN) + span[None, :]
    tl.store(pointers, sums, present & (span < COLUMNS // SPAN)[None, :])


@triton.jit(do_not_specialize=["count"])
def _sum_spans_kernel(sums_ptr, squares_ptr, count, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum each row of sums `[count, SPANS]` to squares `[count]`, both float32."""
    WIDTH: tl.constexpr = triton.next_power_of_2(SPANS)
    ROWS: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    span = tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (span < SPANS)[None, :]
    sums = tl.load(sums_ptr + row[:, None] * SPANS + span[None, :], mask, other=0.0)
    tl.store(squares_ptr + row, tl.sum(sums, 1), row < count)
