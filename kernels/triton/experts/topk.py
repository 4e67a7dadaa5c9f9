"""The choice of experts for a token, and their weights."""

import triton
import triton.language as tl

# The key of experts that do not exist or are already chosen, which is below the key of every number.
_TAKEN: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def ordered_key(score):
    """Return int32 keys in the order of float32 scores, above _TAKEN; 0 and -0 are equal, and NaN is the largest."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of a negative number decrease as the number increases
    key = tl.where(score == 0, 0, key)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit(do_not_specialize=["tokens"])
def _select_experts_kernel(
    squares_ptr,
    bias_ptr,
    norms_ptr,
    indices_ptr,
    weights_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write norms `[tokens, EXPERTS]`, the roots of squares; indices int64 and weights float32 `[tokens, TOP_K]`.

    The TOP_K largest of norms + bias (float32 `[EXPERTS]` or None) are chosen, largest first; ties go to the lowest
    id. Their weights are the softmax of their norms, or with SOFTMAX_FIRST their entries of the softmax of all norms.
    BLOCK: elements that a program holds, unless EXPERTS is larger.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(EXPERTS)
    ROWS: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, WIDTH)
    exists = (expert < EXPERTS)[None, :]
    mask = (token < tokens)[:, None] & exists
    place = token[:, None] * EXPERTS + expert[None, :]
    norm = tl.sqrt_rn(tl.load(squares_ptr + place, mask, other=0.0))
    tl.store(norms_ptr + place, norm, mask)

    score = norm
    if bias_ptr is not None:
        score += tl.load(bias_ptr + expert, expert < EXPERTS, other=0.0)[None, :]
    key = tl.where(exists, ordered_key(score), _TAKEN)
    choice = tl.full([ROWS, WIDTH], TOP_K, tl.int32)
    for i in range(TOP_K):
        chosen = expert[None, :] == tl.argmax(key, 1)[:, None]
        choice = tl.where(chosen, i, choice)
        key = tl.where(chosen, _TAKEN, key)

    weighted = exists if SOFTMAX_FIRST else choice < TOP_K
    logit = tl.where(weighted, norm, float("-inf"))
    weight = tl.exp(logit - tl.max(logit, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    slot = token[:, None] * TOP_K + choice
    tl.store(
        indices_ptr + slot,
        tl.broadcast_to(expert[None, :], [ROWS, WIDTH]).to(tl.int64),
        mask & (choice < TOP_K),
    )
    tl.store(weights_ptr + slot, weight, mask & (choice < TOP_K))
