"""The Triton backend of `moe`: grouping by expert, expert bodies, and their gradients, without waiting for the device.

All intermediate rows are in the order of places; see `Slots`.
"""

import torch
from torch import Tensor

from vot_kernels.ops.parts.experts.grouped_gemm import combine, grouped_matmul, weight_gradient
from vot_kernels.ops.parts.experts.hidden import expert_hidden, hidden_backward
from vot_kernels.ops.parts.experts.routing import group_slots, sum_partials
from vot_kernels.ops.parts.experts.slots import Slots


def forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor, save: bool
) -> tuple[Tensor, Tensor, Slots]:
    """Return y and what the backward reads: `projected`, which has no rows unless `save` is true, and the slots."""
    slots = group_slots(topk_idx, w_down.shape[0])
    w_gate, w_up = w_gate_up.chunk(2, dim=1)
    hidden, projected = expert_hidden(x, w_up, w_gate, slots, save)
    y = combine(
        grouped_matmul(hidden, w_down.transpose(1, 2), slots), slots, x.shape[0], topk_weights.float()
    )
    return y, x.new_empty(0, w_gate_up.shape[1]) if projected is None else projected, slots


def backward(
    d_y: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    projected: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d_x, d_w_gate_up, d_w_down and d_topk_weights."""
    if not slots.top_k:  # no token chose any expert
        d_x, d_w_gate_up, d_w_down, d_weights = map(torch.zeros_like, (x, w_gate_up, w_down, topk_weights))
        return d_x, d_w_gate_up, d_w_down, d_weights
    d_projected, hidden, partials = hidden_backward(
        d_y, w_down.transpose(1, 2), projected, None, topk_weights.float(), slots
    )
    d_w_down = weight_gradient(d_y, hidden, slots, gather_a=True)
    del hidden
    d_w_gate_up = weight_gradient(d_projected, x, slots, gather_b=True)
    d_x = combine(grouped_matmul(d_projected, w_gate_up, slots), slots, x.shape[0], None)
    return d_x, d_w_gate_up, d_w_down, sum_partials(partials, slots).to(topk_weights.dtype)
