"""The dtype in which ops sum."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, promoted to at least float32."""
    return torch.promote_types(dtype, torch.float32)
