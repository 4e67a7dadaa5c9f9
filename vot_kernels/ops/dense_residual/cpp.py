"""The C++ backend of `dense_residual`: one pass over the states, with the sums in registers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels


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


def _contiguous(states: Sequence[Tensor]) -> list[Tensor]:
    return [state.contiguous() for state in states]
