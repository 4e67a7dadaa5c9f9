"""Images and clips of any sizes, cut into patches and laid in one buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_patches(
    images: Sequence[Tensor], patch_size: int, *, temporal_patch_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Cut images and clips of mixed sizes into one buffer of flat patches, the Qwen-VL convention.

    Patches of an image or clip follow each other in the order (t, y, x), x fastest; within a patch the values
    lie in the order (channel, frame, row, column). Values and dtype are unchanged: scale before or after.
    Differentiable.

    Args:
        images: images `[channels, height, width]` and clips `[frames, channels, height, width]`, uint8 or
            floating, of one dtype, device and number of channels. Height and width are multiples of
            `patch_size`, frames of `temporal_patch_size`; a still image is repeated that often.
        patch_size: height and width of a patch, pixels.
        temporal_patch_size: frames of a patch.

    Returns:
        pixel_values `[patches, channels · temporal_patch_size · patch_size²]` and
        grid_thw int64 `[images, 3]`, (frames, height, width) of each in patches, on the device of the images.

    Raises:
        ValueError, TypeError: no images, or one that does not fit; the message names it.
    """
    for name, size in (("patch_size", patch_size), ("temporal_patch_size", temporal_patch_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}.")
    if not images:
        raise ValueError("pack_patches needs at least one image, got none.")
    clips = [_as_clip(image, i, images[0], patch_size, temporal_patch_size) for i, image in enumerate(images)]
    grid = [
        (t // temporal_patch_size, height // patch_size, width // patch_size)
        for t, _, height, width in (clip.shape for clip in clips)
    ]
    patches = [
        clip.reshape(t, temporal_patch_size, clip.shape[1], y, patch_size, x, patch_size)
        .permute(0, 3, 5, 2, 1, 4, 6)
        .reshape(t * y * x, clip.shape[1] * temporal_patch_size * patch_size**2)
        for clip, (t, y, x) in zip(clips, grid, strict=True)
    ]
    return torch.cat(patches), torch.tensor(grid, dtype=torch.int64, device=images[0].device)


def unpack_patches(
    pixel_values: Tensor,
    grid_thw: Tensor | Sequence[Sequence[int]],
    patch_size: int,
    *,
    temporal_patch_size: int = 1,
) -> list[Tensor]:
    """The inverse of `pack_patches`: clips `[frames, channels, height, width]`, a still image included.

    Raises:
        ValueError: the grid does not account for the patches, or a patch is not that large.
    """
    grid = grid_thw.tolist() if isinstance(grid_thw, Tensor) else [list(row) for row in grid_thw]
    counts = [t * y * x for t, y, x in grid]
    values = temporal_patch_size * patch_size**2
    if pixel_values.ndim != 2 or sum(counts) != pixel_values.shape[0] or pixel_values.shape[1] % values:
        raise ValueError(
            f"pixel_values must be [{sum(counts)}, a multiple of {values}], got {list(pixel_values.shape)}."
        )
    channels = pixel_values.shape[1] // values
    return [
        rows.reshape(t, y, x, channels, temporal_patch_size, patch_size, patch_size)
        .permute(0, 4, 3, 1, 5, 2, 6)
        .reshape(t * temporal_patch_size, channels, y * patch_size, x * patch_size)
        for rows, (t, y, x) in zip(pixel_values.split(counts), grid, strict=True)
    ]


def _as_clip(image: Tensor, index: int, first: Tensor, patch_size: int, temporal_patch_size: int) -> Tensor:
    if not isinstance(image, Tensor):
        raise TypeError(f"Image {index} must be a tensor, got {type(image).__name__}.")
    if image.ndim not in (3, 4):
        raise ValueError(
            f"Image {index} must be [channels, height, width] or [frames, channels, height, width], "
            f"got {list(image.shape)}."
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"Image {index} must be uint8 or floating, got {image.dtype}.")
    if (image.dtype, image.device, image.shape[-3]) != (first.dtype, first.device, first.shape[-3]):
        raise ValueError(
            f"All images must have the dtype, device and channels of image 0 ({first.dtype}, {first.device}, "
            f"{first.shape[-3]}), but image {index} has {image.dtype}, {image.device}, {image.shape[-3]}."
        )
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size or not image.numel():
        raise ValueError(
            f"Image {index} is {height} x {width} pixels (height x width); both must be positive multiples "
            f"of patch_size {patch_size}."
        )
    if image.ndim == 3:
        return image.expand(temporal_patch_size, *image.shape)
    if image.shape[0] % temporal_patch_size:
        raise ValueError(
            f"Image {index} has {image.shape[0]} frames, which is not a multiple of "
            f"temporal_patch_size {temporal_patch_size}."
        )
    return image
