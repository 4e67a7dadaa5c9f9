"""The small memory-bound ops at an encoder's sizes, against plain PyTorch as one would write it first."""

from collections.abc import Callable

import torch
from torch import Tensor

from vot_kernels.ops.dense_residual import dense_residual
from vot_kernels.ops.pack_patches import pack_patches
from vot_kernels.ops.rope_qk_norm import default_sections, rope_qk_norm
from vot_kernels.ops.size_aware_embedding import size_aware_embedding, size_features
from vot_kernels.packing import PackedLayout
from vot_kernels.reference import fused as reference

Function = Callable[..., Tensor]
Case = tuple[Function, Function, list[Tensor]]
"""Ours, plain PyTorch, and the inputs of both."""


def dense_residual_case(full: bool) -> Case:
    """Eight past states of an encoder."""
    tokens, width = (8192, 768) if full else (40, 16)
    inputs = [torch.randn(8), *(torch.randn(tokens, width) for _ in range(8))]

    def ours(weights: Tensor, *states: Tensor) -> Tensor:
        return dense_residual(states, weights)

    def plain(weights: Tensor, *states: Tensor) -> Tensor:
        return reference.dense_residual(states, weights)

    return ours, plain, inputs


def rope_qk_norm_case(full: bool) -> Case:
    """Queries and keys of one layer, 12 heads of 64."""
    grid = [(8, 24, 32), (1, 40, 51)] if full else [(2, 3, 4)]
    layout = PackedLayout.from_grid_thw([list(g) for g in grid])
    heads = 12 if full else 2
    inputs = [
        torch.randn(layout.num_tokens, heads, 64),
        torch.randn(layout.num_tokens, heads, 64),
        torch.randn(64),
    ]

    def ours(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(rope_qk_norm(q, k, layout.positions, q_weight=weight, k_weight=weight))

    def plain(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        options = {"theta": 10000.0, "sections": default_sections(32), "eps": 1e-6}
        both = reference.rope_qk_norm(q, k, layout.positions, q_weight=weight, k_weight=weight, **options)
        return torch.cat(both)

    return ours, plain, inputs


def size_aware_embedding_case(full: bool) -> Case:
    """Sixty-four images of mixed sizes."""
    count, width = (64, 768) if full else (3, 16)
    layout = PackedLayout.from_grid_thw([[1, 4 + i % 11, 5 + i % 13] for i in range(count)])
    features = size_features(layout.sizes)
    x = torch.randn(layout.num_tokens, width)
    weights = [
        torch.randn(48, features.shape[1]),
        torch.randn(48),
        torch.randn(width, 48),
        torch.randn(width),
    ]

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        return size_aware_embedding(x, layout, *weights)

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return reference.size_aware_embedding(x, layout.cu_seqlens, features, *weights)

    return ours, plain, [x, *weights]


def pack_patches_case(full: bool) -> Case:
    """Images of mixed sizes in patches of 16."""
    sizes = [(224, 224), (384, 256), (160, 480), (512, 512)] if full else [(32, 48), (16, 16)]
    inputs = [torch.randn(3, height, width) for height, width in sizes]

    def ours(*images: Tensor) -> Tensor:
        return pack_patches(images, 16)[0]

    def plain(*images: Tensor) -> Tensor:
        return reference.pack_patches(images, 16, temporal_patch_size=1)[0]

    return ours, plain, inputs


CASES: dict[str, tuple[str, Callable[[bool], Case]]] = {
    "dense_residual": ("8 states of 8,192 × 768, float32", dense_residual_case),
    "rope_qk_norm": ("8,184 tokens, 12 heads of 64, float32", rope_qk_norm_case),
    "size_aware_embedding": ("64 images, 768 wide, float32", size_aware_embedding_case),
    "pack_patches": ("4 images of 224 × 224 to 512 × 512, patches of 16, float32", pack_patches_case),
}
