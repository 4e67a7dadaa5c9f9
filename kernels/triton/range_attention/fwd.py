"""Softmax attention of every row to its own range of keys: packed, windowed, causal and near attention alike.

Hybrid attention adds the far groups to the same sums. With F_g and z_g the state of the groups that are far from
group g, a row i of g adds exp(beta) phi(q_i) F_g to the numerator and exp(beta) phi(q_i).z_g to the normaliser.
"""

import triton
import triton.language as tl

from ..common.ranges import masked_block, tile_ranges
from ..common.rows import head_rows, load_source, row_source, store_rows
from ..common.softmax import LN_2, LOG2_E, softmax_step
from ..common.tiles import locate_tile, locate_tile_by_steps
from .far import add_far, tile_groups


@triton.jit
def _attend_block(
    query,
    keys,
    values,
    k_stride,
    v_stride,
    first_key,
    end,
    first_index,
    low,
    high,
    factor,
    sums,
    peak,
    total,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return sums, peak and total after BLOCK_K more keys; keys and values are each a `row_source`.

    low and high number the keys so that first_key is `first_index`; low is None if no row has a bound on that side.
    """
    key = load_source(keys, first_key, end, k_stride, HEAD_DIM, BLOCK_D, BLOCK_K, MASKED, USE_TMA)
    value = load_source(values, first_key, end, v_stride, HEAD_DIM, BLOCK_D, BLOCK_K, MASKED, USE_TMA)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if MASKED:
        index = first_index + tl.arange(0, BLOCK_K)
        seen = index[None, :] < high[:, None]
        if low is not None:
            seen = seen & (index[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    weights, peak, total, decay = softmax_step(scores, factor, peak, total)
    sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision="ieee")
    return sums, peak, total


@triton.jit
def _join_far(sums, peak, total, far_sums, far_total, log2_beta):
    """Return sums, peak and total with the far part of every row; its normaliser may raise the peak."""
    raised = tl.maximum(peak, log2_beta + tl.log2(far_total))
    pivot = tl.where(raised == float("-inf"), 0.0, raised)
    weight = tl.where(far_total == 0, 0.0, tl.exp2(tl.minimum(log2_beta - pivot, 120.0)))
    decay = tl.exp2(peak - pivot)
    sums = sums * decay[:, None] + far_sums * weight[:, None]
    return sums, raised, total * decay + far_total * weight


@triton.jit(do_not_specialize=["segments", "groups", "rows", "repeats"])
def _range_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ranges_ptr,
    cu_rows_ptr,
    far_ptr,
    far_z_ptr,
    beta_ptr,
    features_ptr,
    row_groups_ptr,
    segments,
    groups,
    rows,
    repeats,
    scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    features_stride,
    features_head_stride,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    USE_TMA: tl.constexpr = False,
    WARP_SPECIALIZE: tl.constexpr = False,
    LEFT_BOUND: tl.constexpr = True,
):
    """Compute one tile of rows of a segment and one head; `common/ranges.py` describes `ranges`.

    q, out: `[rows, heads, HEAD_DIM]`; k, v: `[keys, heads // repeats, HEAD_DIM]`; lse: float32 `[rows, heads]`,
    natural log; scale >= 0. Outputs are contiguous, strides are in units of STRIDE_UNIT elements. Grid: (tiles, heads).
    The tiles of the last segment also write the slack rows after it.

    far: F `[groups, kv_heads, WIDTH, HEAD_DIM]`, bfloat16 for bfloat16 inputs and else float32, or None for no far
    part. With it: far_z, float32 `[groups, kv_heads, WIDTH]`; beta, float32 `[heads]` or None for 0; features
    `[rows, heads, WIDTH]`, taken through FEATURE_MAP; row_groups: int32 `[groups + 1]`.

    USE_TMA: load keys and values through descriptors made on the device, on sm_90 and newer. The results are bitwise
    equal. The bases and the strides of q, k and v must be multiples of 16 bytes.

    WARP_SPECIALIZE, with USE_TMA and without a far part: one group of warps loads and the others multiply, one group
    for each half of the rows. Every block is masked then; LEFT_BOUND: on both sides, as a window asks for. On sm_90 the
    compiler takes BLOCK_Q 128 and num_warps 4, to which it adds 8 warps. It gives no message if it leaves the loop
    unchanged, so configs have the limit `warp_specialized`.
    """
    # Late rows go first, because they see the most keys if attention is causal.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if WARP_SPECIALIZE:
        segment, first_row = locate_tile_by_steps(cu_rows_ptr, segments, tile, BLOCK_Q)
    else:
        segment, first_row = locate_tile(cu_rows_ptr, segments, tile, BLOCK_Q)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    end_row = tl.load(cu_rows_ptr + segment + 1)
    low, high, begin, end, count, first_full, end_full = tile_ranges(
        ranges_ptr, rows, first_row, end_row, BLOCK_Q, BLOCK_K
    )
    q_ptr, q_stride = head_rows(q_ptr, head, q_head_stride, q_stride, STRIDE_UNIT)
    k_ptr, k_stride = head_rows(k_ptr, head // repeats, k_head_stride, k_stride, STRIDE_UNIT)
    v_ptr, v_stride = head_rows(v_ptr, head // repeats, v_head_stride, v_stride, STRIDE_UNIT)
    keys = row_source(k_ptr, end, k_stride, HEAD_DIM, BLOCK_D, BLOCK_K, USE_TMA)
    values = row_source(v_ptr, end, v_stride, HEAD_DIM, BLOCK_D, BLOCK_K, USE_TMA)
    queries = row_source(q_ptr, end_row, q_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, WARP_SPECIALIZE)
    query = load_source(
        queries, first_row, end_row, q_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, True, WARP_SPECIALIZE
    )
    factor = tl.maximum(scale * LOG2_E, 1e-30)  # 0 times a masked score, -inf, would be NaN

    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    masked = count - (end_full - first_full)
    if WARP_SPECIALIZE:
        # There is one loop for all blocks, in the same order. It carries low and high, counted from the block's first
        # key: otherwise the compiler makes the producer warp load them, and that warp can load only through
        # descriptors.
        origin = begin
        if LEFT_BOUND:
            low -= begin
        else:
            low = None
        high -= begin
        for block in tl.range(count, warp_specialize=True):
            full = first_full + block - masked
            place = tl.where(block < masked, masked_block(block, first_full, end_full), full)
            first_key = begin + place * BLOCK_K
            if LEFT_BOUND:
                low -= first_key - origin
            high -= first_key - origin
            origin = first_key
            sums, peak, total = _attend_block(
                query, keys, values, k_stride, v_stride, first_key, end, 0, low, high, factor, sums, peak, total,
                HEAD_DIM, BLOCK_D, BLOCK_K, True, USE_TMA,
            )  # fmt: skip
    else:
        for block in range(masked):
            first_key = begin + masked_block(block, first_full, end_full) * BLOCK_K
            sums, peak, total = _attend_block(
                query, keys, values, k_stride, v_stride, first_key, end, first_key, low, high, factor, sums, peak,
                total, HEAD_DIM, BLOCK_D, BLOCK_K, True, USE_TMA,
            )  # fmt: skip
        for block in range(first_full, end_full):
            first_key = begin + block * BLOCK_K
            sums, peak, total = _attend_block(
                query, keys, values, k_stride, v_stride, first_key, end, first_key, low, high, factor, sums, peak,
                total, HEAD_DIM, BLOCK_D, BLOCK_K, False, USE_TMA,
            )  # fmt: skip

    if far_ptr is not None:
        log2_beta = 0.0 if beta_ptr is None else tl.load(beta_ptr + head) * LOG2_E
        features_ptr, features_stride = head_rows(
            features_ptr, head, features_head_stride, features_stride, STRIDE_UNIT
        )
        far_ptr += (head // repeats).to(tl.int64) * (WIDTH * HEAD_DIM)
        far_z_ptr += (head // repeats).to(tl.int64) * WIDTH
        first_group, end_group = tile_groups(row_groups_ptr, groups, first_row, end_row, BLOCK_Q)
        # The far part has sums of its own, so that phi is computed once and not again under the final peak.
        far_sums, far_total = add_far(
            tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), features_ptr, features_stride, far_ptr, far_z_ptr,
            row_groups_ptr, first_group, end_group, first_row, end_row, heads // repeats, WIDTH, FEATURE_MAP,
            v_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_F,
        )  # fmt: skip
        sums, peak, total = _join_far(sums, peak, total, far_sums, far_total, log2_beta)

    row = first_row + tl.arange(0, BLOCK_Q)
    found = (total != 0) & (
        row < end_row
    )  # NaN counts as found, so that it propagates; slack rows take part in full blocks
    total = tl.where(found, total, 1.0)
    sums = tl.where(found[:, None], sums / total[:, None], 0.0)
    lse = tl.where(found, (peak + tl.log2(total)) * LN_2, float("-inf"))
    limit = tl.where(segment == segments - 1, rows, end_row)
    out_ptr += head * HEAD_DIM
    store_rows(out_ptr, sums, first_row, limit, heads * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_Q)
    tl.store(lse_ptr + row.to(tl.int64) * heads + head, lse, row < limit)
