"""The forward of range attention in Gluon, for sm_90: the next scores are under way during the exponentials.

Triton orders the products of a loop itself and waits for the scores before it computes their exponentials. Here every
warpgroup starts the product for the scores of block i + 1 first, then turns those of block i into weights, and then
multiplies these with the values of block i, so that its tensor cores have work meanwhile. The arguments and the results
are those of `_range_attention_fwd_kernel` with USE_TMA and without a far part.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.ranges import masked_block
from ..common.softmax import LN_2, LOG2_E
from ..common.tiles import locate_tile

# Triton 3.9 knows only the first name, 3.6 and 3.7 only the second.
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _first_key(block, begin, masked, first_full, end_full, BLOCK_K: gl.constexpr):
    """Return the first key of the `block`-th block: those that need a mask come first."""
    full = first_full + block - masked
    return begin + gl.where(block < masked, masked_block(block, first_full, end_full), full) * BLOCK_K


@gluon.jit
def _load_block(source, barriers, buffers, first_key, block, wanted, STAGES: gl.constexpr):
    """Start loading BLOCK_K rows from `first_key` on into the buffer of `block`, unless it is not wanted."""
    stage = block % STAGES
    mbarrier.expect(barriers.index(stage), source.block_type.nbytes, pred=wanted)
    _async_load(source, [first_key, 0], barriers.index(stage), buffers.index(stage), pred=wanted)


@gluon.jit
def _wait_for(barriers, block, wanted, STAGES: gl.constexpr):
    """Wait until the buffer of `block` is loaded; buffers take turns, and so do the phases of their barriers."""
    mbarrier.wait(barriers.index(block % STAGES), (block // STAGES) & 1, pred=wanted)


@gluon.jit
def _mask(scores, first_key, low, high, LAYOUT: gl.constexpr):
    """Return the scores, -inf for keys outside of a row's range."""
    index = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
    seen = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _softmax_step(scores, factor, peak, total):
    """`softmax_step` of `common/softmax.py`."""
    raised = gl.maximum(peak, gl.max(scores, 1) * factor)
    pivot = gl.where(raised == float("-inf"), 0.0, raised)
    weights = gl.exp2(scores * factor - pivot[:, None])
    decay = gl.exp2(peak - pivot)
    return weights, raised, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _attend_and_load(
    block,
    scores,
    sums,
    peak,
    total,
    query,
    key,
    value,
    keys,
    values,
    key_loaded,
    value_loaded,
    nothing,
    low,
    high,
    factor,
    begin,
    masked,
    first_full,
    end_full,
    count,
    MASKED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Return the scores of the next block, and sums, peak and total after `block`, whose scores are given.

    Its buffers are filled again with the block after STAGES more.
    """
    following = block + 1
    _wait_for(key_loaded, following, True, STAGES)
    next_key = key.index(following % STAGES).permute((1, 0))
    next_scores = warpgroup_mma(query, next_key, nothing, use_acc=False, is_async=True)
    if MASKED:
        place = _first_key(block, begin, masked, first_full, end_full, BLOCK_K)
        scores = _mask(scores, place, low, high, SCORES)
    weights, peak, total, decay = _softmax_step(scores, factor, peak, total)
    sums = sums * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
    _wait_for(value_loaded, block, True, STAGES)
    left = gl.convert_layout(weights.to(query.dtype), gl.DotOperandLayout(0, SUMS, 2))
    next_sums = warpgroup_mma(left, value.index(block % STAGES), sums, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(next_scores,))
    # All warps must have read a buffer before it is overwritten: the compiler adds a barrier between the two.
    later = block + STAGES
    place = _first_key(later, begin, masked, first_full, end_full, BLOCK_K)
    _load_block(keys, key_loaded, key, place, later, later < count, STAGES)
    sums = warpgroup_mma_wait(0, deps=(next_sums,))
    _load_block(values, value_loaded, value, place, later, later < count, STAGES)
    return scores, sums, peak, total


@gluon.jit(do_not_specialize=["segments", "rows", "repeats"])
def _range_attention_gluon_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    ranges_ptr,
    cu_rows_ptr,
    segments,
    rows,
    repeats,
    scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    STRIDE_UNIT: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    USE_TMA: gl.constexpr,
):
    """Compute one tile of rows of a segment and one head, as `_range_attention_fwd_kernel` does.

    HEAD_DIM: 64 or 128, without padding; BLOCK_Q: 16 rows for each warp; STAGES: buffers for keys, and for values.
    """
    gl.static_assert(USE_TMA == 1, "keys and values are loaded through tensor descriptors")
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_K, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROW_OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)
    QUERY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_Q, HEAD_DIM], dtype)
    KEY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, HEAD_DIM], dtype)
    # Late rows go first, because they see the most keys if attention is causal.
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    segment, first_row = locate_tile(cu_rows_ptr, segments, tile, BLOCK_Q)
    head = gl.program_id(1)
    heads = gl.num_programs(1)
    end_row = gl.load(cu_rows_ptr + segment + 1)
    high_ptr = ranges_ptr + rows.to(gl.int64)
    row = first_row + gl.arange(0, BLOCK_Q, ROW)
    low = gl.load(ranges_ptr + row, row < end_row, other=0)
    high = gl.load(high_ptr + row, row < end_row, other=0)
    occupied = first_row < end_row
    last_row = gl.minimum(first_row + BLOCK_Q, end_row) - 1
    begin = gl.load(ranges_ptr + first_row, occupied, other=0)
    end = gl.load(high_ptr + last_row, occupied, other=0)
    count = gl.cdiv(end - begin, BLOCK_K)
    first_full = gl.cdiv(gl.load(ranges_ptr + last_row, occupied, other=0) - begin, BLOCK_K)
    first_full = gl.minimum(first_full, count)
    end_full = (gl.load(high_ptr + first_row, occupied, other=0) - begin) // BLOCK_K
    end_full = gl.maximum(end_full, first_full)
    masked = count - (end_full - first_full)

    kv_head = (head // repeats).to(gl.int64)
    queries = tma.make_tensor_descriptor(
        q_ptr + head.to(gl.int64) * (q_head_stride * STRIDE_UNIT),
        [gl.maximum(end_row, 1), HEAD_DIM],
        [q_stride * STRIDE_UNIT, 1],
        [BLOCK_Q, HEAD_DIM],
        QUERY,
    )
    keys = tma.make_tensor_descriptor(
        k_ptr + kv_head * (k_head_stride * STRIDE_UNIT),
        [gl.maximum(end, 1), HEAD_DIM],
        [k_stride * STRIDE_UNIT, 1],
        [BLOCK_K, HEAD_DIM],
        KEY,
    )
    values = tma.make_tensor_descriptor(
        v_ptr + kv_head * (v_head_stride * STRIDE_UNIT),
        [gl.maximum(end, 1), HEAD_DIM],
        [v_stride * STRIDE_UNIT, 1],
        [BLOCK_K, HEAD_DIM],
        KEY,
    )
    query = gl.allocate_shared_memory(dtype, [BLOCK_Q, HEAD_DIM], QUERY)
    key = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, HEAD_DIM], KEY)
    value = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, HEAD_DIM], KEY)
    query_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    key_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_loaded, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_loaded.index(stage), count=1)
        mbarrier.init(value_loaded.index(stage), count=1)
    mbarrier.expect(query_loaded, queries.block_type.nbytes)
    _async_load(queries, [first_row, 0], query_loaded, query)
    for stage in gl.static_range(STAGES):
        place = _first_key(stage, begin, masked, first_full, end_full, BLOCK_K)
        _load_block(keys, key_loaded, key, place, stage, stage < count, STAGES)
        _load_block(values, value_loaded, value, place, stage, stage < count, STAGES)

    factor = gl.maximum(scale * LOG2_E, 1e-30)  # 0 times a masked score, -inf, would be NaN
    peak = gl.full([BLOCK_Q], float("-inf"), gl.float32, ROW)
    total = gl.full([BLOCK_Q], 0.0, gl.float32, ROW)
    sums = gl.zeros([BLOCK_Q, HEAD_DIM], gl.float32, SUMS)
    nothing = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, SCORES)
    mbarrier.wait(query_loaded, 0)
    # A tile whose rows see no key masks a block that it has not loaded.
    _wait_for(key_loaded, 0, count > 0, STAGES)
    scores = warpgroup_mma(query, key.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    for block in range(gl.minimum(masked, count - 1)):
        scores, sums, peak, total = _attend_and_load(
            block, scores, sums, peak, total, query, key, value, keys, values, key_loaded, value_loaded, nothing,
            low, high, factor, begin, masked, first_full, end_full, count, True, BLOCK_K, STAGES, SCORES, SUMS,
        )  # fmt: skip
    for block in range(masked, count - 1):
        scores, sums, peak, total = _attend_and_load(
            block, scores, sums, peak, total, query, key, value, keys, values, key_loaded, value_loaded, nothing,
            low, high, factor, begin, masked, first_full, end_full, count, False, BLOCK_K, STAGES, SCORES, SUMS,
        )  # fmt: skip
    last = gl.maximum(count - 1, 0)
    place = _first_key(last, begin, masked, first_full, end_full, BLOCK_K)
    if (last < masked) | (count == 0):
        scores = _mask(scores, place, low, high, SCORES)
    weights, peak, total, decay = _softmax_step(scores, factor, peak, total)
    sums = sums * gl.convert_layout(decay, ROW_OF_SUMS)[:, None]
    _wait_for(value_loaded, last, count > 0, STAGES)
    left = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, SUMS, 2))
    sums = warpgroup_mma(left, value.index(last % STAGES), sums)

    found = (total != 0) & (row < end_row)  # NaN counts as found, so that it propagates
    total = gl.where(found, total, 1.0)
    lse = gl.where(found, (peak + gl.log2(total)) * LN_2, float("-inf"))
    limit = gl.where(segment == segments - 1, rows, end_row)
    gl.store(lse_ptr + row.to(gl.int64) * heads + head, lse, row < limit)
    found_sums = gl.convert_layout(found, ROW_OF_SUMS)
    sums = gl.where(found_sums[:, None], sums / gl.convert_layout(total, ROW_OF_SUMS)[:, None], 0.0)
    row = first_row + gl.arange(0, BLOCK_Q, ROW_OF_SUMS)
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, SUMS))
    pointers = out_ptr + (row.to(gl.int64) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    gl.store(pointers, sums.to(dtype), (row < limit)[:, None])
