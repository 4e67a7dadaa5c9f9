"""The Triton backend of `aoe` and `moe`: routing, expert bodies, and their gradients, without a host sync.

Everything between the tokens and the output lies in the order of places (see `Slots`), so that an expert works on
rows that lie together, and no two programs write to one number.
"""

import torch
from torch import Tensor

from vot_kernels.ops.launch import ceil_div, find_config, launch
from vot_kernels.ops.parts.experts.grouped_gemm import combine, grouped_matmul, weight_gradient
from vot_kernels.ops.parts.experts.hidden import expert_hidden, hidden_backward
from vot_kernels.ops.parts.experts.routing import (
    cache_norms,
    group_slots,
    mixing_backward,
    select_experts,
    sum_partials,
)
from vot_kernels.ops.parts.experts.slots import (
    Experts,
    Saved,
    Slots,
    norm_gradient,
    norms_backward,
    over_norm,
)


def aoe_forward(
    x: Tensor, experts: Experts, bias: Tensor | None, top_k: int, weighting: str, save: bool
) -> tuple[Tensor, Saved]:
    """As `vot_kernels.ops.aoe.op.aoe_fwd` has it."""
    count = experts.w_down.shape[0]
    # Caches of the selected are cheaper to compute again than all of them to store, unless most are selected.
    squares, caches = cache_norms(x, experts.w_down, keep_cache=2 * top_k > count)
    norms, indices, weights = select_experts(squares, bias, top_k, weighting)
    slots = group_slots(indices, count)
    if caches is None:
        cache = grouped_matmul(x, experts.w_down.transpose(1, 2), slots, gather=True)
    else:
        cache = _gather_caches(caches, slots)
    hidden, value = expert_hidden(x, experts.w_p, (cache, experts.w_up), slots, save)
    y = combine(grouped_matmul(hidden, experts.w_o, slots), slots, x.shape[0], weights)
    if value is None:
        cache, value = cache[:0].clone(), hidden[:0].clone()
    return y, Saved(norms, indices, weights, cache, value, slots)


def aoe_backward(
    grad_y: Tensor | None,
    grad_norms: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `vot_kernels.ops.aoe.op.aoe_bwd` has it; the gate and the hidden activations are computed again."""
    norms, indices, weights, cache, value, slots = saved
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    gate = (cache, experts.w_up)
    grad_gate, grad_value, hidden, partials = hidden_backward(
        grad_y, experts.w_o, value, gate, weights, slots
    )
    grad_o = weight_gradient(hidden, grad_y, slots, gather_b=True)
    del hidden
    grad_p = weight_gradient(grad_value, x, slots, gather_b=True)
    grad_up = weight_gradient(grad_gate, cache, slots)
    grad_mix, scale = mixing_backward(partials, grad_weights, slots, norms, indices, weights)
    dense = weighting != "topk_softmax" or grad_norms is not None
    grad_cache = grouped_matmul(grad_gate, experts.w_up, slots, addend=None if dense else (scale, cache))
    grad_down = weight_gradient(grad_cache, x, slots, gather_b=True)
    rows = grouped_matmul(grad_value, experts.w_p, slots, second=(grad_cache, experts.w_down))
    grad_x = combine(rows, slots, x.shape[0], None)
    if dense:  # every expert's norm has a gradient: plain matrix products over all experts
        grad = norm_gradient(norms, indices, weights, grad_mix, grad_norms, weighting)
        more_x, more_down = norms_backward(x, experts.w_down, over_norm(grad, norms), x.dtype)
        grad_x, grad_down = (grad_x + more_x).to(x.dtype), (grad_down + more_down).to(x.dtype)
    return grad_x, grad_down, grad_up, grad_p, grad_o


def moe_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor, save: bool
) -> tuple[Tensor, Tensor, Slots]:
    """As `vot_kernels.ops.moe.op.moe_fwd` has it."""
    slots = group_slots(topk_idx, w_down.shape[0])
    w_gate, w_up = w_gate_up.chunk(2, dim=1)
    hidden, projected = expert_hidden(x, w_up, w_gate, slots, save)
    y = combine(
        grouped_matmul(hidden, w_down.transpose(1, 2), slots), slots, x.shape[0], topk_weights.float()
    )
    return y, x.new_empty(0, w_gate_up.shape[1]) if projected is None else projected, slots


def moe_backward(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    projected: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `vot_kernels.ops.moe.op.moe_bwd` has it."""
    grad_projected, hidden, partials = hidden_backward(
        grad, w_down.transpose(1, 2), projected, None, topk_weights.float(), slots
    )
    grad_down = weight_gradient(grad, hidden, slots, gather_a=True)
    del hidden
    grad_gate_up = weight_gradient(grad_projected, x, slots, gather_b=True)
    grad_x = combine(grouped_matmul(grad_projected, w_gate_up, slots), slots, x.shape[0], None)
    return grad_x, grad_gate_up, grad_down, sum_partials(partials, slots).to(topk_weights.dtype)


def _gather_caches(caches: Tensor, slots: Slots) -> Tensor:
    """`[slots, rank]` in the order of places, from `[tokens, experts, rank]`."""
    from vot_kernels.kernels.experts.gather import _gather_caches_kernel

    experts, rank = caches.shape[1:]
    count = slots.order.shape[0]
    out = caches.new_empty(count, rank)
    launch(
        _gather_caches_kernel,
        lambda blocks: (count // blocks["BLOCK_M"] + experts, ceil_div(rank, blocks["BLOCK_R"])),
        find_config("experts", "gather_caches", caches.device),
        caches_ptr=caches,
        out_ptr=out,
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        experts=experts,
        top_k=slots.top_k,
        RANK=rank,
    )
    return out
