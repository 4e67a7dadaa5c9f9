"""Attention of queries to keys of another length by its definition: segment by segment, dense masks, autograd."""

import torch
from torch import Tensor

from vot_kernels.ops.hybrid_attention.reference import _normalised


def aligned_mask(
    rows: int, keys: int, left: int | None, right: int | None, device: torch.device | None = None
) -> Tensor:
    """Return which keys each row sees, `[rows, keys]`: from `left` before to `right` after its own position.

    Positions are counted from the end: the last row and the last key have the same position. None means no limit.
    """
    place = torch.arange(rows, device=device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    return seen


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of one segment's rows to its keys, and lse `[rows, heads]`; see `aligned_mask`.

    q `[rows, heads, head_dim]`; k, v `[keys, kv_heads, head_dim]`.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    query = q.to(compute).transpose(0, 1)
    key, value = (x.to(compute).transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
    near = aligned_mask(q.shape[0], k.shape[0], left, right, q.device)
    nothing = torch.zeros_like(near)
    similarity = torch.zeros_like(query @ key.transpose(1, 2))
    scores = scale * (query @ key.transpose(1, 2))
    out, lse = _normalised(scores, near, similarity, nothing, query.new_zeros(q.shape[1], 1, 1), value)
    return out.transpose(0, 1).to(q.dtype), lse.transpose(0, 1)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output and lse `[total_q, heads]`; 0 and -inf in rows that belong to no segment or see no key."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row, row_end, key, key_end in zip(*(x[i:] for x in bounds for i in (0, 1)), strict=False):
        if row < row_end and key < key_end:
            rows, keys = slice(row, row_end), slice(key, key_end)
            out[rows], lse[rows] = cross_attention(q[rows], k[keys], v[keys], left, right, scale)
    return out, lse
