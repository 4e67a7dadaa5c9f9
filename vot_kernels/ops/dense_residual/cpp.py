"""The C++ backend of `dense_residual`: one pass over the states, with the sums in registers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.dense_residual.norm import rms_norm, rms_norm_backward


def forward(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum, contiguous."""
    out = states[0].new_empty(states[0].shape)
    kernels().dense_residual_forward(_contiguous(states), weights.float().contiguous(), out)
    return out


def backward(d_out: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """d_states, contiguous, and d_weights."""
    d_states = [state.new_empty(state.shape) for state in states]
    d_weights = weights.new_empty(len(states), dtype=torch.float32)
    kernels().dense_residual_backward(
        d_out.contiguous(), _contiguous(states), weights.float().contiguous(), d_states, d_weights
    )
    return d_states, d_weights.to(weights.dtype)


def forward_norm(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum and its norm."""
    out = forward(states, weights)
    return out, rms_norm(out, norm_weight, eps)


def backward_norm(
    d_out: Tensor,
    d_normed: Tensor,
    states: Sequence[Tensor],
    weights: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """d_states, d_weights and d_norm_weight."""
    d_x, d_norm_weight = rms_norm_backward(d_normed, out, norm_weight, eps)
    return *backward((d_out + d_x).to(d_out.dtype), states, weights), d_norm_weight


def _contiguous(states: Sequence[Tensor]) -> list[Tensor]:
    return [state.contiguous() for state in states]
