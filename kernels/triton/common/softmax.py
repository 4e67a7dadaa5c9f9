"""Softmax over blocks of keys, in powers of two.

In the usual names of flash attention, `peak` is m_i, the running maximum of a row; `total` is l_i, the running sum
of its weights; `sums` is acc, the running sum of its weighted values; and `decay` is alpha, which rescales them.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(scores, factor, peak, total):
    """Return the weights exp2(factor * scores - peak) under the updated peak, that peak, the total, the decay of old
    sums.

    scores: `[rows, keys]`, -inf where masked; factor > 0; peak, total: `[rows]`, -inf and 0 before the first
    block. A peak stays -inf while a row has seen nothing; its weights are 0 and not NaN.
    """
    raised = tl.maximum(peak, tl.max(scores, 1) * factor)
    pivot = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores * factor - pivot[:, None])
    decay = tl.exp2(peak - pivot)
    return weights, raised, total * decay + tl.sum(weights, 1), decay
