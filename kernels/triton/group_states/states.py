"""The group states of linear attention: S_g = sum over the rows of a group of c_i phi(x_i) v_i^T, and z_g.

z_g = sum of c_i phi(x_i) u_i is the column of a value u_i appended to v_i: 1 in the forward, minus do.o in the
backward. The weight c_i is 1 in the forward. A state has `width * (head_dim + 1)` float32 elements: S
`[width, head_dim]`, then z `[width]`; states are stored as `[slots, kv_heads, width * (head_dim + 1)]`.

A group is cut into tiles of TILE rows. Tiles are summed by blocks of rows into partial states, and these in a fixed
order into one state per group (`_reduce_states_kernel`), into running sums (`_scan_states_kernel`), or into the sums
over the groups far from each group (`_far_states_kernel`). The results are bitwise equal in every run, whatever else is
packed. One partial state of 4 * width * (head_dim + 1) bytes is written
and read once per TILE rows of 4 * TILE * head_dim bytes (k and v of 16 bits). With TILE = 8 head_dim, as configured,
that is 1/8 of them; running sums take the same again.

With a decay, the rows of a tile are weighted by exp(log_decay * distance): to the start of the next tile, for the rows
after it, or (REVERSE) from the start of the tile, for the rows before it. Running sums shrink from tile to tile. Only
the last tile of a segment is short. No tile reads its state in the forward direction, nor one beyond it in reverse.
"""

import triton
import triton.language as tl

from ..common.rows import load_block, load_column
from ..common.softmax import LOG2_E
from ..common.tiles import locate_tile


@triton.jit
def _dot_in_cubes(a, b, PRECISION: tl.constexpr):
    """Return a @ b in float32. PRECISION: of the factors, if these are float32.

    Every warp would hold all of a narrow a and b, however deep they are. So a product that is deeper than wide is cut
    into parts as deep as wide, which the warps share; then the parts are summed.
    """
    ROWS: tl.constexpr = a.shape[0]
    DEPTH: tl.constexpr = a.shape[1]
    COLUMNS: tl.constexpr = b.shape[1]
    WIDTH: tl.constexpr = ROWS if ROWS > COLUMNS else COLUMNS
    if WIDTH <= 32 and DEPTH > WIDTH:
        a = tl.permute(tl.reshape(a, [ROWS, DEPTH // WIDTH, WIDTH]), [1, 0, 2])
        b = tl.reshape(b, [DEPTH // WIDTH, WIDTH, COLUMNS])
        result = tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def dot(a, b, TYPE: tl.constexpr):
    """Return a @ b in float32 for inputs that came as TYPE.

    Sums over a whole segment and quotients by them exceed the range of float16, so float16 is multiplied as tf32,
    which has its 10 bits of fraction and the range of float32.
    """
    if TYPE.is_bf16():
        result = _dot_in_cubes(a.to(tl.bfloat16), b.to(tl.bfloat16), "tf32")
    elif TYPE.is_fp16():
        result = _dot_in_cubes(a.to(tl.float32), b.to(tl.float32), "tf32")
    else:
        result = _dot_in_cubes(a, b, "ieee")
    return result


@triton.jit
def decay_over(log_decay, distance):
    """Return exp(log_decay * distance), at most 1; 1 for a distance of 0, where -inf * 0 would be NaN."""
    return tl.exp(tl.where(distance > 0, log_decay * distance, 0.0))


@triton.jit
def softmax_scale(pointer, first, end, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Return for each of ROWS rows log2(e) times the largest element, and 1 / sum(exp(x - largest)), both `[ROWS]`."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)
    x = load_block(pointer, first, end, stride, 0, WIDTH, ROWS, COLUMNS).to(tl.float32)
    x = tl.where((tl.arange(0, COLUMNS) < WIDTH)[None, :], x, float("-inf"))
    largest = tl.max(x, 1) * LOG2_E
    return largest, 1.0 / tl.sum(tl.exp2(x * LOG2_E - largest[:, None]), 1)


@triton.jit
def load_features(
    pointer,
    first,
    end,
    stride,
    column,
    WIDTH: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    scale=None,
):
    """Load phi of rows from `first` on, columns from `column` on, as float32 `[ROWS, COLUMNS]`; 0 outside.

    FEATURE_MAP: "softmax" over all WIDTH columns, "elu" (elu + 1), "relu", or "none" for given features.
    scale: what `softmax_scale` returns for these rows, if it is known.
    """
    x = load_block(pointer, first, end, stride, column, WIDTH, ROWS, COLUMNS).to(tl.float32)
    index = column + tl.arange(0, COLUMNS)
    inside = (first + tl.arange(0, ROWS) < end)[:, None] & (index < WIDTH)[None, :]
    if FEATURE_MAP == "softmax":
        if COLUMNS < WIDTH:
            if scale is None:
                scale = softmax_scale(pointer, first, end, stride, WIDTH, ROWS)
            x = tl.exp2(x * LOG2_E - scale[0][:, None]) * scale[1][:, None]
        else:
            x = tl.where((index < WIDTH)[None, :], x, float("-inf"))
            x = tl.exp2(x * LOG2_E - (tl.max(x, 1) * LOG2_E)[:, None])
            x *= (1.0 / tl.sum(x, 1))[:, None]
    elif FEATURE_MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(x))
    elif FEATURE_MAP == "relu":
        x = tl.where(x < 0, 0.0, x)  # keeps NaN, which tl.maximum would drop
    return tl.where(inside, x, 0.0)


@triton.jit
def feature_map_backward(features, gradient, product, FEATURE_MAP: tl.constexpr):
    """Return the gradient of x, given phi(x) and its gradient.

    product: of both, summed over the features; None if it is known to be 0. Only softmax needs it.
    """
    if FEATURE_MAP == "softmax":
        if product is not None:
            gradient = gradient - product[:, None]
        gradient = features * gradient
    elif FEATURE_MAP == "elu":  # elu(x) + 1 is its own derivative for x < 0
        gradient = gradient * tl.minimum(features, 1.0)
    elif FEATURE_MAP == "relu":
        gradient = tl.where(features > 0, gradient, 0.0)
    return gradient


@triton.jit
def load_state(
    state_ptr,
    present,
    row,
    column,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load S `[ROWS, COLUMNS]` from (row, column) on and z `[ROWS]`; all 0 unless `present`."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows < WIDTH) & present
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    state = tl.load(state_ptr + rows[:, None] * HEAD_DIM + columns[None, :], mask, other=0.0)
    return state, tl.load(state_ptr + WIDTH * HEAD_DIM + rows, inside, other=0.0)


@triton.jit
def tile_state(
    features_ptr,
    values_ptr,
    weights_ptr,
    last_ptr,
    features_stride,
    features_head_stride,
    values_stride,
    values_head_stride,
    numbers_stride,
    numbers_head_stride,
    first_head,
    repeats,
    log_decay,
    first,
    end,
    row,
    column,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    REVERSE: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the block (row, column) of S `[ROWS, COLUMNS]` and z `[ROWS]` over tokens first to end of `repeats` heads.

    numbers_stride, numbers_head_stride: those of weights and last, in elements.
    log_decay: a number or None. With it a token is weighted by exp(log_decay * distance), from it to `end` or
    (REVERSE) from `first` to it; MOMENT: also by the distance, which gives the derivative with respect to log_decay.
    """
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    summed = tl.zeros([BLOCK_T, ROWS], tl.float32)  # by blocks; the threads add up once, after the loop
    blocks = tl.cdiv(end - first, BLOCK_T)
    for i in range(repeats * blocks):  # one loop, so that the loads of the next head are pipelined too
        token = first + i % blocks * BLOCK_T
        head = (first_head + i // blocks).to(tl.int64)
        features = load_features(
            features_ptr + head * features_head_stride, token, end, features_stride, row, WIDTH, FEATURE_MAP,
            BLOCK_T, ROWS,
        )  # fmt: skip
        values = load_block(
            values_ptr + head * values_head_stride,
            token,
            end,
            values_stride,
            column,
            HEAD_DIM,
            BLOCK_T,
            COLUMNS,
        )
        if weights_ptr is not None:
            weights = weights_ptr + head * numbers_head_stride
            features *= load_column(weights, token, end, numbers_stride, BLOCK_T)[:, None]
        if log_decay is not None:
            place = token + tl.arange(0, BLOCK_T)
            distance = place - first if REVERSE else end - place
            weight = decay_over(log_decay, distance)
            if MOMENT:
                weight *= distance
            features *= weight[:, None]
        state += dot(tl.trans(features), values, values_ptr.dtype.element_ty)
        if last_ptr is not None:
            last = last_ptr + head * numbers_head_stride
            features *= load_column(last, token, end, numbers_stride, BLOCK_T)[:, None]
        summed += features
    return state, tl.sum(summed, 0)


@triton.jit(do_not_specialize=["num_groups"])
def _group_states_kernel(
    features_ptr,
    values_ptr,
    weights_ptr,
    last_ptr,
    log_decay_ptr,
    bounds_ptr,
    states_ptr,
    partials_ptr,
    features_stride,
    features_head_stride,
    values_stride,
    values_head_stride,
    numbers_stride,
    numbers_head_stride,
    num_groups,
    kv_heads,
    repeats,
    shared,
    STRIDE_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the state of every tile, summed over the `repeats` heads of each kv head.

    features `[tokens, kv_heads * repeats, WIDTH]`, values `[tokens, kv_heads * repeats, HEAD_DIM]`; weights, last:
    float32 `[tokens, kv_heads * repeats]`, both with the strides of the numbers, in elements, or None for 1.
    bounds: int32 `[num_groups + 1]`. states: a slot per group, written for groups of at most TILE rows, empty ones
    included; or None. partials: a slot per tile.
    log_decay: float32 `[kv_heads]` or None. With it query heads have states of their own: kv_heads counts them,
    repeats is 1, and `shared` of them read one head of features and values (else 1). Strides are in units of
    STRIDE_UNIT elements.
    Grid: (tokens // TILE + num_groups) * kv_heads * value blocks.
    """
    VALUE_BLOCKS: tl.constexpr = triton.cdiv(HEAD_DIM, BLOCK_V)
    BLOCK_W: tl.constexpr = triton.next_power_of_2(WIDTH)
    program = tl.program_id(0)
    column = program % VALUE_BLOCKS * BLOCK_V
    kv_head = program // VALUE_BLOCKS % kv_heads
    tile = program // (VALUE_BLOCKS * kv_heads)
    group, first = locate_tile(bounds_ptr, num_groups + 1, tile, TILE)  # the last group is the slack
    if group == num_groups:
        return
    begin = tl.load(bounds_ptr + group)
    end = tl.load(bounds_ptr + group + 1)
    if (first >= end) & (first > begin):
        return

    log_decay = None
    if log_decay_ptr is not None:
        log_decay = tl.load(log_decay_ptr + kv_head)
    state, normaliser = tile_state(
        features_ptr, values_ptr, weights_ptr, last_ptr, features_stride * STRIDE_UNIT,
        features_head_stride * STRIDE_UNIT, values_stride * STRIDE_UNIT, values_head_stride * STRIDE_UNIT,
        numbers_stride, numbers_head_stride, kv_head * repeats // shared, repeats, log_decay, first,
        tl.minimum(first + TILE, end), 0, column, WIDTH, HEAD_DIM, FEATURE_MAP, REVERSE, False, BLOCK_T, BLOCK_W,
        BLOCK_V,
    )  # fmt: skip
    SIZE: tl.constexpr = WIDTH * (HEAD_DIM + 1)
    target = partials_ptr + (tile.to(tl.int64) * kv_heads + kv_head) * SIZE
    if states_ptr is not None:
        whole = states_ptr + (group.to(tl.int64) * kv_heads + kv_head) * SIZE
        target = tl.where(end - begin <= TILE, whole, target)
    row = tl.arange(0, BLOCK_W)
    index = column + tl.arange(0, BLOCK_V)
    mask = (row < WIDTH)[:, None] & (index < HEAD_DIM)[None, :]
    tl.store(target + row[:, None] * HEAD_DIM + index[None, :], state, mask)
    tl.store(target + WIDTH * HEAD_DIM + row, normaliser, (row < WIDTH) & (column == 0))


@triton.jit(do_not_specialize=["kv_heads"])
def _reduce_states_kernel(
    states_ptr,
    partials_ptr,
    bounds_ptr,
    kv_heads,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the state of each group of more than TILE rows from the states of its tiles.

    Grid: groups * kv_heads * cdiv(SIZE, BLOCK).
    """
    BLOCKS: tl.constexpr = triton.cdiv(SIZE, BLOCK)
    program = tl.program_id(0)
    element = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    kv_head = program // BLOCKS % kv_heads
    group = program // (BLOCKS * kv_heads)
    begin = tl.load(bounds_ptr + group)
    count = tl.cdiv(tl.load(bounds_ptr + group + 1) - begin, TILE)
    if count <= 1:
        return
    source = partials_ptr + ((begin // TILE + group).to(tl.int64) * kv_heads + kv_head) * SIZE
    stride = kv_heads.to(tl.int64) * SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, BLOCK_TILES):
        tile = i + tl.arange(0, BLOCK_TILES)
        mask = (tile < count)[:, None] & (element < SIZE)[None, :]
        total += tl.sum(tl.load(source + tile[:, None] * stride + element[None, :], mask, other=0.0), 0)
    target = states_ptr + (group.to(tl.int64) * kv_heads + kv_head) * SIZE
    tl.store(target + element, total, element < SIZE)


@triton.jit
def _decayed_sums(state, running, log_step, COUNT: tl.constexpr):
    """Return y_i = state_i + exp(log_step) y_(i-1) of `state` `[COUNT, ...]` with y_(-1) = `running`, and the last y.

    The factor of each term is an exponential itself, not a product of rounded factors.
    """
    place = tl.arange(0, COUNT)
    distance = place[:, None] - place[None, :]
    weights = tl.where(distance >= 0, decay_over(log_step, distance), 0.0)
    sums = tl.sum(weights[:, :, None] * state[None, :, :], 1)
    sums += decay_over(log_step, place + 1)[:, None] * running[None, :]
    return sums, tl.sum(tl.where(place[:, None] == COUNT - 1, sums, 0.0), 0)


@triton.jit(do_not_specialize=["kv_heads", "lag"])
def _scan_states_kernel(
    states_ptr,
    sums_ptr,
    log_decay_ptr,
    bounds_ptr,
    kv_heads,
    lag,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write sums[i] = sum of states[j] over j <= i - lag within each segment; REVERSE: over j >= i + lag.

    TILE > 0: slots are tiles, and bounds holds rows (cu_seqlens). TILE == 0: slots are groups, and bounds
    holds groups (segment_groups). log_decay: float32 `[kv_heads]` or None, for tiles only: a state n slots farther than
    the nearest in the sum is weighted by exp(n * TILE * log_decay).
    Grid: segments * kv_heads * cdiv(SIZE, BLOCK).
    """
    BLOCKS: tl.constexpr = triton.cdiv(SIZE, BLOCK)
    program = tl.program_id(0)
    element = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    kv_head = program // BLOCKS % kv_heads
    segment = program // (BLOCKS * kv_heads)
    first = tl.load(bounds_ptr + segment)
    count = tl.load(bounds_ptr + segment + 1) - first
    if TILE > 0:
        count = tl.cdiv(count, TILE)
        first = first // TILE + segment
    offset = (first.to(tl.int64) * kv_heads + kv_head) * SIZE
    stride = kv_heads.to(tl.int64) * SIZE
    running = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, BLOCK_TILES):
        place = i + tl.arange(0, BLOCK_TILES)
        source = place - lag
        target = place
        if REVERSE:
            source = count - 1 - source
            target = count - 1 - target
        inside = (element < SIZE)[None, :]
        mask = ((place >= lag) & (place < count))[:, None] & inside
        state = tl.load(states_ptr + offset + source[:, None] * stride + element[None, :], mask, other=0.0)
        if log_decay_ptr is not None:
            log_step = tl.load(log_decay_ptr + kv_head) * TILE
            sums, running = _decayed_sums(state, running, log_step, BLOCK_TILES)
        else:
            sums = tl.cumsum(state, 0) + running[None, :]
            running += tl.sum(state, 0)
        pointers = sums_ptr + offset + target[:, None] * stride + element[None, :]
        mask = (place < count)[:, None] & inside
        tl.store(pointers, sums, mask)


@triton.jit
def _load_group_states(
    partials_ptr,
    cu_groups_ptr,
    group,
    mask,
    kv_heads,
    kv_head,
    element,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the states `[groups, elements]` of the groups `group`, summed over their tiles; 0 outside of `mask`."""
    begin = tl.load(cu_groups_ptr + group, mask, other=0)
    count = tl.cdiv(tl.load(cu_groups_ptr + group + 1, mask, other=0) - begin, TILE)
    source = partials_ptr + ((begin // TILE + group).to(tl.int64) * kv_heads + kv_head)[:, None] * SIZE
    states = tl.zeros([group.shape[0], element.shape[0]], tl.float32)
    for tile in range(tl.max(count)):
        inside = (mask & (tile < count))[:, None] & (element < SIZE)[None, :]
        states += tl.load(source + element[None, :], inside, other=0.0)
        source += kv_heads.to(tl.int64) * SIZE
    return states


@triton.jit(do_not_specialize=["kv_heads", "behind", "ahead"])
def _far_states_kernel(
    sums_ptr,
    normalisers_ptr,
    partials_ptr,
    later_ptr,
    cu_groups_ptr,
    segment_groups_ptr,
    kv_heads,
    behind,
    ahead,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write F_g and z_g, the sum over the states of the groups up to g - behind and from g + ahead on, per segment.

    BEHIND, AHEAD: whether there is that side. sums: `[groups, kv_heads, WIDTH, HEAD_DIM]`, rounded to its dtype;
    normalisers: float32 `[groups, kv_heads, WIDTH]`; partials: a slot per tile. later: float32 scratch with a slot
    per block of TILE_GROUPS groups, numbered as tiles are, or None without AHEAD: the sum of what follows the block.
    cu_groups: int32 `[groups + 1]`, segment_groups: int32 `[segments + 1]`.
    Grid: segments * kv_heads * cdiv(WIDTH * (HEAD_DIM + 1), BLOCK).
    """
    SIZE: tl.constexpr = WIDTH * (HEAD_DIM + 1)
    BLOCKS: tl.constexpr = triton.cdiv(SIZE, BLOCK)
    program = tl.program_id(0)
    element = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    kv_head = program // BLOCKS % kv_heads
    segment = program // (BLOCKS * kv_heads)
    first = tl.load(segment_groups_ptr + segment)
    end = tl.load(segment_groups_ptr + segment + 1)
    blocks = tl.cdiv(end - first, TILE_GROUPS)
    place = first + tl.arange(0, TILE_GROUPS)
    if AHEAD:
        running = tl.zeros([BLOCK], tl.float32)
        slot = (first // TILE_GROUPS + segment).to(tl.int64)
        for step in range(blocks - 1):
            block = blocks - 1 - step
            group = place + block * TILE_GROUPS + ahead
            states = _load_group_states(
                partials_ptr, cu_groups_ptr, group, group < end, kv_heads, kv_head, element, SIZE, TILE
            )
            running += tl.sum(states, 0)
            target = later_ptr + ((slot + block - 1) * kv_heads + kv_head) * SIZE
            tl.store(target + element, running, element < SIZE)
        tl.debug_barrier()  # other threads read what was stored here
    running = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        own = place + block * TILE_GROUPS
        sums = tl.zeros([TILE_GROUPS, BLOCK], tl.float32)
        if BEHIND:
            group = own - behind
            mask = (group >= first) & (own < end)
            states = _load_group_states(
                partials_ptr, cu_groups_ptr, group, mask, kv_heads, kv_head, element, SIZE, TILE
            )
            sums += tl.cumsum(states, 0) + running[None, :]
            running += tl.sum(states, 0)
        if AHEAD:
            group = own + ahead
            states = _load_group_states(
                partials_ptr, cu_groups_ptr, group, group < end, kv_heads, kv_head, element, SIZE, TILE
            )
            source = later_ptr + ((slot + block) * kv_heads + kv_head) * SIZE
            later = tl.load(source + element, (element < SIZE) & (block < blocks - 1), other=0.0)
            sums += tl.cumsum(states, 0, reverse=True) + later[None, :]
        row = own.to(tl.int64) * kv_heads + kv_head
        is_sum = (element < WIDTH * HEAD_DIM)[None, :]
        inside = (own < end)[:, None]
        pointers = sums_ptr + row[:, None] * (WIDTH * HEAD_DIM) + element[None, :]
        tl.store(pointers, sums.to(sums_ptr.dtype.element_ty), inside & is_sum)
        pointers = normalisers_ptr + row[:, None] * WIDTH + (element - WIDTH * HEAD_DIM)[None, :]
        tl.store(pointers, sums, inside & ~is_sum & (element < SIZE)[None, :])
