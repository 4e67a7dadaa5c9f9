"""The PyTorch backend of `moe`: each expert is applied once, to the tokens that chose it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.parts.experts.slots import Slots, group_slots, swiglu_backward


def forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor, save: bool
) -> tuple[Tensor, Tensor, Slots]:
    """Return y and what the backward reads: `projected`, which has no rows unless `save` is true, and the slots."""
    slots = group_slots(topk_idx, w_down.shape[0])
    projected = x.new_zeros(slots.order.shape[0] if save else 0, w_gate_up.shape[1])
    y = x.new_zeros(x.shape, dtype=accumulator(x.dtype))
    weights = topk_weights.flatten().to(y.dtype)
    for expert, places, chosen in slots.by_expert():
        rows = chosen // slots.top_k
        both = x.index_select(0, rows) @ w_gate_up[expert].T
        gate, value = both.chunk(2, dim=1)
        y.index_add_(0, rows, ((F.silu(gate) * value) @ w_down[expert].T) * weights[chosen, None])
        if save:
            projected[places] = both
    return y.to(x.dtype), projected, slots


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
    accumulate = accumulator(x.dtype)
    weights = topk_weights.flatten().to(accumulate)
    d_x, d_weights = x.new_zeros(x.shape, dtype=accumulate), torch.zeros_like(weights)
    d_w_gate_up, d_w_down = (w.new_zeros(w.shape) for w in (w_gate_up, w_down))
    for expert, places, chosen in slots.by_expert():
        rows = chosen // slots.top_k
        d_out = d_y.index_select(0, rows)
        gate, value = projected[places].to(accumulate).chunk(2, dim=1)
        d_hidden = (d_out @ w_down[expert]).to(accumulate)
        *d_both, d_weight, hidden = swiglu_backward(gate, value, d_hidden, weights[chosen, None])
        d_weights[chosen] = d_weight
        d_projected = torch.cat(d_both, 1).to(x.dtype)
        d_w_down[expert] = d_out.T @ hidden.to(x.dtype)
        d_w_gate_up[expert] = d_projected.T @ x.index_select(0, rows)
        d_x.index_add_(0, rows, (d_projected @ w_gate_up[expert]).to(accumulate))
    return d_x.to(x.dtype), d_w_gate_up, d_w_down, d_weights.view(topk_weights.shape).to(topk_weights.dtype)
