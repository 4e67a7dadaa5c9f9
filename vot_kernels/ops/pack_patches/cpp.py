"""The C++ backend of `pack_patches`: a row of patches at a time, each number read once and written once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.pack_patches.normalise import Normalise


def forward(
    images: Sequence[Tensor], patch_size: int, temporal_patch_size: int, normalise: Normalise
) -> Tensor:
    """`[patches, channels · temporal_patch_size · patch_size²]`."""
    images = normalise.images(images)
    width = images[0].shape[-3] * temporal_patch_size * patch_size**2
    still = width // temporal_patch_size  # numbers of a patch of one frame
    numbers = sum(image.numel() if image.ndim == 4 else image.numel() // still * width for image in images)
    values = images[0].new_empty(numbers // width, width)
    kernels().pack_patches_forward(list(images), patch_size, temporal_patch_size, values)
    return values


def backward(
    d_values: Tensor,
    sizes: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    normalise: Normalise,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of the images; the arguments are those of the PyTorch backend."""
    channels = d_values.shape[1] // (temporal_patch_size * patch_size**2)
    shapes = list(zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True))
    d_clips = [
        d_values.new_empty(frames or temporal_patch_size, channels, height, width)
        for frames, height, width in shapes
    ]
    kernels().pack_patches_backward(d_values.contiguous(), patch_size, temporal_patch_size, d_clips)
    # A still image stands for all frames of its patches.
    d_images = [
        d_clip if frames else d_clip[0] if temporal_patch_size == 1 else d_clip.sum(0)
        for d_clip, (frames, _, _) in zip(d_clips, shapes, strict=True)
    ]
    return normalise.gradients(d_images, dtype)
