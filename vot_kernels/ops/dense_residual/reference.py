"""The weighted sum of past block outputs, written to be read: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_residual(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ weights[i] · states[i], summed in float32 or wider, in the dtype of the states."""
    accumulate = torch.promote_types(states[0].dtype, torch.float32)
    stacked = torch.stack(tuple(states)).to(accumulate)
    return torch.tensordot(weights.to(accumulate), stacked, dims=1).to(states[0].dtype)


def dense_residual_norm(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and sum / sqrt(mean(sum²) + eps) · norm_weight over the last dimension."""
    total = dense_residual(states, weights)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.to(wide.dtype)
    return total, normed.to(total.dtype)
