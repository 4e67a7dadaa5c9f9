"""The weighted sum of past block outputs, written to be read: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_residual(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ weights[i] · states[i], summed in float32 or wider, in the dtype of the states."""
    accumulate = torch.promote_types(states[0].dtype, torch.float32)
    stacked = torch.stack(tuple(states)).to(accumulate)
    return torch.tensordot(weights.to(accumulate), stacked, dims=1).to(states[0].dtype)
