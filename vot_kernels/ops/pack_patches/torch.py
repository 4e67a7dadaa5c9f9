"""The PyTorch backend of `pack_patches`: one strided copy per image into its rows of the buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.ops.pack_patches.normalise import Normalise


def forward(
    images: Sequence[Tensor], patch_size: int, temporal_patch_size: int, normalise: Normalise
) -> Tensor:
    """Return `[patches, channels · temporal_patch_size · patch_size²]`."""
    images = normalise.images(images)
    clips = [image if image.ndim == 4 else image.expand(temporal_patch_size, -1, -1, -1) for image in images]
    cuts = [_cut(clip, patch_size, temporal_patch_size) for clip in clips]
    counts = [cut.shape[:3].numel() for cut in cuts]
    values = images[0].new_empty(sum(counts), cuts[0].shape[3:].numel())
    for cut, rows in zip(cuts, values.split(counts), strict=True):
        rows.view(cut.shape).copy_(cut)
    return values


def backward(
    d_values: Tensor,
    sizes: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    normalise: Normalise,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the gradients of the images.

    Args:
        d_values: `[patches, channels · temporal_patch_size · patch_size²]`.
        sizes: frames, height and width of each image in turn; 0 frames mean a still image.
        patch_size, temporal_patch_size: as in `pack_patches`.
        normalise: what the forward did.
        dtype: of the images.
    """
    channels = d_values.shape[1] // (temporal_patch_size * patch_size**2)
    d_images, first = [], 0
    for frames, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True):
        d_clip = d_values.new_empty(frames or temporal_patch_size, channels, height, width)
        cut = _cut(d_clip, patch_size, temporal_patch_size)
        last = first + cut.shape[:3].numel()
        cut.copy_(d_values[first:last].reshape(cut.shape))
        if not frames:  # a still image is repeated over the frames of its patches
            d_clip = d_clip[0] if temporal_patch_size == 1 else d_clip.sum(0)
        d_images.append(d_clip)
        first = last
    return normalise.gradients(d_images, dtype)


def _cut(clip: Tensor, patch_size: int, temporal_patch_size: int) -> Tensor:
    """Return a view `[t, y, x, channels, temporal_patch_size, patch_size, patch_size]` of `clip`."""
    frames, channels, height, width = clip.shape
    t, y, x = frames // temporal_patch_size, height // patch_size, width // patch_size
    cut = clip.view(t, temporal_patch_size, channels, y, patch_size, x, patch_size)
    return cut.permute(0, 3, 5, 2, 1, 4, 6)
