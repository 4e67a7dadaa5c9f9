"""Patches cut out one by one: the oracle for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_patches(
    images: Sequence[Tensor], patch_size: int, *, temporal_patch_size: int
) -> tuple[Tensor, Tensor]:
    """Cut out every patch by itself."""
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
