"""The small fused ops, written to be read: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_residual(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ weights[i] · states[i], summed in float32 or wider, in the dtype of the states."""
    accumulate = torch.promote_types(states[0].dtype, torch.float32)
    stacked = torch.stack(tuple(states)).to(accumulate)
    return torch.tensordot(weights.to(accumulate), stacked, dims=1).to(states[0].dtype)


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
    """RMS norm over head_dim, then the pair (i, i + head_dim / 2) turns by its axis' position · frequency."""
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


def size_aware_embedding(
    x: Tensor, cu_seqlens: Tensor, features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Adds W2 SiLU(W1 features + b1) + b2 of its segment to every token; rows beyond the last are 0."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    bounds = cu_seqlens.tolist()
    rows = []
    for segment, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        hidden = torch.nn.functional.silu(w1.to(accumulate) @ features[segment].to(accumulate) + b1)
        embedding = w2.to(accumulate) @ hidden + b2
        rows.append((x[start:end].to(accumulate) + embedding).to(x.dtype))
    return torch.cat([*rows, x[bounds[-1] :].clone().zero_()])  # zero_ also stops gradients that are NaN


def pack_patches(
    images: Sequence[Tensor], patch_size: int, *, temporal_patch_size: int
) -> tuple[Tensor, Tensor]:
    """Cuts every patch out by hand."""
    p, tp = patch_size, temporal_patch_size
    patches, grid = [], []
    for image in images:
        clip = image if image.ndim == 4 else image.expand(tp, *image.shape)
        frames, _, height, width = clip.shape
        grid.append([frames // tp, height // p, width // p])
        for t in range(0, frames, tp):
            for y in range(0, height, p):
                for x in range(0, width, p):
                    patch = clip[t : t + tp, :, y : y + p, x : x + p]
                    patches.append(patch.transpose(0, 1).reshape(-1))
    return torch.stack(patches), torch.tensor(grid)
