"""Matrix products over rows grouped by expert, with a weight matrix per group, and the gradients of the weights.

The places from offsets[e] to offsets[e + 1] - 1 belong to expert e. The row of a place is the place itself, or for
rows of tokens `order[place] // TOP_K`: they are read in place, without a copy. Loads are 16 bytes wide if the
compiler knows that strides and the sizes in the masks are multiples of 8 elements: STRIDE_UNIT tells it about the
strides, and the sizes are constexprs.
"""

import triton
import triton.language as tl

from .tiles import locate_output_tile


@triton.jit
def _add_product(
    sums,
    a_ptr,
    row,
    a_stride,
    w_ptr,
    column,
    w_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return sums + a[row] @ w[:, column]; a `[rows, K]`, w `[K, N]` with contiguous columns (TRANSPOSED) or rows."""
    depth = tl.arange(0, BLOCK_K)
    a_pointers = a_ptr + (row.to(tl.int64)[:, None] * a_stride + depth[None, :])
    if TRANSPOSED:
        w_pointers = w_ptr + (column.to(tl.int64)[None, :] * w_stride + depth[:, None])
        step = BLOCK_K
    else:
        w_pointers = w_ptr + (depth.to(tl.int64)[:, None] * w_stride + column[None, :])
        step = tl.cast(w_stride, tl.int64) * BLOCK_K
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        a = tl.load(a_pointers) if K % BLOCK_K == 0 else tl.load(a_pointers, inside[None, :], other=0.0)
        w = tl.load(w_pointers, inside[:, None] & (column < N)[None, :], other=0.0)
        sums = tl.dot(a, w, sums, input_precision="ieee")
        a_pointers += BLOCK_K
        w_pointers += step
    return sums


@triton.jit(do_not_specialize=["experts"])
def _grouped_matmul_kernel(
    a_ptr,
    w_ptr,
    a2_ptr,
    w2_ptr,
    scale_ptr,
    addend_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    experts,
    a_stride,
    w_stride,
    w_expert_stride,
    a2_stride,
    w2_stride,
    w2_expert_stride,
    addend_stride,
    STRIDE_UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    W2_TRANSPOSED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write out[p] = a[row of p] @ w[e] + a2[p] @ w2[e] + scale[p] * addend[p] at each place p of an expert e.

    a `[tokens or slots, K]`; w `[experts, K, N]`; a2 `[slots, K2]`, w2 `[experts, K2, N]`, both or None; scale float32
    `[slots]`, addend `[slots, N]`, both or None; out `[slots, N]`, contiguous; order: int32 `[slots]`, or None if the
    rows of a are the places; offsets: int32 `[experts + 1]`. Strides are in units of STRIDE_UNIT elements; those of w
    are of the dimension that is not contiguous: its columns if W_TRANSPOSED, else its rows. Rows of out without an
    expert are not written.
    Grid: (slots // BLOCK_M + experts) * cdiv(N, BLOCK_N).
    """
    COLUMN_TILES: tl.constexpr = triton.cdiv(N, BLOCK_N)
    row_tiles = tl.num_programs(0) // COLUMN_TILES
    expert, first, end, column_tile = locate_output_tile(
        offsets_ptr, experts, tl.program_id(0), row_tiles, COLUMN_TILES, BLOCK_M, GROUP_M
    )
    if first >= end:
        return
    # Rows past the end repeat the last one: they are not stored and need no mask in the loops.
    index = tl.arange(0, BLOCK_M)
    place = first + tl.minimum(index, end - first - 1)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = place if order_ptr is None else tl.load(order_ptr + place) // TOP_K
    w_ptr += expert.to(tl.int64) * (w_expert_stride * STRIDE_UNIT)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if addend_ptr is not None:  # before the products, which use all registers
        addend_ptr += place.to(tl.int64)[:, None] * (addend_stride * STRIDE_UNIT)
        addend = tl.load(addend_ptr + column[None, :], (column < N)[None, :], other=0.0)
        sums += tl.load(scale_ptr + place)[:, None] * addend
    sums = _add_product(
        sums, a_ptr, row, a_stride * STRIDE_UNIT, w_ptr, column, w_stride * STRIDE_UNIT, K, N, W_TRANSPOSED, BLOCK_K
    )  # fmt: skip
    if a2_ptr is not None:
        w2_ptr += expert.to(tl.int64) * (w2_expert_stride * STRIDE_UNIT)
        sums = _add_product(
            sums, a2_ptr, place, a2_stride * STRIDE_UNIT, w2_ptr, column, w2_stride * STRIDE_UNIT, K2, N,
            W2_TRANSPOSED, BLOCK_K,
        )  # fmt: skip
    inside = (index < end - first)[:, None] & (column < N)[None, :]
    out_ptr += place.to(tl.int64)[:, None] * N
    tl.store(out_ptr + column[None, :], sums.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _load_places(pointer, order_ptr, place, inside, stride, column, WIDTH: tl.constexpr, TOP_K: tl.constexpr):
    """Load the rows of the places `inside`, columns `column`; 0 elsewhere and from column WIDTH on."""
    row = place if order_ptr is None else tl.load(order_ptr + place, inside, other=0) // TOP_K
    pointers = pointer + (row.to(tl.int64)[:, None] * stride + column[None, :])
    return tl.load(pointers, inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _weight_gradient_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_order_ptr,
    b_order_ptr,
    offsets_ptr,
    a_stride,
    b_stride,
    STRIDE_UNIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write for each expert the sum over its places p, in ascending order, of a[row of p]^T b[row of p].

    a `[tokens or slots, M]`, b `[tokens or slots, N]`, rows contiguous; their orders: int32 `[slots]`, or None if the
    rows are the places; offsets: int32 `[experts + 1]`; out `[experts, M, N]`, contiguous, every element written.
    Strides are in units of STRIDE_UNIT elements. Tiles of one expert are neighbours, so they share its rows in the L2
    cache.
    Grid: experts * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N).
    """
    ROW_TILES: tl.constexpr = triton.cdiv(M, BLOCK_M)
    COLUMN_TILES: tl.constexpr = triton.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    tile = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    row_tile, column_tile = tl.swizzle2d(
        tile // COLUMN_TILES, tile % COLUMN_TILES, ROW_TILES, COLUMN_TILES, GROUP_M
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + expert)
    count = tl.load(offsets_ptr + expert + 1) - begin
    index = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The rows after the last one belong to a neighbour, whose NaN must not enter the sums, so both factors are masked.
    for start in range(0, count, BLOCK_K):
        inside = index < count - start
        place = begin + start + index
        a = _load_places(a_ptr, a_order_ptr, place, inside, a_stride * STRIDE_UNIT, row, M, TOP_K)
        b = _load_places(b_ptr, b_order_ptr, place, inside, b_stride * STRIDE_UNIT, column, N, TOP_K)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
    out_ptr += expert.to(tl.int64) * M * N + row.to(tl.int64)[:, None] * N
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + column[None, :], sums.to(out_ptr.dtype.element_ty), inside)
