"""Norm and rotation pair by pair, written to be read: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_qk_norm(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Apply the RMS norm over head_dim, then turn each pair (i, i + head_dim / 2) by its position · frequency."""
    return (
        _rope_norm(q, positions, q_weight, theta, sections, eps),
        _rope_norm(k, positions, k_weight, theta, sections, eps),
    )


def _rope_norm(
    x: Tensor, positions: Tensor, weight: Tensor | None, theta: float, sections: Sequence[int], eps: float
) -> Tensor:
    tokens, half = positions.shape[0], x.shape[-1] // 2
    wide = x[:tokens].to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide.dtype)
    pairs, pair = [], 0
    for axis, count in enumerate(sections):
        for j in range(count):
            angle = positions[:, axis, None].to(wide.dtype) * theta ** (-j / count)
            a, b = wide[..., pair], wide[..., half + pair]
            pairs.append((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))
            pair += 1
    turned = torch.stack([a for a, _ in pairs] + [b for _, b in pairs], dim=-1).to(x.dtype)
    return torch.cat([turned, torch.zeros_like(x[tokens:])])
