"""The Triton backend of `aoe`: routing, expert bodies, and their gradients, without waiting for the device.

All intermediate rows are in the order of places (see `Slots`), so that each expert works on contiguous rows and no two
programs write to the same element.
"""

import torch
from torch import Tensor

from vot_kernels.ops.parts.experts.grouped_gemm import combine, grouped_matmul, weight_gradient
from vot_kernels.ops.parts.experts.hidden import expert_hidden, hidden_backward
from vot_kernels.ops.parts.experts.routing import (
    cache_norms,
    gather_caches,
    group_slots,
    mixing_backward,
    select_experts,
)
from vot_kernels.ops.parts.experts.slots import (
    Experts,
    Saved,
    norm_gradient,
    norms_backward,
)


def forward(
    x: Tensor, experts: Experts, bias: Tensor | None, top_k: int, weighting: str, save: bool
) -> tuple[Tensor, Saved]:
    """As `vot_kernels.ops.aoe.torch.forward`."""
    count = experts.w_down.shape[0]
    # Computing the selected caches again is cheaper than storing all caches, unless most of them are selected.
    squares, caches = cache_norms(x, experts.w_down, keep_cache=2 * top_k > count)
    norms, indices, weights = select_experts(squares, bias, top_k, weighting)
    slots = group_slots(indices, count)
    if caches is None:
        cache = grouped_matmul(x, experts.w_down.transpose(1, 2), slots, gather=True)
    else:
        cache = gather_caches(caches, slots)
    hidden, value = expert_hidden(x, experts.w_p, (cache, experts.w_up), slots, save)
    y = combine(grouped_matmul(hidden, experts.w_o, slots), slots, x.shape[0], weights)
    if value is None:
        cache, value = cache[:0].clone(), hidden[:0].clone()
    return y, Saved(norms, indices, weights, cache, value, slots)


def backward(
    d_y: Tensor | None,
    d_norms: Tensor | None,
    d_weights: Tensor | None,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `vot_kernels.ops.aoe.torch.backward`; the gate and the hidden activations are recomputed."""
    norms, indices, weights, cache, value, slots = saved
    d_y = torch.zeros_like(x) if d_y is None else d_y
    gate = (cache, experts.w_up)
    d_gate, d_value, hidden, partials = hidden_backward(d_y, experts.w_o, value, gate, weights, slots)
    d_w_o = weight_gradient(hidden, d_y, slots, gather_b=True)
    del hidden
    d_w_p = weight_gradient(d_value, x, slots, gather_b=True)
    d_w_up = weight_gradient(d_gate, cache, slots)
    d_mix, scale = mixing_backward(partials, d_weights, slots, norms, indices, weights)
    dense = weighting != "topk_softmax" or d_norms is not None
    d_cache = grouped_matmul(d_gate, experts.w_up, slots, addend=None if dense else (scale, cache))
    d_w_down = weight_gradient(d_cache, x, slots, gather_b=True)
    rows = grouped_matmul(d_value, experts.w_p, slots, second=(d_cache, experts.w_down))
    d_x = combine(rows, slots, x.shape[0], None)
    if dense:  # every expert's norm has a gradient: plain matrix products over all experts
        d_norms = norm_gradient(norms, indices, weights, d_mix, d_norms, weighting)
        more_x, more_down = norms_backward(x, experts.w_down, d_norms, norms, x.dtype)
        d_x, d_w_down = (d_x + more_x).to(x.dtype), (d_w_down + more_down).to(x.dtype)
    return d_x, d_w_down, d_w_up, d_w_p, d_w_o
