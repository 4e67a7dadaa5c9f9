"""Patches cut out one by one: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_patches(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    temporal_patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut out every patch by itself, of the images or of (colour - mean) / std."""
    p, tp = patch_size, temporal_patch_size
    patches, grid = [], []
    for image in images:
        if mean is not None and std is not None:
            image = _normalised(image, mean, std, dtype)
        clip = image if image.ndim == 4 else image.expand(tp, *image.shape)
        frames, _, height, width = clip.shape
        grid.append([frames // tp, height // p, width // p])
        for t in range(0, frames, tp):
            for y in range(0, height, p):
                for x in range(0, width, p):
                    patch = clip[t : t + tp, :, y : y + p, x : x + p]
                    patches.append(patch.transpose(0, 1).reshape(-1))
    return torch.stack(patches), torch.tensor(grid)


def _normalised(
    image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None
) -> Tensor:
    if image.dtype == torch.uint8:
        image, dtype = image.float() / 255, dtype or torch.float32
    wide = torch.promote_types(image.dtype, torch.float32)
    channels = [(colour.to(wide) - m) / s for colour, m, s in zip(image.unbind(-3), mean, std, strict=True)]
    return torch.stack(channels, -3).to(dtype or image.dtype)
