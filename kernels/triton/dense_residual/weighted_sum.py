"""The weighted sum of states, and its gradients; every state is read once, and every result is written once.

The states are a tuple of pointers, because a stacked copy would cost as much as the sum. A launcher repeats one of them
up to a power of two, so that models with many depths share few kernels; what is past `count` is neither read nor
written.

With a norm, a program has whole rows, because it needs their mean squares, and writes the sum and its RMS norm.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def _weighted_sum_kernel(out_ptr, states, weights_ptr, numbers, count, BLOCK: tl.constexpr):
    """Write out = sum of weights[i] * states[i] for i < count, summed in float32.

    out and all states: `numbers` elements of one dtype; weights `[count]`, of any dtype.
    Grid: cdiv(numbers, BLOCK).
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(states)):
        weight = tl.load(weights_ptr + i, i < count, other=0.0).to(tl.float32)
        state = tl.load(states[i] + index, inside & (i < count), other=0.0)
        total += weight * state.to(tl.float32)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count"])
def _weighted_sum_bwd_kernel(
    d_out_ptr, states, d_states, weights_ptr, partials_ptr, numbers, count, BLOCK: tl.constexpr
):
    """Write d_states[i] = weights[i] * d_out, and this block's share of every weight's gradient.

    partials: float32 `[count, programs]`; a sum over the programs completes the gradient of the weights. The rest is
    as in the forward. Grid: cdiv(numbers, BLOCK).
    """
    program = tl.program_id(0)
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numbers
    d_out = tl.load(d_out_ptr + index, inside, other=0.0).to(tl.float32)
    for i in tl.static_range(len(states)):
        mask = inside & (i < count)
        weight = tl.load(weights_ptr + i, i < count, other=0.0).to(tl.float32)
        state = tl.load(states[i] + index, mask, other=0.0).to(tl.float32)
        tl.store(d_states[i] + index, (weight * d_out).to(d_out_ptr.dtype.element_ty), mask)
        share = partials_ptr + i * tl.num_programs(0).to(tl.int64) + program
        tl.store(share, tl.sum(d_out * state, 0), i < count)


@triton.jit
def _rows(row, rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return where the elements of rows lie `[rows, BLOCK_D]`, and which of them exist."""
    column = tl.arange(0, BLOCK_D)
    return row[:, None] * WIDTH + column[None, :], (row < rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _norm_scale(x, eps, WIDTH: tl.constexpr):
    """Return 1 / sqrt(mean square + eps) of each row, `[rows, 1]`."""
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + eps)


@triton.jit(do_not_specialize=["rows", "count"])
def _weighted_sum_norm_kernel(
    out_ptr,
    normed_ptr,
    states,
    weights_ptr,
    norm_weight_ptr,
    rows,
    count,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the sum, rounded to its dtype, and the norm of that: normed = out / sqrt(mean(out^2) + eps) * norm_weight.

    out, normed and all states `[rows, WIDTH]`; norm_weight `[WIDTH]`. Grid: cdiv(rows, TILE).
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(WIDTH)
    column = tl.arange(0, BLOCK_D)
    norm_weight = tl.load(norm_weight_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
    for step in range(TILE // BLOCK_T):
        row = tl.program_id(0).to(tl.int64) * TILE + step * BLOCK_T + tl.arange(0, BLOCK_T)
        index, inside = _rows(row, rows, WIDTH, BLOCK_D)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in tl.static_range(len(states)):
            weight = tl.load(weights_ptr + i, i < count, other=0.0).to(tl.float32)
            state = tl.load(states[i] + index, inside & (i < count), other=0.0)
            total += weight * state.to(tl.float32)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + index, out, inside)
        wide = out.to(tl.float32)
        normed = wide * _norm_scale(wide, eps, WIDTH) * norm_weight[None, :]
        tl.store(normed_ptr + index, normed.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "count"])
def _weighted_sum_norm_bwd_kernel(
    d_out_ptr,
    d_normed_ptr,
    out_ptr,
    states,
    d_states,
    weights_ptr,
    norm_weight_ptr,
    partials_ptr,
    norm_partials_ptr,
    rows,
    count,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write d_states, and the shares of the gradients of the weights and of the norm's weight.

    With u = scale * out, the gradient of the sum is d_out + scale * (d_normed * w - u * mean(d_normed * w * u)).
    partials: float32 `[count, programs * TILE / BLOCK_T]`; norm_partials: float32 `[programs, WIDTH]`.
    Grid: cdiv(rows, TILE).
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(WIDTH)
    STEPS: tl.constexpr = TILE // BLOCK_T
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    norm_weight = tl.load(norm_weight_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
    norm_share = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for step in range(STEPS):
        row = program * TILE + step * BLOCK_T + tl.arange(0, BLOCK_T)
        index, inside = _rows(row, rows, WIDTH, BLOCK_D)
        unit = tl.load(out_ptr + index, inside, other=0.0).to(tl.float32)
        scale = tl.where((row < rows)[:, None], _norm_scale(unit, eps, WIDTH), 0.0)
        unit *= scale
        d_normed = tl.load(d_normed_ptr + index, inside, other=0.0).to(tl.float32)
        norm_share += d_normed * unit
        d_normed *= norm_weight[None, :]
        mean = tl.sum(d_normed * unit, 1, keep_dims=True) / WIDTH
        d_total = tl.load(d_out_ptr + index, inside, other=0.0).to(tl.float32)
        d_total += scale * (d_normed - unit * mean)
        for i in tl.static_range(len(states)):
            mask = inside & (i < count)
            weight = tl.load(weights_ptr + i, i < count, other=0.0).to(tl.float32)
            state = tl.load(states[i] + index, mask, other=0.0).to(tl.float32)
            tl.store(d_states[i] + index, (weight * d_total).to(d_out_ptr.dtype.element_ty), mask)
            share = partials_ptr + (i * tl.num_programs(0) + program) * STEPS + step
            tl.store(share, tl.sum(tl.sum(d_total * state, 1), 0), i < count)
    place = norm_partials_ptr + program * WIDTH + column
    tl.store(place, tl.sum(norm_share, 0), column < WIDTH)
