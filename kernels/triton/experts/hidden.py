"""The hidden layer of gated experts, h = SiLU(pre) * value, and its gradients, for places sorted by expert.

value = x W_value^T of the token at each place. pre is c W_up^T for a cache c with a row per place (Autonomy-of-Experts)
or x W_gate^T (plain mixture of experts). Both products stay in float32 until h is written.
Rows past an expert's end repeat its last one and are not stored, so no row of a neighbour is ever read.
"""

import triton
import triton.language as tl

from .tiles import locate_output_tile


@triton.jit
def _load_depth(row_ptr, start, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load `[rows, BLOCK_K]`: elements from `start` on of the rows that begin at `row_ptr`; 0 from SIZE on."""
    k = start + tl.arange(0, BLOCK_K)
    pointers = row_ptr[:, None] + k[None, :]
    mask = (k < SIZE)[None, :]
    return tl.load(pointers) if SIZE % BLOCK_K == 0 else tl.load(pointers, mask, other=0.0)


@triton.jit
def _load_weight(
    weight_ptr,
    start,
    column,
    stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Load `[BLOCK_K, BLOCK_N]` of W^T from row `start` on; 0 from row SIZE on, anything from column COLUMNS on.

    TRANSPOSED: the columns are contiguous in memory, not the rows.
    """
    k = start + tl.arange(0, BLOCK_K)
    mask = (k < SIZE)[:, None]
    if TRANSPOSED:
        pointers = weight_ptr + (k.to(tl.int64)[:, None] * stride * STRIDE_UNIT + column[None, :])
        tile = tl.load(pointers, mask & (column < COLUMNS)[None, :], other=0.0)
    else:  # repeating the last column takes fewer registers than a mask
        column = tl.minimum(column, COLUMNS - 1)
        pointers = weight_ptr + (column.to(tl.int64)[None, :] * stride * STRIDE_UNIT + k[:, None])
        tile = tl.load(pointers) if SIZE % BLOCK_K == 0 else tl.load(pointers, mask, other=0.0)
    return tile


@triton.jit
def _product(
    row_ptr,
    weight_ptr,
    column,
    stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply the rows that begin at `row_ptr` by W^T `[SIZE, COLUMNS]` to float32 `[BLOCK_M, BLOCK_N]`."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        rows = _load_depth(row_ptr, start, SIZE, BLOCK_K)
        weight = _load_weight(
            weight_ptr, start, column, stride, SIZE, COLUMNS, STRIDE_UNIT, TRANSPOSED, BLOCK_K, BLOCK_N
        )
        product = tl.dot(rows, weight, product, input_precision="ieee")
    return product


@triton.jit
def _two_products(
    row_ptr,
    first_ptr,
    second_ptr,
    column,
    first_stride,
    second_stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    FIRST_TRANSPOSED: tl.constexpr,
    SECOND_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `_product` of the same rows with two weights; each tile of the rows is loaded once."""
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        rows = _load_depth(row_ptr, start, SIZE, BLOCK_K)
        weight = _load_weight(
            first_ptr,
            start,
            column,
            first_stride,
            SIZE,
            COLUMNS,
            STRIDE_UNIT,
            FIRST_TRANSPOSED,
            BLOCK_K,
            BLOCK_N,
        )
        first = tl.dot(rows, weight, first, input_precision="ieee")
        weight = _load_weight(
            second_ptr,
            start,
            column,
            second_stride,
            SIZE,
            COLUMNS,
            STRIDE_UNIT,
            SECOND_TRANSPOSED,
            BLOCK_K,
            BLOCK_N,
        )
        second = tl.dot(rows, weight, second, input_precision="ieee")
    return first, second


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of the columns of `[BLOCK_M, BLOCK_N]`."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    pre,
    value,
    row,
    end,
    first_column,
    hidden_ptr,
    saved_ptr,
    HIDDEN: tl.constexpr,
    SAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Store hidden, and value in rows of SAVED elements, after pre if SAVED is twice HIDDEN; PIECE columns at a time.

    pre, value: float32 `[BLOCK_M, COLUMNS]`.
    """
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        pre_left, pre_right = _halves(pre, BLOCK_M, COLUMNS)
        value_left, value_right = _halves(value, BLOCK_M, COLUMNS)
        _store_hidden(
            pre_left, value_left, row, end, first_column,
            hidden_ptr, saved_ptr, HIDDEN, SAVED, BLOCK_M, HALF, PIECE,
        )  # fmt: skip
        _store_hidden(
            pre_right, value_right, row, end, first_column + HALF,
            hidden_ptr, saved_ptr, HIDDEN, SAVED, BLOCK_M, HALF, PIECE,
        )  # fmt: skip
    else:
        TYPE: tl.constexpr = hidden_ptr.dtype.element_ty
        column = first_column + tl.arange(0, COLUMNS)
        mask = (row < end)[:, None] & (column < HIDDEN)[None, :]
        if saved_ptr is not None:
            pointers = saved_ptr + (row.to(tl.int64)[:, None] * SAVED + column[None, :])
            if SAVED == HIDDEN:
                tl.store(pointers, value.to(TYPE), mask)
            else:
                tl.store(pointers, pre.to(TYPE), mask)
                tl.store(pointers + HIDDEN, value.to(TYPE), mask)
        pointers = hidden_ptr + (row.to(tl.int64)[:, None] * HIDDEN + column[None, :])
        tl.store(pointers, (pre * tl.sigmoid(pre) * value).to(TYPE), mask)


@triton.jit(do_not_specialize=["experts", "slots", "top_k"])
def _expert_hidden_kernel(
    x_ptr,
    w_value_ptr,
    cache_ptr,
    w_gate_ptr,
    order_ptr,
    offsets_ptr,
    hidden_ptr,
    saved_ptr,
    x_stride,
    w_value_expert_stride,
    w_value_stride,
    cache_stride,
    w_gate_expert_stride,
    w_gate_stride,
    experts,
    slots,
    top_k,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    W_VALUE_TRANSPOSED: tl.constexpr,
    W_GATE_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write hidden `[slots, HIDDEN]` and what the backward reads.

    x `[tokens, DIM]`; w_value `[experts, HIDDEN, DIM]`. With cache `[slots, RANK]`, w_gate is `[experts, HIDDEN,
    RANK]` and saved gets value `[slots, HIDDEN]`; with None, w_gate is `[experts, HIDDEN, DIM]` and saved gets pre
    and value side by side, `[slots, 2 * HIDDEN]`. saved may be None. Strides are in units of STRIDE_UNIT elements.
    The tile is stored PIECE columns at a time. Grid: (slots // BLOCK_M + experts) * column tiles.
    """
    expert, first, end, tile = locate_output_tile(
        offsets_ptr,
        experts,
        tl.program_id(0),
        slots // BLOCK_M + experts,
        tl.cdiv(HIDDEN, BLOCK_N),
        BLOCK_M,
        GROUP_M,
    )
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    place = tl.minimum(row, end - 1)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(order_ptr + place) // top_k
    x_row_ptr = x_ptr + token.to(tl.int64) * x_stride * STRIDE_UNIT
    w_value_ptr += expert.to(tl.int64) * w_value_expert_stride * STRIDE_UNIT
    w_gate_ptr += expert.to(tl.int64) * w_gate_expert_stride * STRIDE_UNIT
    if cache_ptr is None:
        pre, value = _two_products(
            x_row_ptr,
            w_gate_ptr,
            w_value_ptr,
            column,
            w_gate_stride,
            w_value_stride,
            DIM,
            HIDDEN,
            STRIDE_UNIT,
            W_GATE_TRANSPOSED,
            W_VALUE_TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        value = _product(
            x_row_ptr,
            w_value_ptr,
            column,
            w_value_stride,
            DIM,
            HIDDEN,
            STRIDE_UNIT,
            W_VALUE_TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        pre = _product(
            cache_ptr + place.to(tl.int64) * cache_stride * STRIDE_UNIT,
            w_gate_ptr,
            column,
            w_gate_stride,
            RANK,
            HIDDEN,
            STRIDE_UNIT,
            W_GATE_TRANSPOSED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )

    SAVED: tl.constexpr = 2 * HIDDEN if cache_ptr is None else HIDDEN
    _store_hidden(
        pre,
        value,
        row,
        end,
        tile * BLOCK_N,
        hidden_ptr,
        saved_ptr,
        HIDDEN,
        SAVED,
        BLOCK_M,
        BLOCK_N,
        PIECE,
    )


@triton.jit
def _load_pieces(
    pointer,
    row,
    first_column,
    end_column,
    stride,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Load a block `[BLOCK_M, COLUMNS]`, halved until PIECE columns are left: a tree of tuples as `_halves` returns
    them.

    The block begins at `first_column` and is 0 from `end_column` on.
    """
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        left = _load_pieces(pointer, row, first_column, end_column, stride, BLOCK_M, HALF, PIECE)
        right = _load_pieces(pointer, row, first_column + HALF, end_column, stride, BLOCK_M, HALF, PIECE)
        pieces = (left, right)
    else:
        column = first_column + tl.arange(0, COLUMNS)
        pointers = pointer + (row.to(tl.int64)[:, None] * stride + column[None, :])
        pieces = tl.load(pointers, (column < end_column)[None, :], other=0.0)
    return pieces


@triton.jit
def _store_gradients(
    d_hidden,
    pre,
    value,
    weight,
    row,
    end,
    first_column,
    d_pre_ptr,
    d_value_ptr,
    weighted_ptr,
    HIDDEN: tl.constexpr,
    PRE_SAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Store all gradients, PIECE columns at a time; return per row the sum over the columns of d_hidden * hidden.

    d_hidden: float32 `[BLOCK_M, COLUMNS]`, the gradient of hidden without the mixing weight; pre likewise, or if
    PRE_SAVED a tree of pieces, as value is. weight: float32 `[BLOCK_M]`.
    """
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        d_hidden_left, d_hidden_right = _halves(d_hidden, BLOCK_M, COLUMNS)
        if PRE_SAVED:
            pre_left, pre_right = pre
        else:
            pre_left, pre_right = _halves(pre, BLOCK_M, COLUMNS)
        sums = _store_gradients(
            d_hidden_left, pre_left, value[0], weight, row, end, first_column,
            d_pre_ptr, d_value_ptr, weighted_ptr, HIDDEN, PRE_SAVED, BLOCK_M, HALF, PIECE,
        )  # fmt: skip
        sums += _store_gradients(
            d_hidden_right, pre_right, value[1], weight, row, end, first_column + HALF,
            d_pre_ptr, d_value_ptr, weighted_ptr, HIDDEN, PRE_SAVED, BLOCK_M, HALF, PIECE,
        )  # fmt: skip
    else:
        STRIDE: tl.constexpr = 2 * HIDDEN if PRE_SAVED else HIDDEN
        TYPE: tl.constexpr = weighted_ptr.dtype.element_ty
        column = first_column + tl.arange(0, COLUMNS)
        mask = (row < end)[:, None] & (column < HIDDEN)[None, :]
        offsets = row.to(tl.int64)[:, None] * STRIDE + column[None, :]
        pre = pre.to(tl.float32)
        value = value.to(tl.float32)
        sigmoid = tl.sigmoid(pre)
        silu = pre * sigmoid
        hidden = silu * value
        weighted = weight[:, None] * d_hidden
        sums = tl.sum(tl.where((column < HIDDEN)[None, :], d_hidden * hidden, 0.0), 1)
        # d silu(pre) / d pre = s + silu (1 - s)
        tl.store(d_pre_ptr + offsets, (weighted * value * (sigmoid + silu * (1 - sigmoid))).to(TYPE), mask)
        tl.store(d_value_ptr + offsets, (weighted * silu).to(TYPE), mask)
        offsets = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        tl.store(weighted_ptr + offsets, (weight[:, None] * hidden).to(TYPE), mask)
    return sums


@triton.jit(do_not_specialize=["experts", "slots", "top_k"])
def _expert_hidden_bwd_kernel(
    d_y_ptr,
    w_out_ptr,
    saved_ptr,
    cache_ptr,
    w_gate_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    d_pre_ptr,
    d_value_ptr,
    weighted_ptr,
    partials_ptr,
    d_y_stride,
    w_out_expert_stride,
    w_out_stride,
    cache_stride,
    w_gate_expert_stride,
    w_gate_stride,
    experts,
    slots,
    top_k,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    W_OUT_TRANSPOSED: tl.constexpr,
    W_GATE_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write the gradients of pre and value, hidden times its mixing weight, and parts of the gradients of these
    weights.

    d_y `[tokens, DIM]`, the gradient of the mixed output; w_out `[experts, HIDDEN, DIM]`; saved, cache and w_gate as in
    the forward; weights float32 `[tokens, top_k]`. weighted `[slots, HIDDEN]`; d_pre and d_value likewise, or with
    cache None side by side in d_pre `[slots, 2 * HIDDEN]`; partials float32 `[column tiles, slots]`. A tile has TILE_N
    columns, because partials has a row for each tile; PIECE of them are stored at a time.
    Grid: (slots // BLOCK_M + experts) * column tiles.
    """
    expert, first, end, tile = locate_output_tile(
        offsets_ptr,
        experts,
        tl.program_id(0),
        slots // BLOCK_M + experts,
        tl.cdiv(HIDDEN, TILE_N),
        BLOCK_M,
        GROUP_M,
    )
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    place = tl.minimum(row, end - 1)
    column = tile * TILE_N + tl.arange(0, TILE_N)
    slot = tl.load(order_ptr + place)
    weight = tl.load(weights_ptr + slot)
    SAVED: tl.constexpr = 2 * HIDDEN if cache_ptr is None else HIDDEN
    # The epilogue's inputs are loaded while the products are computed.
    value = _load_pieces(
        saved_ptr + (SAVED - HIDDEN), place, tile * TILE_N, HIDDEN, SAVED, BLOCK_M, TILE_N, PIECE
    )
    if cache_ptr is None:
        d_value_ptr = d_pre_ptr + HIDDEN
        pre = _load_pieces(saved_ptr, place, tile * TILE_N, HIDDEN, SAVED, BLOCK_M, TILE_N, PIECE)
    d_hidden = _product(
        d_y_ptr + (slot // top_k).to(tl.int64) * d_y_stride * STRIDE_UNIT,
        w_out_ptr + expert.to(tl.int64) * w_out_expert_stride * STRIDE_UNIT,
        column,
        w_out_stride,
        DIM,
        HIDDEN,
        STRIDE_UNIT,
        W_OUT_TRANSPOSED,
        BLOCK_M,
        TILE_N,
        BLOCK_K,
    )
    if cache_ptr is not None:
        pre = _product(
            cache_ptr + place.to(tl.int64) * cache_stride * STRIDE_UNIT,
            w_gate_ptr + expert.to(tl.int64) * w_gate_expert_stride * STRIDE_UNIT,
            column,
            w_gate_stride,
            RANK,
            HIDDEN,
            STRIDE_UNIT,
            W_GATE_TRANSPOSED,
            BLOCK_M,
            TILE_N,
            BLOCK_K,
        )
    sums = _store_gradients(
        d_hidden,
        pre,
        value,
        weight,
        row,
        end,
        tile * TILE_N,
        d_pre_ptr,
        d_value_ptr,
        weighted_ptr,
        HIDDEN,
        cache_ptr is None,
        BLOCK_M,
        TILE_N,
        PIECE,
    )
    tl.store(partials_ptr + tile.to(tl.int64) * slots + row, sums, row < end)
