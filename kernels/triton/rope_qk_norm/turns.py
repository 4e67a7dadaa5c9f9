"""RMS norm and rotary positions of queries and keys, and their gradients.

A program works on some tokens. It computes their angles once and turns all heads of q and k by them, so every head is
read once and written once. Angles are counted in quarter turns in float64, where a far position loses nothing; what
remains of a quarter is within the range of short series for sine and cosine. The approximations of the GPU would err
by thousands of roundings at far positions.
"""

import triton
import triton.language as tl


@triton.jit
def _turns(
    positions_ptr,
    frequencies_ptr,
    token,
    packed,
    PAIRS: tl.constexpr,
    T_PAIRS: tl.constexpr,
    Y_PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return cos and sin of the tokens' angles, float32 `[tokens, 1, BLOCK_P]`.

    positions `[packed, 3]` of (t, y, x), of any dtype; frequencies float64 `[PAIRS]`, quarter turns per position. The
    first T_PAIRS belong to t, the next Y_PAIRS to y, the others to x.
    """
    pair = tl.arange(0, BLOCK_P)
    present = token < packed
    place = positions_ptr + token * 3
    t = tl.load(place, present, other=0).to(tl.float64)[:, None]
    y = tl.load(place + 1, present, other=0).to(tl.float64)[:, None]
    x = tl.load(place + 2, present, other=0).to(tl.float64)[:, None]
    position = tl.where((pair < T_PAIRS)[None, :], t, tl.where((pair < T_PAIRS + Y_PAIRS)[None, :], y, x))
    frequency = tl.load(frequencies_ptr + pair, pair < PAIRS, other=0.0)
    quarters = position * frequency[None, :]
    whole = tl.floor(quarters + 0.5)
    angle = (quarters - whole).to(tl.float32) * 1.5707963267948966
    square = angle * angle
    sine = square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    sine = angle + angle * sine
    cosine = square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square * (1 / 3628800))))
    cosine = 1 + square * (cosine - 0.5)
    quarter = whole.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    cos = tl.where(odd, sine, cosine) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    sin = tl.where(odd, cosine, sine) * tl.where(quarter >= 2, -1.0, 1.0)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def _weights(weight_ptr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the norm's weights of the first and the second half of a head, float32 `[1, 1, BLOCK_P]`."""
    pair = tl.arange(0, BLOCK_P)
    inside = pair < PAIRS
    first = tl.load(weight_ptr + pair, inside, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + PAIRS + pair, inside, other=0.0).to(tl.float32)
    return first[None, None, :], second[None, None, :]


@triton.jit
def _scale(a, b, eps, PAIRS: tl.constexpr):
    """Return 1 / sqrt(mean square + eps) of heads whose halves are a and b, `[tokens, heads, 1]`."""
    squares = tl.sum(a * a, 2, keep_dims=True) + tl.sum(b * b, 2, keep_dims=True)
    return tl.rsqrt(squares / (2 * PAIRS) + eps)


@triton.jit
def _places(token, head, stride, head_stride, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return where the first half of each head lies, `[tokens, heads, BLOCK_P]`."""
    rows = token[:, None] * stride + head.to(tl.int64)[None, :] * head_stride
    return rows[:, :, None] + tl.arange(0, BLOCK_P)[None, None, :]


@triton.jit
def _inside(present, head, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return which elements `_places` are there: those of `present` tokens."""
    pair = tl.arange(0, BLOCK_P)
    return (present[:, None] & (head < HEADS)[None, :])[:, :, None] & (pair < PAIRS)[None, None, :]


@triton.jit
def _turn_heads(
    x_ptr,
    weight_ptr,
    out_ptr,
    cos,
    sin,
    token,
    tokens,
    packed,
    eps,
    stride,
    head_stride,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Norm and turn all heads of some tokens."""
    BLOCK_H: tl.constexpr = MOST if MOST < HEADS else triton.next_power_of_2(HEADS)
    if weight_ptr is not None:
        first_weight, second_weight = _weights(weight_ptr, PAIRS, BLOCK_P)
    for start in range(0, HEADS, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        source = x_ptr + _places(token, head, stride, head_stride, PAIRS, BLOCK_P)
        inside = _inside(token < packed, head, HEADS, PAIRS, BLOCK_P)
        a = tl.load(source, inside, other=0.0).to(tl.float32)
        b = tl.load(source + PAIRS, inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            scale = tl.where((token < packed)[:, None, None], _scale(a, b, eps, PAIRS), 0.0)
            a *= scale * first_weight
            b *= scale * second_weight
        target = out_ptr + _places(token, head, HEADS * 2 * PAIRS, 2 * PAIRS, PAIRS, BLOCK_P)
        inside = _inside(token < tokens, head, HEADS, PAIRS, BLOCK_P)
        tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), inside)
        tl.store(target + PAIRS, (a * sin + b * cos).to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "packed"])
def _rope_qk_norm_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    frequencies_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    packed,
    eps,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    STRIDE_UNIT: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    T_PAIRS: tl.constexpr,
    Y_PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write q and k normed (where there is a weight) and turned; 0 in rows from `packed` on.

    q `[tokens, Q_HEADS, 2 * PAIRS]`, k `[tokens, K_HEADS, 2 * PAIRS]`, strides in units of STRIDE_UNIT elements;
    weights `[2 * PAIRS]` or None; outputs contiguous; positions and frequencies as in `_turns`.
    Grid: cdiv(tokens, BLOCK_T).
    """
    BLOCK_P: tl.constexpr = triton.next_power_of_2(PAIRS)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cos, sin = _turns(positions_ptr, frequencies_ptr, token, packed, PAIRS, T_PAIRS, Y_PAIRS, BLOCK_P)
    _turn_heads(
        q_ptr, q_weight_ptr, q_out_ptr, cos, sin, token, tokens, packed, eps,
        q_stride * STRIDE_UNIT, q_head_stride * STRIDE_UNIT, Q_HEADS, PAIRS, BLOCK_H, BLOCK_P,
    )  # fmt: skip
    _turn_heads(
        k_ptr, k_weight_ptr, k_out_ptr, cos, sin, token, tokens, packed, eps,
        k_stride * STRIDE_UNIT, k_head_stride * STRIDE_UNIT, K_HEADS, PAIRS, BLOCK_H, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _turn_heads_back(
    d_out_ptr,
    x_ptr,
    weight_ptr,
    d_x_ptr,
    partials_ptr,
    positions_ptr,
    frequencies_ptr,
    first,
    tokens,
    packed,
    eps,
    d_out_stride,
    d_out_head_stride,
    stride,
    head_stride,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    T_PAIRS: tl.constexpr,
    Y_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write the gradients of all heads of TILE tokens, and their share of the weight's gradient.

    With u = scale * x and g the gradient turned back, the weight's gradient sums g * u, and
    d_x = scale * (g * weight - u * mean(g * weight * u)).
    """
    BLOCK_H: tl.constexpr = MOST if MOST < HEADS else triton.next_power_of_2(HEADS)
    if weight_ptr is not None:
        first_weight, second_weight = _weights(weight_ptr, PAIRS, BLOCK_P)
        first_sum = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
        second_sum = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_P], tl.float32)
    for row in range(0, TILE, BLOCK_T):
        token = first + row + tl.arange(0, BLOCK_T)
        cos, sin = _turns(positions_ptr, frequencies_ptr, token, packed, PAIRS, T_PAIRS, Y_PAIRS, BLOCK_P)
        for start in range(0, HEADS, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            inside = _inside(token < packed, head, HEADS, PAIRS, BLOCK_P)
            source = d_out_ptr + _places(token, head, d_out_stride, d_out_head_stride, PAIRS, BLOCK_P)
            d_a = tl.load(source, inside, other=0.0).to(tl.float32)
            d_b = tl.load(source + PAIRS, inside, other=0.0).to(tl.float32)
            g_a = d_a * cos + d_b * sin
            g_b = d_b * cos - d_a * sin
            if weight_ptr is not None:
                source = x_ptr + _places(token, head, stride, head_stride, PAIRS, BLOCK_P)
                a = tl.load(source, inside, other=0.0).to(tl.float32)
                b = tl.load(source + PAIRS, inside, other=0.0).to(tl.float32)
                present = (token < packed)[:, None] & (head < HEADS)[None, :]
                scale = tl.where(present[:, :, None], _scale(a, b, eps, PAIRS), 0.0)
                a *= scale
                b *= scale
                first_sum += g_a * a
                second_sum += g_b * b
                g_a *= first_weight
                g_b *= second_weight
                mean = tl.sum(g_a * a, 2, keep_dims=True) + tl.sum(g_b * b, 2, keep_dims=True)
                mean /= 2 * PAIRS
                g_a = scale * (g_a - a * mean)
                g_b = scale * (g_b - b * mean)
            target = d_x_ptr + _places(token, head, HEADS * 2 * PAIRS, 2 * PAIRS, PAIRS, BLOCK_P)
            inside = _inside(token < tokens, head, HEADS, PAIRS, BLOCK_P)
            tl.store(target, g_a.to(d_x_ptr.dtype.element_ty), inside)
            tl.store(target + PAIRS, g_b.to(d_x_ptr.dtype.element_ty), inside)
    if weight_ptr is not None:
        pair = tl.arange(0, BLOCK_P)
        place = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * PAIRS) + pair
        tl.store(place, tl.sum(tl.sum(first_sum, 0), 0), pair < PAIRS)
        tl.store(place + PAIRS, tl.sum(tl.sum(second_sum, 0), 0), pair < PAIRS)


@triton.jit(do_not_specialize=["tokens", "packed"])
def _rope_qk_norm_bwd_kernel(
    d_q_out_ptr,
    d_k_out_ptr,
    q_ptr,
    k_ptr,
    positions_ptr,
    frequencies_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    q_partials_ptr,
    k_partials_ptr,
    tokens,
    packed,
    eps,
    d_q_out_stride,
    d_q_out_head_stride,
    d_k_out_stride,
    d_k_out_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    STRIDE_UNIT: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    T_PAIRS: tl.constexpr,
    Y_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write dq and dk, and every program's share of the weights' gradients, float32 `[programs, 2 * PAIRS]` or None.

    q and k are None where there is no weight, as the gradient does not depend on them then. The rest is as in the
    forward. Grid: cdiv(tokens, TILE).
    """
    BLOCK_P: tl.constexpr = triton.next_power_of_2(PAIRS)
    first = tl.program_id(0).to(tl.int64) * TILE
    _turn_heads_back(
        d_q_out_ptr, q_ptr, q_weight_ptr, dq_ptr, q_partials_ptr, positions_ptr, frequencies_ptr, first, tokens,
        packed, eps, d_q_out_stride * STRIDE_UNIT, d_q_out_head_stride * STRIDE_UNIT, q_stride * STRIDE_UNIT,
        q_head_stride * STRIDE_UNIT, Q_HEADS, PAIRS, T_PAIRS, Y_PAIRS, TILE, BLOCK_T, BLOCK_H, BLOCK_P,
    )  # fmt: skip
    _turn_heads_back(
        d_k_out_ptr, k_ptr, k_weight_ptr, dk_ptr, k_partials_ptr, positions_ptr, frequencies_ptr, first, tokens,
        packed, eps, d_k_out_stride * STRIDE_UNIT, d_k_out_head_stride * STRIDE_UNIT, k_stride * STRIDE_UNIT,
        k_head_stride * STRIDE_UNIT, K_HEADS, PAIRS, T_PAIRS, Y_PAIRS, TILE, BLOCK_T, BLOCK_H, BLOCK_P,
    )  # fmt: skip
