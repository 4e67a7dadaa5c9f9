"""The backward of range attention: one kernel sums dq over keys, one sums dk and dv over rows.

With p = exp(scale q.k - lse) of the joint lse and D = do.o - dlse,

    dv = p^T do,   ds = p (do.v - D),   dq = scale ds k,   dk = scale ds^T q.

The first kernel also writes what the second reads of each row, by heads: lse in powers of two, and -D.

The pair is deterministic: every sum has one owner and one order. It computes 7 matrix products per block, because both
kernels compute p and do.v. The fused form computes these once, which makes 5: the first kernel leaves the keys out
(SKIP_NEAR), and the second also adds scale ds k to the float32 dq of the first (ADD_DQ), in any order of its programs.

In the far part of hybrid attention, c_i = exp(beta - lse_i) and g_i = [do_i, -D_i]. F_g is the sum of the states of
the groups far from group g, and dF_g the sum over the groups that g is far from (of c_i phi(q_i) and g_i in place of
phi(k_j) and [v_j, 1]). Then

    dphi(q_i) = c_i F_g g_i,   dphi(k_j) = dF_g [v_j, 1],   dv_j += phi(k_j) dF_g,   dbeta = sum phi(q_i).dphi(q_i).
"""

from vot_kernels.kernels.group_states.states import feature_map_backward, load_features

import triton
import triton.language as tl

from ..common.ranges import masked_block, tile_ranges
from ..common.rows import head_rows, load_rows, load_source, row_source, store_rows
from ..common.softmax import LOG2_E
from ..common.tiles import locate_tile
from .far import add_far, far_gradient, tile_groups


@triton.jit
def _add_keys(
    query,
    d_out,
    lse,
    minus_delta,
    keys,
    values,
    k_stride,
    v_stride,
    first_key,
    end,
    low,
    high,
    factor,
    dq,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return dq / scale after BLOCK_K more keys; lse is in powers of two, and +inf for rows without keys.

    keys and values are each a `row_source`.
    """
    key = load_source(keys, first_key, end, k_stride, HEAD_DIM, BLOCK_D, BLOCK_K, MASKED, USE_TMA)
    value = load_source(values, first_key, end, v_stride, HEAD_DIM, BLOCK_D, BLOCK_K, MASKED, USE_TMA)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    # Both products are under way before the exponentials, which then overlap with the second one.
    d_weights = tl.dot(d_out, tl.trans(value), input_precision="ieee")
    weights = tl.exp2(scores * factor - lse[:, None])
    if MASKED:
        index = first_key + tl.arange(0, BLOCK_K)
        seen = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (d_weights + minus_delta[:, None])
    return tl.dot(d_scores.to(key.dtype), key, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["segments", "groups", "rows", "repeats"])
def _range_attention_dq_kernel(
    d_out_ptr,
    d_lse_ptr,
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    log2_lse_ptr,
    minus_delta_ptr,
    ranges_ptr,
    cu_rows_ptr,
    far_ptr,
    far_z_ptr,
    beta_ptr,
    features_ptr,
    d_features_ptr,
    d_beta_ptr,
    far_weight_ptr,
    row_groups_ptr,
    segments,
    groups,
    rows,
    repeats,
    scale,
    d_out_stride,
    d_out_head_stride,
    out_stride,
    out_head_stride,
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
    BLOCK_W: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SKIP_NEAR: tl.constexpr = False,
    USE_TMA: tl.constexpr = False,
):
    """Write dq of one tile of rows and one head, and what the other kernel reads of these rows.

    d_out, out, q, dq: `[rows, heads, HEAD_DIM]`; lse, d_lse (or None): float32 `[rows, heads]`; log2_lse, +inf for a
    row that sees nothing, and minus_delta, -D = dlse - do.o: float32 `[heads, rows]`.
    Grid, slack and far part are as in the forward. The far part writes c to far_weight and phi(q).dphi(q) to d_beta,
    float32 `[heads, rows]`, and dphi(q) to d_features `[rows, heads, WIDTH]`, or through phi to dq if that is None.

    SKIP_NEAR: dq is the far part only, or 0. ranges, k and v are not read, and BLOCK_K is not used.
    USE_TMA: load keys and values through descriptors, as the forward does.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, first_row = locate_tile(cu_rows_ptr, segments, tile, BLOCK_Q)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    end_row = tl.load(cu_rows_ptr + segment + 1)
    if not SKIP_NEAR:
        low, high, begin, end, count, first_full, end_full = tile_ranges(
            ranges_ptr, rows, first_row, end_row, BLOCK_Q, BLOCK_K
        )
    d_out_ptr, d_out_stride = head_rows(d_out_ptr, head, d_out_head_stride, d_out_stride, STRIDE_UNIT)
    out_ptr, out_stride = head_rows(out_ptr, head, out_head_stride, out_stride, STRIDE_UNIT)
    q_ptr, q_stride = head_rows(q_ptr, head, q_head_stride, q_stride, STRIDE_UNIT)
    k_ptr, k_stride = head_rows(k_ptr, head // repeats, k_head_stride, k_stride, STRIDE_UNIT)
    v_ptr, v_stride = head_rows(v_ptr, head // repeats, v_head_stride, v_stride, STRIDE_UNIT)
    d_out = load_rows(d_out_ptr, first_row, end_row, d_out_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, True)
    out = load_rows(out_ptr, first_row, end_row, out_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, True)
    minus_delta = -tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    row = first_row + tl.arange(0, BLOCK_Q)
    source = row.to(tl.int64) * heads + head
    place = head.to(tl.int64) * rows + row
    if d_lse_ptr is not None:
        minus_delta += tl.load(d_lse_ptr + source, row < end_row, other=0.0)
    tl.store(minus_delta_ptr + place, minus_delta, row < end_row)
    lse = tl.load(lse_ptr + source, row < end_row, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    tl.store(log2_lse_ptr + place, lse, row < end_row)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if not SKIP_NEAR:
        keys = row_source(k_ptr, end, k_stride, HEAD_DIM, BLOCK_D, BLOCK_K, USE_TMA)
        values = row_source(v_ptr, end, v_stride, HEAD_DIM, BLOCK_D, BLOCK_K, USE_TMA)
        query = load_rows(q_ptr, first_row, end_row, q_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, True)
        factor = scale * LOG2_E
        for block in range(count - (end_full - first_full)):
            first_key = begin + masked_block(block, first_full, end_full) * BLOCK_K
            dq = _add_keys(
                query, d_out, lse, minus_delta, keys, values, k_stride, v_stride, first_key, end, low, high,
                factor, dq, HEAD_DIM, BLOCK_D, BLOCK_K, True, USE_TMA,
            )  # fmt: skip
        for block in range(first_full, end_full):
            first_key = begin + block * BLOCK_K
            dq = _add_keys(
                query, d_out, lse, minus_delta, keys, values, k_stride, v_stride, first_key, end, low, high,
                factor, dq, HEAD_DIM, BLOCK_D, BLOCK_K, False, USE_TMA,
            )  # fmt: skip
        dq *= scale

    limit = tl.where(segment == segments - 1, rows, end_row)
    if far_ptr is not None:
        log2_beta = 0.0 if beta_ptr is None else tl.load(beta_ptr + head) * LOG2_E
        weight = tl.exp2(tl.minimum(log2_beta - lse, 120.0))
        features_ptr, features_stride = head_rows(
            features_ptr, head, features_head_stride, features_stride, STRIDE_UNIT
        )
        far_ptr += (head // repeats).to(tl.int64) * (WIDTH * HEAD_DIM)
        far_z_ptr += (head // repeats).to(tl.int64) * WIDTH
        first, end = tile_groups(row_groups_ptr, groups, first_row, end_row, BLOCK_Q)
        d_features = far_gradient(
            d_out_ptr, d_out_stride, minus_delta, far_ptr, far_z_ptr, row_groups_ptr, first, end, first_row,
            end_row, heads // repeats, WIDTH, HEAD_DIM, BLOCK_W, BLOCK_Q, BLOCK_F,
        )  # fmt: skip
        d_features *= weight[:, None]
        features = load_features(
            features_ptr, first_row, end_row, features_stride, 0, WIDTH, FEATURE_MAP, BLOCK_Q, BLOCK_W
        )
        product = tl.sum(features * d_features, 1)
        tl.store(far_weight_ptr + place, weight, row < limit)
        tl.store(d_beta_ptr + place, product, row < limit)
        if d_features_ptr is None:
            dq += feature_map_backward(features, d_features, product, FEATURE_MAP)
        else:
            d_features_ptr += head * WIDTH
            store_rows(d_features_ptr, d_features, first_row, limit, heads * WIDTH, WIDTH, BLOCK_W, BLOCK_Q)
    dq_ptr += head * HEAD_DIM
    store_rows(dq_ptr, dq, first_row, limit, heads * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_Q)


@triton.jit
def _dq_target(
    dq_ptr,
    end,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return the target of `_add_to_dq` for the rows before `end`: a descriptor if USE_TMA, else `dq_ptr` itself.

    The descriptor ends where the rows do, so nothing is added to those of a neighbour, not even NaN times 0.
    """
    if USE_TMA:
        end = tl.maximum(end, 1)  # a descriptor cannot have 0 rows; nothing is added to this one
        target = tl.make_tensor_descriptor(
            dq_ptr, [end, heads, HEAD_DIM], [heads * HEAD_DIM, HEAD_DIM, 1], [BLOCK_Q, 1, BLOCK_D]
        )
    else:
        target = dq_ptr
    return target


@triton.jit
def _add_to_dq(
    target,
    block,
    first_row,
    end,
    head,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Add the rows before `end` of a `[BLOCK_Q, BLOCK_D]` block to dq of one head, with one addition per element."""
    if USE_TMA:
        target.atomic_add([first_row, head, 0], block.reshape(BLOCK_Q, 1, BLOCK_D))
    else:
        row = first_row + tl.arange(0, BLOCK_Q)
        column = tl.arange(0, BLOCK_D)
        pointers = target + (row.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + column[None, :]
        if MASKED:
            mask = (row < end)[:, None]
            if HEAD_DIM != BLOCK_D:
                mask = mask & (column < HEAD_DIM)[None, :]
            tl.atomic_add(pointers, block, mask, sem="relaxed")
        elif HEAD_DIM != BLOCK_D:
            tl.atomic_add(pointers, block, (column < HEAD_DIM)[None, :], sem="relaxed")
        else:
            tl.atomic_add(pointers, block, sem="relaxed")


@triton.jit
def _add_rows(
    key,
    value,
    q_ptr,
    d_out_ptr,
    log2_lse_ptr,
    minus_delta_ptr,
    q_stride,
    d_out_stride,
    heads,
    first_row,
    end,
    low,
    high,
    scale,
    dk,
    dv,
    dq,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr,
    ADD_DQ: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return dk / scale and dv after BLOCK_Q more rows of one head; if ADD_DQ, add to dq of these rows, a
    `_dq_target`.

    Scores are transposed: `[keys, rows]`.
    """
    query = load_rows(q_ptr, first_row, end, q_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, MASKED)
    d_out = load_rows(d_out_ptr, first_row, end, d_out_stride, HEAD_DIM, BLOCK_D, BLOCK_Q, MASKED)
    row = first_row + tl.arange(0, BLOCK_Q)
    if MASKED:
        lse = tl.load(log2_lse_ptr + row, row < end, other=float("inf"))
        minus_delta = tl.load(minus_delta_ptr + row, row < end, other=0.0)
    else:
        lse = tl.load(log2_lse_ptr + row)
        minus_delta = tl.load(minus_delta_ptr + row)
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    d_weights = tl.dot(value, tl.trans(d_out), input_precision="ieee")
    weights = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
    if MASKED:
        seen = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision="ieee")
    d_scores = (weights * (d_weights + minus_delta[None, :])).to(query.dtype)
    dk = tl.dot(d_scores, query, dk, input_precision="ieee")
    if ADD_DQ:
        block = tl.dot(tl.trans(d_scores), key, input_precision="ieee") * scale
        _add_to_dq(dq, block, first_row, end, head, heads, HEAD_DIM, BLOCK_D, BLOCK_Q, MASKED, USE_TMA)
    return dk, dv


@triton.jit
def _next_block(block, repeat, count):
    """Return the block after `block` of `count`, and its head; after the last one the next head begins."""
    last = block + 1 == count
    return tl.where(last, 0, block + 1), repeat + last.to(tl.int32)


@triton.jit(do_not_specialize=["segments", "groups", "keys", "rows", "repeats", "heads"])
def _range_attention_dkdv_kernel(
    d_out_ptr,
    log2_lse_ptr,
    minus_delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    dq_ptr,
    ranges_ptr,
    cu_keys_ptr,
    far_ptr,
    far_z_ptr,
    features_ptr,
    d_features_ptr,
    key_groups_ptr,
    segments,
    groups,
    keys,
    rows,
    heads,
    repeats,
    scale,
    d_out_stride,
    d_out_head_stride,
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
    BLOCK_W: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ADD_DQ: tl.constexpr = False,
    USE_TMA: tl.constexpr = False,
):
    """Write dk and dv of one tile of keys and one kv head, over the `repeats` heads that read them.

    Here `ranges` int32 `[2, keys]` are the rows that see each key, and far, far_z, features
    `[keys, kv_heads, WIDTH]` and d_features those of the key side. log2_lse, minus_delta: float32 `[heads, rows]`.
    Grid: (tiles, kv heads).

    ADD_DQ: add the part of these keys to dq, float32 `[rows, heads, HEAD_DIM]`, else None. USE_TMA: add through a
    descriptor made on the device, on sm_90 and newer; HEAD_DIM must then be a multiple of 4.
    """
    segment, first_key = locate_tile(cu_keys_ptr, segments, tl.program_id(0), BLOCK_K)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    end_key = tl.load(cu_keys_ptr + segment + 1)
    low, high, begin, end, count, first_full, end_full = tile_ranges(
        ranges_ptr, keys, first_key, end_key, BLOCK_K, BLOCK_Q
    )
    dq = None
    if ADD_DQ:
        dq = _dq_target(dq_ptr, end, heads, HEAD_DIM, BLOCK_D, BLOCK_Q, USE_TMA)
        # Keys past the end are 0. Unless their weights are masked, the weights may be infinite, and inf * 0 is NaN.
        end_full = tl.where(first_key + BLOCK_K > end_key, first_full, end_full)
    k_ptr, k_stride = head_rows(k_ptr, kv_head, k_head_stride, k_stride, STRIDE_UNIT)
    v_ptr, v_stride = head_rows(v_ptr, kv_head, v_head_stride, v_stride, STRIDE_UNIT)
    key = load_rows(k_ptr, first_key, end_key, k_stride, HEAD_DIM, BLOCK_D, BLOCK_K, True)
    value = load_rows(v_ptr, first_key, end_key, v_stride, HEAD_DIM, BLOCK_D, BLOCK_K, True)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    head = kv_head * repeats
    q_ptr, q_stride = head_rows(q_ptr, head, q_head_stride, q_stride, STRIDE_UNIT)
    q_head_stride *= STRIDE_UNIT
    d_out_ptr, d_out_stride = head_rows(d_out_ptr, head, d_out_head_stride, d_out_stride, STRIDE_UNIT)
    d_out_head_stride *= STRIDE_UNIT
    log2_lse_ptr += head.to(tl.int64) * rows
    minus_delta_ptr += head.to(tl.int64) * rows
    # Heads and blocks share one loop, because nested loops take some 30 registers more. It counts them, because a
    # division in every step takes 40 instructions.
    masked = count - (end_full - first_full)
    block = tl.full([], 0, tl.int32)
    repeat = tl.full([], 0, tl.int32)
    for _ in range(masked * repeats):
        first_row = begin + masked_block(block, first_full, end_full) * BLOCK_Q
        other = repeat.to(tl.int64)
        dk, dv = _add_rows(
            key, value, q_ptr + other * q_head_stride, d_out_ptr + other * d_out_head_stride,
            log2_lse_ptr + other * rows, minus_delta_ptr + other * rows, q_stride, d_out_stride, heads, first_row,
            end, low, high, scale, dk, dv, dq, head + repeat, HEAD_DIM, BLOCK_D, BLOCK_Q, True, ADD_DQ, USE_TMA,
        )  # fmt: skip
        block, repeat = _next_block(block, repeat, masked)
    block = tl.full([], 0, tl.int32)
    repeat = tl.full([], 0, tl.int32)
    full = end_full - first_full
    for _ in range(full * repeats):
        first_row = begin + (first_full + block) * BLOCK_Q
        other = repeat.to(tl.int64)
        dk, dv = _add_rows(
            key, value, q_ptr + other * q_head_stride, d_out_ptr + other * d_out_head_stride,
            log2_lse_ptr + other * rows, minus_delta_ptr + other * rows, q_stride, d_out_stride, heads, first_row,
            end, low, high, scale, dk, dv, dq, head + repeat, HEAD_DIM, BLOCK_D, BLOCK_Q, False, ADD_DQ, USE_TMA,
        )  # fmt: skip
        block, repeat = _next_block(block, repeat, full)

    limit = tl.where(segment == segments - 1, keys, end_key)
    inside = (first_key + tl.arange(0, BLOCK_K) < end_key)[:, None]  # slack rows take part in full blocks
    dk = tl.where(inside, dk * scale, 0.0)
    dv = tl.where(inside, dv, 0.0)
    if far_ptr is not None:
        features_ptr, features_stride = head_rows(
            features_ptr, kv_head, features_head_stride, features_stride, STRIDE_UNIT
        )
        far_ptr += kv_head.to(tl.int64) * (WIDTH * HEAD_DIM)
        far_z_ptr += kv_head.to(tl.int64) * WIDTH
        first, end = tile_groups(key_groups_ptr, groups, first_key, end_key, BLOCK_K)
        dv, _ = add_far(
            dv, features_ptr, features_stride, far_ptr, far_z_ptr, key_groups_ptr, first, end, first_key, end_key,
            kv_heads, WIDTH, FEATURE_MAP, v_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_F,
        )  # fmt: skip
    dv_ptr += kv_head * HEAD_DIM
    store_rows(dv_ptr, dv, first_key, limit, kv_heads * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_K)
    if far_ptr is not None:
        ones = tl.full([BLOCK_K], 1.0, tl.float32)
        d_features = far_gradient(
            v_ptr, v_stride, ones, far_ptr, far_z_ptr, key_groups_ptr, first, end, first_key, end_key, kv_heads,
            WIDTH, HEAD_DIM, BLOCK_W, BLOCK_K, BLOCK_F,
        )  # fmt: skip
        if d_features_ptr is None:
            features = load_features(
                features_ptr, first_key, end_key, features_stride, 0, WIDTH, FEATURE_MAP, BLOCK_K, BLOCK_W
            )
            product = tl.sum(features * d_features, 1)
            dk += feature_map_backward(features, d_features, product, FEATURE_MAP)
        else:
            d_features_ptr += kv_head * WIDTH
            store_rows(
                d_features_ptr, d_features, first_key, limit, kv_heads * WIDTH, WIDTH, BLOCK_W, BLOCK_K
            )
    dk_ptr += kv_head * HEAD_DIM
    store_rows(dk_ptr, dk, first_key, limit, kv_heads * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_K)
