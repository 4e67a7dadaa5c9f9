"""The C++ backend of `size_aware_embedding`: each row is read once and written once."""

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels


def forward(x: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """x + the row of its segment in `embedding`; zero from row `tokens` on."""
    out = x.new_empty(x.shape)
    bounds = cu_seqlens.to(torch.int32).contiguous()
    kernels().segment_add_forward(_rows(x), embedding.float().contiguous(), bounds, out)
    return out


def backward(d_out: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """d_x and d_embedding; sums run in a fixed order, without atomics."""
    d_x = d_out.new_empty(d_out.shape)
    d_embedding = embedding.new_empty(embedding.shape, dtype=torch.float32)
    bounds = cu_seqlens.to(torch.int32).contiguous()
    kernels().segment_add_backward(_rows(d_out), bounds, d_x, d_embedding)
    return d_x, d_embedding.to(embedding.dtype)


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()
