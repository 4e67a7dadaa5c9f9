"""The embedding, segment by segment, written to be read: the oracle for every backend."""

import torch
from torch import Tensor


def size_aware_embedding(
    x: Tensor, cu_seqlens: Tensor, features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Add W2 SiLU(W1 features + b1) + b2 of its segment to every token; rows beyond the last segment become 0."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    bounds = cu_seqlens.tolist()
    rows = []
    for segment, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        hidden = torch.nn.functional.silu(w1.to(accumulate) @ features[segment].to(accumulate) + b1)
        embedding = w2.to(accumulate) @ hidden + b2
        rows.append((x[start:end].to(accumulate) + embedding).to(x.dtype))
    return torch.cat([*rows, x[bounds[-1] :].clone().zero_()])  # zero_ also stops gradients that are NaN
