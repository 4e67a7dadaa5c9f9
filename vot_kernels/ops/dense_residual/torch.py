"""The PyTorch backend of `dense_residual`: block by block, so that the running sum stays in a CPU's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.ops.dense_residual.norm import rms_norm, rms_norm_backward
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.parts.row_blocks import row_blocks


def forward(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum as a contiguous tensor."""
    accumulate = accumulator(states[0].dtype)
    out = states[0].new_empty(states[0].shape)
    flat_out, (first, *others) = out.view(-1), [state.reshape(-1) for state in states]
    scale, *scales = weights.to(accumulate).unbind()
    for block in row_blocks(out.numel(), 1, out.device):
        result = flat_out[block]
        total = result if result.dtype == accumulate else torch.empty_like(result, dtype=accumulate)
        torch.mul(first[block].to(accumulate), scale, out=total)
        for state, other_scale in zip(others, scales, strict=True):
            total.addcmul_(state[block], other_scale)
        if total is not result:
            result.copy_(total)
    return out


def backward(d_out: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return d_states, each contiguous, and d_weights."""
    accumulate = accumulator(d_out.dtype)
    d_states = [state.new_empty(state.shape) for state in states]
    flat_d_out = d_out.reshape(-1)
    flat = [
        (state.reshape(-1), d_state.view(-1), scale)
        for state, d_state, scale in zip(states, d_states, weights.to(accumulate), strict=True)
    ]
    blocks = list(row_blocks(d_out.numel(), 1, d_out.device))
    d_weights = weights.new_empty(
        len(states), len(blocks), dtype=accumulate
    )  # the contribution of each block
    for column, block in enumerate(blocks):
        d_block = flat_d_out[block].to(accumulate)
        for row, (state, d_state, scale) in enumerate(flat):
            torch.mul(d_block, scale, out=d_state[block])
            d_weights[row, column] = (d_block * state[block]).sum()
    return d_states, d_weights.sum(1).to(weights.dtype)


def forward_norm(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm."""
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
    """Return d_states, d_weights and d_norm_weight."""
    d_x, d_norm_weight = rms_norm_backward(d_normed, out, norm_weight, eps)
    return *backward(d_out + d_x, states, weights), d_norm_weight
