"""Packing of images and clips of any size into one buffer of patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import check_no_tangent
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.pack_patches import reference
from vot_kernels.packing import brief


@autocasts()
def pack_patches(
    images: Sequence[Tensor], patch_size: int, *, temporal_patch_size: int = 1, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cut images and clips of mixed sizes into one buffer of flat patches, in the order of Qwen-VL.

    The patches of an image or clip follow each other in the order (t, y, x), x fastest; within a patch the values are
    in the order (channel, frame, row, column). Values and dtype do not change: scale before or after. The result is
    differentiable.

    Args:
        images: images `[channels, height, width]` and clips `[frames, channels, height, width]`, uint8 or
            floating, of one dtype, device and number of channels. Height and width are multiples of
            `patch_size`, frames of `temporal_patch_size`; a still image is repeated that often.
        patch_size: height and width of a patch, pixels.
        temporal_patch_size: frames of a patch.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        pixel_values `[patches, channels · temporal_patch_size · patch_size²]` and
        grid_thw int64 `[images, 3]`, (frames, height, width) of each in patches, on the device of the images.

    Raises:
        TypeError: an image is not a tensor, or is neither uint8 nor floating.
        ValueError: there are no images; an image does not have a shape above or is not a multiple of the patch; two
            differ in dtype, device or channels; a patch size is not an int >= 1; `backend` is unknown or cannot serve
            these images. The message names the image.
    """
    for name, size in (("patch_size", patch_size), ("temporal_patch_size", temporal_patch_size)):
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
            raise ValueError(f"{name} must be an int >= 1 (and below 2**31), got {brief(size)}.")
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images must be a list of tensors, got {brief(images)}.")
    if not images:
        raise ValueError("pack_patches needs at least one image, got none.")
    images = list(images)
    for i, image in enumerate(images):
        _validate(image, i, images[0], patch_size, temporal_patch_size)
    grid = _grid_thw(_sizes(images), patch_size, temporal_patch_size)
    chosen = select("pack_patches", backend, images[0])
    if chosen == "reference":
        values, _ = reference.pack_patches(images, patch_size, temporal_patch_size=temporal_patch_size)
    else:
        values = _pack_patches_fwd(images, patch_size, temporal_patch_size, chosen)
    return values, torch.tensor(grid, dtype=torch.int64, device=images[0].device)


@torch.library.custom_op("vot_kernels::pack_patches_fwd", mutates_args=())
def _pack_patches_fwd(
    images: Sequence[Tensor], patch_size: int, temporal_patch_size: int, backend: str
) -> Tensor:
    """Return the patches; see `pack_patches`."""
    return load("pack_patches", backend).forward(images, patch_size, temporal_patch_size)


@_pack_patches_fwd.register_fake
def _(images: Sequence[Tensor], patch_size: int, temporal_patch_size: int, backend: str) -> Tensor:
    grid = _grid_thw(_sizes(images), patch_size, temporal_patch_size)
    width = images[0].shape[-3] * temporal_patch_size * patch_size**2
    return images[0].new_empty(sum(t * y * x for t, y, x in grid), width)


@torch.library.custom_op("vot_kernels::pack_patches_bwd", mutates_args=())
@without_autocast
def _pack_patches_bwd(
    d_values: Tensor, sizes: Sequence[int], patch_size: int, temporal_patch_size: int, backend: str
) -> list[Tensor]:
    """Return the gradients of the images; `sizes` has frames, height and width of each in turn, see `_sizes`."""
    return load("pack_patches", backend).backward(d_values, sizes, patch_size, temporal_patch_size)


@_pack_patches_bwd.register_fake
def _(
    d_values: Tensor, sizes: Sequence[int], patch_size: int, temporal_patch_size: int, backend: str
) -> list[Tensor]:
    channels = d_values.shape[1] // (temporal_patch_size * patch_size**2)
    return [
        d_values.new_empty(*([frames] if frames else []), channels, height, width)
        for frames, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, *options = inputs
    ctx.arguments = _sizes(images), *options


def _backward(ctx: Any, d_values: Tensor) -> tuple[list[Tensor], None, None, None]:
    return _pack_patches_bwd(d_values, *ctx.arguments), None, None, None


_pack_patches_fwd.register_autograd(_backward, setup_context=_setup_context)


def unpack_patches(
    pixel_values: Tensor,
    grid_thw: Tensor | Sequence[Sequence[int]],
    patch_size: int,
    *,
    temporal_patch_size: int = 1,
) -> list[Tensor]:
    """Invert `pack_patches`, giving clips `[frames, channels, height, width]`, also for still images.

    Raises:
        ValueError: `grid_thw` does not match the number of patches, or their size is wrong.
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


def _sizes(images: Sequence[Tensor]) -> list[int]:
    """Return frames, height and width of each image in turn; 0 frames mean a still image."""
    return [n for image in images for n in (image.shape[0] if image.ndim == 4 else 0, *image.shape[-2:])]


def _grid_thw(sizes: Sequence[int], patch_size: int, temporal_patch_size: int) -> list[tuple[int, int, int]]:
    return [
        (frames // temporal_patch_size if frames else 1, height // patch_size, width // patch_size)
        for frames, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True)
    ]


def _validate(image: Tensor, index: int, first: Tensor, patch_size: int, temporal_patch_size: int) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"Image {index} must be a tensor, got {type(image).__name__}.")
    if image.ndim not in (3, 4):
        raise ValueError(
            f"Image {index} must be [channels, height, width] or [frames, channels, height, width], "
            f"got {list(image.shape)}."
        )
    check_no_tangent(f"Image {index}", image)
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
    if image.ndim == 4 and image.shape[0] % temporal_patch_size:
        raise ValueError(
            f"Image {index} has {image.shape[0]} frames, which is not a multiple of "
            f"temporal_patch_size {temporal_patch_size}."
        )
