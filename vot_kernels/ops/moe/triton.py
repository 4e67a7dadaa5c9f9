"""The Triton backend of `moe`: grouping by expert, expert bodies, and their gradients, without a host sync.

Rows between the tokens and the output lie in the order of places, see `Slots`.
"""

from torch import Tensor

from vot_kernels.ops.parts.experts.grouped_gemm import combine, grouped_matmul, weight_gradient
from vot_kernels.ops.parts.experts.hidden import expert_hidden, hidden_backward
from vot_kernels.ops.parts.experts.routing import group_slots, sum_partials
from vot_kernels.ops.parts.experts.slots import Slots


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
