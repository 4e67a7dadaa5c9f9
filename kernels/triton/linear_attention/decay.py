"""The gradient of the log decay of causal linear attention: the sum of (i - j) w_ij dw_ij over the pairs j < i.

w_ij = exp(log_decay (i - j)) phi(q_i).phi(k_j) is the weight of a pair, and dw_ij = c_i g_i.v'_j is its gradient
without the decay, in the terms of `rows.py`. Within a tile the pairs are computed one by one. The distance of a pair
of different tiles is that from j to the end of its tile, plus the tiles between, plus that from the start of its tile
to i. Let F be the state of all rows before a tile, G that of all rows after it, and S and Q the tile's own states for
the rows after and before it. Then the sum over these pairs is the sum over the tiles of

    TILE exp(log_decay TILE) <F, G> + <dS / dlog_decay, G> + <F, dQ / dlog_decay>

Distances are summed directly. The difference of two sums over positions is equal, except for its rounding.
"""

from vot_kernels.kernels.group_states.states import (
    decay_over,
    dot,
    load_features,
    load_state,
    tile_state,
)

import triton
import triton.language as tl

from ..common.rows import head_rows, load_block, load_column
from ..common.tiles import locate_tile


@triton.jit(do_not_specialize=["num_segments"])
def _decay_pairs_kernel(
    query_ptr,
    d_out_ptr,
    key_ptr,
    value_ptr,
    weights_ptr,
    last_ptr,
    log_decay_ptr,
    bounds_ptr,
    out_ptr,
    query_stride,
    query_head_stride,
    d_out_stride,
    d_out_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_segments,
    heads,
    shared,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the sum over the pairs within each tile, float32 `[tiles, heads]`; 0 for a tile without rows.

    query, d_out `[tokens, heads, HEAD_DIM]`; key, value `[tokens, heads // shared, HEAD_DIM]`;
    weights, last: float32 `[tokens, heads]`, c_i and -do_i.o_i. Strides are in units of STRIDE_UNIT elements.
    Grid: (tokens // TILE + num_segments) * heads.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    TYPE: tl.constexpr = value_ptr.dtype.element_ty
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    segment, first = locate_tile(bounds_ptr, num_segments, program // heads, TILE)
    stop = tl.minimum(first + TILE, tl.load(bounds_ptr + segment + 1))
    log_decay = tl.load(log_decay_ptr + head)
    reach = tl.minimum(128.0 / tl.maximum(-log_decay, 1e-6), TILE).to(tl.int32)  # exp(-128) is 0 in float32
    query_ptr, query_stride = head_rows(query_ptr, head, query_head_stride, query_stride, STRIDE_UNIT)
    d_out_ptr, d_out_stride = head_rows(d_out_ptr, head, d_out_head_stride, d_out_stride, STRIDE_UNIT)
    key_ptr, key_stride = head_rows(key_ptr, head // shared, key_head_stride, key_stride, STRIDE_UNIT)
    value_ptr, value_stride = head_rows(
        value_ptr, head // shared, value_head_stride, value_stride, STRIDE_UNIT
    )
    place = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T], tl.float32)
    for i in range(tl.cdiv(stop - first, BLOCK_T)):
        row = first + i * BLOCK_T
        query = load_features(query_ptr, row, stop, query_stride, 0, HEAD_DIM, FEATURE_MAP, BLOCK_T, BLOCK_D)
        weights = load_column(weights_ptr + head, row, stop, heads, BLOCK_T)
        d_out = load_block(d_out_ptr, row, stop, d_out_stride, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
        last = load_column(last_ptr + head, row, stop, heads, BLOCK_T)
        for j in range(tl.maximum(i - tl.cdiv(reach, BLOCK_T), 0), i + 1):
            other = first + j * BLOCK_T
            key = load_features(key_ptr, other, stop, key_stride, 0, HEAD_DIM, FEATURE_MAP, BLOCK_T, BLOCK_D)
            value = load_block(value_ptr, other, stop, value_stride, 0, HEAD_DIM, BLOCK_T, BLOCK_D)
            # The products are computed in sequence, because the float32 operands of both do not fit into the
            # registers.
            pairs = dot(d_out, tl.trans(value), TYPE) + last[:, None]
            pairs *= weights[:, None]
            distance = (i - j) * BLOCK_T + place[:, None] - place[None, :]
            pairs *= tl.where(distance > 0, decay_over(log_decay, distance) * distance, 0.0)
            total += tl.sum(pairs * dot(query, tl.trans(key), TYPE), 1)
    tl.store(out_ptr + program, tl.sum(total))


@triton.jit(do_not_specialize=["num_segments"])
def _decay_states_kernel(
    query_ptr,
    d_out_ptr,
    key_ptr,
    value_ptr,
    weights_ptr,
    last_ptr,
    log_decay_ptr,
    before_ptr,
    after_ptr,
    bounds_ptr,
    out_ptr,
    query_stride,
    query_head_stride,
    d_out_stride,
    d_out_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_segments,
    heads,
    shared,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the sum over the pairs of different tiles, float32 `[tiles, heads, value blocks]`.

    before, after: a state per tile and head, of all rows before it and after it. The rest is as above.
    Grid: (tokens // TILE + num_segments) * heads * value blocks.
    """
    VALUE_BLOCKS: tl.constexpr = triton.cdiv(HEAD_DIM, BLOCK_V)
    BLOCK_F: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    program = tl.program_id(0)
    column = program % VALUE_BLOCKS * BLOCK_V
    head = (program // VALUE_BLOCKS % heads).to(tl.int64)
    tile = program // (VALUE_BLOCKS * heads)
    segment, first = locate_tile(bounds_ptr, num_segments, tile, TILE)
    begin = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    log_decay = tl.load(log_decay_ptr + head)
    if (first >= end) | (end - begin <= TILE):
        tl.store(out_ptr + program, 0.0)
        return

    state, last = tile_state(
        key_ptr, value_ptr, None, None, key_stride * STRIDE_UNIT, key_head_stride * STRIDE_UNIT,
        value_stride * STRIDE_UNIT, value_head_stride * STRIDE_UNIT, heads, 1, head // shared, 1, log_decay,
        first, tl.minimum(first + TILE, end), 0, column, HEAD_DIM, HEAD_DIM, FEATURE_MAP, False, True,
        BLOCK_T, BLOCK_F, BLOCK_V,
    )  # fmt: skip
    place = (tile * heads + head) * HEAD_DIM * (HEAD_DIM + 1)
    after, after_last = load_state(
        after_ptr + place, first + TILE < end, 0, column, HEAD_DIM, HEAD_DIM, BLOCK_F, BLOCK_V
    )
    before, before_last = load_state(
        before_ptr + place, first > begin, 0, column, HEAD_DIM, HEAD_DIM, BLOCK_F, BLOCK_V
    )
    across = TILE * decay_over(log_decay, tl.full([], TILE, tl.int32))
    total = tl.sum((state + across * before) * after)
    total_last = tl.sum((last + across * before_last) * after_last)
    state, last = tile_state(
        query_ptr, d_out_ptr, weights_ptr, last_ptr, query_stride * STRIDE_UNIT, query_head_stride * STRIDE_UNIT,
        d_out_stride * STRIDE_UNIT, d_out_head_stride * STRIDE_UNIT, heads, 1, head, 1, log_decay,
        first, tl.minimum(first + TILE, end), 0, column, HEAD_DIM, HEAD_DIM, FEATURE_MAP, True, True,
        BLOCK_T, BLOCK_F, BLOCK_V,
    )  # fmt: skip
    total += tl.sum(state * before)
    total_last += tl.sum(last * before_last)
    tl.store(out_ptr + program, total + tl.where(column == 0, total_last, 0.0))  # counted once, not per block
