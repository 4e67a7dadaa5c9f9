"""Linear attention of every row, given the states of its segment or, if causal, of the rows before its tile.

With v' = [v, 1], g_i = [do_i, -do_i.o_i] and c_i = 1 / Z_i, the four results are two sums of one form:

    apply kernel          o_i    = c_i phi(q_i) S,                S = sum_j phi(k_j) v'_j^T
                          dv_j   = phi(k_j) dS,                  dS = sum_i c_i phi(q_i) g_i^T
    feature grad kernel   dphi(q_i) = c_i S g_i
                          dphi(k_j) = dS v'_j

over all rows of the segment, or j <= i. A program processes the rows of one tile in blocks. If causal, it carries the
state from block to block, in reverse on the key side, and adds the triangle of its own block. The first kernel splits
S by columns and the second by rows, so that a block of it fits into registers. Rows past the last segment are slack,
which is a segment of its own whose results are 0.

With a decay, the carried state counts from the start of the block (in reverse: from its end). A row reads it
multiplied by exp(log_decay * distance) and adds itself to the next one in the same way, and the triangle decays from
row to row.
"""

from vot_kernels.kernels.group_states.states import (
    decay_over,
    dot,
    feature_map_backward,
    load_features,
    load_state,
    softmax_scale,
    tile_state,
)

import triton
import triton.language as tl

from ..common.rows import head_rows, load_block, load_column, store_block
from ..common.tiles import locate_packed_tile


@triton.jit
def _triangle(scores, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return `scores` `[rows, others]` where the other row is not later (REVERSE: not earlier), else 0."""
    row = tl.arange(0, BLOCK_T)[:, None]
    other = tl.arange(0, BLOCK_T)[None, :]
    return tl.where((row <= other) if REVERSE else (row >= other), scores, 0.0)


@triton.jit
def _products(
    x,
    y,
    x_ptr,
    y_ptr,
    row,
    stop,
    x_stride,
    y_stride,
    WIDTH: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Return x y^T `[rows, rows]`; x and y are phi of the rows from `row` on.

    Wide float32 rows are read again in parts, because beside the state no registers are left for the whole product.
    """
    ROWS: tl.constexpr = x.shape[0]
    PART: tl.constexpr = 64
    if TYPE.is_fp32() and x.shape[1] > 2 * PART:
        # Other feature maps take no scale, so the compiler drops both.
        x_scale = softmax_scale(x_ptr, row, stop, x_stride, WIDTH, ROWS)
        y_scale = softmax_scale(y_ptr, row, stop, y_stride, WIDTH, ROWS)
        products = tl.zeros([ROWS, ROWS], tl.float32)
        for column in range(0, WIDTH, PART):
            left = load_features(x_ptr, row, stop, x_stride, column, WIDTH, FEATURE_MAP, ROWS, PART, x_scale)
            right = load_features(y_ptr, row, stop, y_stride, column, WIDTH, FEATURE_MAP, ROWS, PART, y_scale)
            products += dot(left, tl.trans(right), TYPE)
    else:
        products = dot(x, tl.trans(y), TYPE)
    return products


@triton.jit
def _block_decays(log_decay, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the factors of a block: of the state as a row reads it and of a row in the next state, both `[BLOCK_T]`,
    of the state from block to block, and between two rows `[BLOCK_T, BLOCK_T]`."""
    place = tl.arange(0, BLOCK_T)
    from_start = decay_over(log_decay, place)
    to_end = decay_over(log_decay, BLOCK_T - place)
    between = decay_over(log_decay, tl.abs(place[:, None] - place[None, :]))
    across = decay_over(log_decay, tl.full([], BLOCK_T, tl.int32))
    if REVERSE:
        return to_end, from_start, across, between
    else:
        return from_start, to_end, across, between


@triton.jit
def _first_state(
    features_ptr,
    values_ptr,
    weights_ptr,
    last_ptr,
    states_ptr,
    features_stride,
    features_head_stride,
    values_stride,
    values_head_stride,
    heads,
    other_heads,
    repeats,
    head,
    segment,
    tile,
    begin,
    end,
    first,
    stop,
    row,
    column,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the block (row, column) of the state before a tile: loaded, summed over the segment, or 0.

    If CAUSAL, the slots of `states` are tiles, and the first one of a segment (REVERSE: the last one) starts from 0.
    """
    if states_ptr is not None:
        slot = segment
        present = True
        if CAUSAL:
            slot = tile
            present = (first + TILE < end) if REVERSE else (first > begin)
        kv_heads = tl.minimum(heads, other_heads)
        place = slot.to(tl.int64) * kv_heads + head * kv_heads // heads
        state_ptr = states_ptr + place * HEAD_DIM * (HEAD_DIM + 1)
        state, normaliser = load_state(state_ptr, present, row, column, HEAD_DIM, HEAD_DIM, ROWS, COLUMNS)
    elif CAUSAL:
        state = tl.zeros([ROWS, COLUMNS], tl.float32)
        normaliser = tl.zeros([ROWS], tl.float32)
    else:
        state, normaliser = tile_state(
            features_ptr, values_ptr, weights_ptr, last_ptr, features_stride, features_head_stride, values_stride,
            values_head_stride, other_heads, 1, head * other_heads // heads, repeats, None, first, stop, row, column,
            HEAD_DIM, HEAD_DIM, FEATURE_MAP, False, False, BLOCK_T, ROWS, COLUMNS,
        )  # fmt: skip
    return state, normaliser


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def _linear_apply_kernel(
    x_ptr,
    features_ptr,
    values_ptr,
    weights_ptr,
    last_ptr,
    log_decay_ptr,
    states_ptr,
    bounds_ptr,
    out_ptr,
    out_last_ptr,
    x_stride,
    x_head_stride,
    features_stride,
    features_head_stride,
    values_stride,
    values_head_stride,
    num_tokens,
    num_segments,
    heads,
    other_heads,
    repeats,
    shared,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    NORMALISE: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write out_i = phi(x_i) S_i and out_last_i = phi(x_i) z_i; NORMALISE: out divided by it, and its inverse.

    x `[tokens, heads, HEAD_DIM]`; features, values `[tokens, other_heads, HEAD_DIM]` with weights, last float32
    `[tokens, other_heads]` or None: the rows that make up S. states: a slot per segment, or per tile if CAUSAL; None
    if every segment is one tile, whose state is then summed here. out `[tokens, heads, HEAD_DIM]`, out_last float32
    `[tokens, heads]`. log_decay: float32 `[heads]` or None, causal only. With it, heads and
    other_heads both count query heads, and `shared` of them read one head of keys: of features and values, or
    (REVERSE) of x; without it `shared` is 1. Strides are in units of STRIDE_UNIT elements.
    Grid: (tokens // TILE + num_segments + 1) * heads * value blocks.
    """
    VALUE_BLOCKS: tl.constexpr = triton.cdiv(HEAD_DIM, BLOCK_V)
    BLOCK_F: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    TYPE: tl.constexpr = values_ptr.dtype.element_ty
    program = tl.program_id(0)
    column = program % VALUE_BLOCKS * BLOCK_V
    head = (program // VALUE_BLOCKS % heads).to(tl.int64)
    tile = program // (VALUE_BLOCKS * heads)
    segment, begin, end, first, stop = locate_packed_tile(bounds_ptr, num_tokens, num_segments, tile, TILE)
    if first >= end:
        return
    out_ptr += head * HEAD_DIM
    out_last_ptr += head
    blocks = tl.cdiv(stop - first, BLOCK_T)
    if segment == num_segments:
        for i in range(blocks):
            row = first + i * BLOCK_T
            nothing = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            index = row + tl.arange(0, BLOCK_T)
            store_block(out_ptr, nothing, row, stop, heads * HEAD_DIM, column, HEAD_DIM, BLOCK_T, BLOCK_V)
            mask = (index < stop) & (column == 0)
            tl.store(out_last_ptr + index.to(tl.int64) * heads, tl.zeros([BLOCK_T], tl.float32), mask)
        return

    other_head = head * other_heads // heads
    features_stride *= STRIDE_UNIT
    features_head_stride *= STRIDE_UNIT
    values_stride *= STRIDE_UNIT
    values_head_stride *= STRIDE_UNIT
    state, normaliser = _first_state(
        features_ptr, values_ptr, weights_ptr, last_ptr, states_ptr,
        features_stride, features_head_stride, values_stride, values_head_stride, heads, other_heads, repeats,
        head, segment, tile, begin, end, first, stop, 0, column, HEAD_DIM, FEATURE_MAP, CAUSAL, REVERSE, TILE,
        BLOCK_T, BLOCK_F, BLOCK_V,
    )  # fmt: skip

    if log_decay_ptr is not None:
        log_decay = tl.load(log_decay_ptr + head)
        x_decay, y_decay, across, between = _block_decays(log_decay, REVERSE, BLOCK_T)
    x_head = head // shared if REVERSE else head
    x_ptr, x_stride = head_rows(x_ptr, x_head, x_head_stride, x_stride, STRIDE_UNIT)
    for i in range(blocks):
        row = first + (blocks - 1 - i if REVERSE else i) * BLOCK_T
        x = load_features(x_ptr, row, stop, x_stride, 0, HEAD_DIM, FEATURE_MAP, BLOCK_T, BLOCK_F)
        sums = dot(x, state, TYPE)
        last = tl.sum(x * normaliser[None, :], 1)
        if log_decay_ptr is not None:
            sums *= x_decay[:, None]
            last *= x_decay
            state *= across
            normaliser *= across
        if CAUSAL:
            for repeat in range(repeats):
                other = other_head + repeat
                source = other if REVERSE else other // shared
                y_ptr = features_ptr + source * features_head_stride
                y = load_features(
                    y_ptr, row, stop, features_stride, 0, HEAD_DIM, FEATURE_MAP, BLOCK_T, BLOCK_F
                )
                values = load_block(
                    values_ptr + source * values_head_stride, row, stop, values_stride, column, HEAD_DIM, BLOCK_T,
                    BLOCK_V,
                )  # fmt: skip
                scores = _products(
                    x, y, x_ptr, y_ptr, row, stop, x_stride, features_stride, HEAD_DIM, FEATURE_MAP, TYPE
                )
                scores = _triangle(scores, REVERSE, BLOCK_T)
                if weights_ptr is not None:
                    weights = load_column(weights_ptr + other, row, stop, other_heads, BLOCK_T)
                    scores *= weights[None, :]
                    y *= weights[:, None]
                if log_decay_ptr is not None:
                    scores *= between
                    y *= y_decay[:, None]
                sums += dot(scores, values, TYPE)
                state += dot(tl.trans(y), values, TYPE)
                if last_ptr is not None:
                    y_last = load_column(last_ptr + other, row, stop, other_heads, BLOCK_T)
                    scores *= y_last[None, :]
                    y *= y_last[:, None]
                last += tl.sum(scores, 1)
                normaliser += tl.sum(y, 0)
        if NORMALISE:
            last = tl.where(last == 0, 0.0, tl.where(last < 2.0**-120, 2.0**120, 1.0 / last))
            sums *= last[:, None]
        store_block(out_ptr, sums, row, stop, heads * HEAD_DIM, column, HEAD_DIM, BLOCK_T, BLOCK_V)
        index = row + tl.arange(0, BLOCK_T)
        tl.store(out_last_ptr + index.to(tl.int64) * heads, last, (index < stop) & (column == 0))


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def _linear_feature_grad_kernel(
    x_ptr,
    own_ptr,
    features_ptr,
    values_ptr,
    weights_ptr,
    last_ptr,
    log_decay_ptr,
    out_ptr,
    out_last_ptr,
    states_ptr,
    bounds_ptr,
    d_own_ptr,
    x_stride,
    x_head_stride,
    own_stride,
    own_head_stride,
    features_stride,
    features_head_stride,
    values_stride,
    values_head_stride,
    num_tokens,
    num_segments,
    heads,
    other_heads,
    repeats,
    shared,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    KEY_SIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write d_own, the gradient of `own`: dphi(own_i) = S_i x'_i, taken through phi.

    Query side: own = q, x = do, out = o; k (features) and v (values) make up S. The weights c_i and the last column
    -do_i.o_i, which is written to `last`, belong to the rows of x. Key side: own = k, x = v with the last column
    1, out = dv; q (features) and do (values) with weights c and `last` make up S, in reverse.

    x, own, out, d_own `[tokens, heads, HEAD_DIM]`, features, values `[tokens, other_heads, HEAD_DIM]`, out and d_own
    contiguous; weights, last: float32 `[tokens, query heads]`; out_last: float32 `[tokens, heads]`, the column
    that the apply kernel wrote (key side). states, log_decay and shared as in the apply kernel, key side for REVERSE.
    Grid: (tokens // TILE + num_segments + 1) * heads * feature blocks.
    """
    FEATURE_BLOCKS: tl.constexpr = triton.cdiv(HEAD_DIM, BLOCK_F)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    TYPE: tl.constexpr = values_ptr.dtype.element_ty
    program = tl.program_id(0)
    column = program % FEATURE_BLOCKS * BLOCK_F
    head = (program // FEATURE_BLOCKS % heads).to(tl.int64)
    tile = program // (FEATURE_BLOCKS * heads)
    segment, begin, end, first, stop = locate_packed_tile(bounds_ptr, num_tokens, num_segments, tile, TILE)
    if first >= end:
        return
    d_own_ptr += head * HEAD_DIM
    blocks = tl.cdiv(stop - first, BLOCK_T)
    if segment == num_segments:
        for i in range(blocks):
            row = first + i * BLOCK_T
            nothing = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
            store_block(d_own_ptr, nothing, row, stop, heads * HEAD_DIM, column, HEAD_DIM, BLOCK_T, BLOCK_F)
        return

    other_head = head * other_heads // heads
    features_stride *= STRIDE_UNIT
    features_head_stride *= STRIDE_UNIT
    values_stride *= STRIDE_UNIT
    values_head_stride *= STRIDE_UNIT
    state, normaliser = _first_state(
        features_ptr, values_ptr, weights_ptr if KEY_SIDE else None, last_ptr if KEY_SIDE else None, states_ptr,
        features_stride, features_head_stride, values_stride, values_head_stride, heads, other_heads, repeats,
        head, segment, tile, begin, end, first, stop, column, 0, HEAD_DIM, FEATURE_MAP, CAUSAL, KEY_SIDE, TILE,
        BLOCK_T, BLOCK_F, BLOCK_D,
    )  # fmt: skip

    if log_decay_ptr is not None:
        log_decay = tl.load(log_decay_ptr + head)
        x_decay, y_decay, across, between = _block_decays(log_decay, KEY_SIDE, BLOCK_T)
    own_head = head // shared if KEY_SIDE else head
    x_ptr, x_stride = head_rows(x_ptr, own_head, x_head_stride, x_stride, STRIDE_UNIT)
    own_ptr, own_stride = head_rows(own_ptr, own_head, own_head_stride, own_stride, STRIDE_UNIT)
    out_ptr += head * HEAD_DIM
    for i in range(blocks):
        row = first + (blocks - 1 - i if KEY_SIDE else i) * BLOCK_T
        index = row + tl.arange(0, BLOCK_T)
        own = load_features(own_ptr, row, stop, own_stride, column, HEAD_DIM, FEATURE_MAP, BLOCK_T, BLOCK_F)
        x = load_block(x_ptr, row, stop, x_stride, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
        pull = None  # 0 on the query side, because the output does not change with the length of phi(q)
        if KEY_SIDE:
            x_last = tl.full([BLOCK_T], 1.0, tl.float32)
            if FEATURE_MAP == "softmax" and BLOCK_F < HEAD_DIM:
                # phi_j.(dS v'_j) = v'_j.dv'_j, over the whole row
                out = load_block(out_ptr, row, stop, heads * HEAD_DIM, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
                pull = load_column(out_last_ptr + head, row, stop, heads, BLOCK_T)
                pull += tl.sum(x.to(tl.float32) * out.to(tl.float32), 1)
        else:
            out = load_block(out_ptr, row, stop, heads * HEAD_DIM, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
            x_last = -tl.sum(x.to(tl.float32) * out.to(tl.float32), 1)
            pointers = last_ptr + head + index.to(tl.int64) * heads
            tl.store(pointers, x_last, (index < stop) & (column == 0))
        grad = dot(x, tl.trans(state), TYPE) + x_last[:, None] * normaliser[None, :]
        if log_decay_ptr is not None:
            grad *= x_decay[:, None]
            state *= across
            normaliser *= across
        if CAUSAL:
            for repeat in range(repeats):
                other = other_head + repeat
                source = other if KEY_SIDE else other // shared
                features = load_features(
                    features_ptr + source * features_head_stride, row, stop, features_stride, column, HEAD_DIM,
                    FEATURE_MAP, BLOCK_T, BLOCK_F,
                )  # fmt: skip
                y_ptr = values_ptr + source * values_head_stride
                values = load_block(y_ptr, row, stop, values_stride, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
                scores = _products(
                    x, values, x_ptr, y_ptr, row, stop, x_stride, values_stride, HEAD_DIM, "none", TYPE
                )
                if KEY_SIDE:
                    features *= load_column(weights_ptr + other, row, stop, other_heads, BLOCK_T)[:, None]
                carried = features
                if log_decay_ptr is not None:
                    carried = features * y_decay[:, None]
                if KEY_SIDE:
                    y_last = load_column(last_ptr + other, row, stop, other_heads, BLOCK_T)
                    scores += y_last[None, :]
                    normaliser += tl.sum(carried * y_last[:, None], 0)
                else:
                    scores += x_last[:, None]
                    normaliser += tl.sum(carried, 0)
                scores = _triangle(scores, KEY_SIDE, BLOCK_T)
                if log_decay_ptr is not None:
                    scores *= between
                grad += dot(scores, features, TYPE)
                state += dot(tl.trans(carried), values, TYPE)
        if not KEY_SIDE:
            grad *= load_column(weights_ptr + head, row, stop, heads, BLOCK_T)[:, None]
        if KEY_SIDE and (FEATURE_MAP == "softmax" and BLOCK_F >= HEAD_DIM):
            pull = tl.sum(own * grad, 1)
        grad = feature_map_backward(own, grad, pull, FEATURE_MAP)
        store_block(d_own_ptr, grad, row, stop, heads * HEAD_DIM, column, HEAD_DIM, BLOCK_T, BLOCK_F)
