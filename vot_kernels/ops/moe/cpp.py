"""The C++ backend of `moe`: blocks of the tokens of an expert, each from its rows of x to its rows of the output."""

import torch
from torch import Tensor

from vot_kernels.ops.parts.experts.cpp import bodies_backward, combine, expert_outputs, group_slots
from vot_kernels.ops.parts.experts.slots import Slots


def forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor, save: bool
) -> tuple[Tensor, Tensor, Slots]:
    """As `vot_kernels.ops.moe.torch.forward`; `projected` holds gate and value one after the other, in panels."""
    slots = group_slots(topk_idx, w_down.shape[0])
    projected = x.new_empty(slots.order.shape[0] if save else 0, w_gate_up.shape[1])
    kept = _halves(projected) if save else (None, None)
    w_gate, w_up = w_gate_up.chunk(2, dim=1)
    y = expert_outputs(x, None, w_gate, w_up, w_down, slots, topk_weights, kept)
    return y, projected, slots


def backward(
    d_y: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    projected: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_x, d_w_gate_up, d_w_down and d_topk_weights."""
    d_w_gate_up, d_w_down = (
        torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w_gate_up, w_down)
    )
    gate, value = _halves(projected)
    w_gate, w_up = w_gate_up.chunk(2, dim=1)
    d_w_gate, d_w_up = d_w_gate_up.chunk(2, dim=1)
    matrices, d_matrices = (w_gate, w_up, w_down), (d_w_gate, d_w_up, d_w_down)
    rows, _, d_weights = bodies_backward(d_y, x, gate, None, value, matrices, d_matrices, slots, topk_weights)
    d_x = combine(rows, slots, x.shape[0], None)
    return d_x, d_w_gate_up, d_w_down, d_weights.to(topk_weights.dtype)


def _halves(projected: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = projected.view(2, projected.shape[0], projected.shape[1] // 2)
    return gate, value
