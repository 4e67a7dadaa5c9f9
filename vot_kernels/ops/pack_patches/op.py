"""Packing of images and clips of any size into one buffer of patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import check_no_tangent, check_number
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.pack_patches import reference
from vot_kernels.ops.pack_patches.normalise import Normalise
from vot_kernels.packing import brief


@autocasts()
def pack_patches(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    temporal_patch_size: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cut images and clips of mixed sizes into one buffer of flat patches, in the order of Qwen-VL.

    The patches of an image or clip follow each other in the order (t, y, x), x fastest; within a patch the values are
    in the order (channel, frame, row, column). With `mean` and `std` the colours c, which are value / 255 of uint8
    images and the values of others, become (c - mean) / std; without them values and dtype do not change. The result
    is differentiable.

    Args:
        images: images `[channels, height, width]` and clips `[frames, channels, height, width]`, uint8 or
            floating, of one dtype, device and number of channels. Height and width are multiples of
            `patch_size`, frames of `temporal_patch_size`; a still image is repeated that often.
        patch_size: height and width of a patch, pixels.
        temporal_patch_size: frames of a patch.
        mean, std: of each channel, `channels` numbers, the deviations not 0; both or neither.
        dtype: floating dtype of normalised values; that of the images by default, float32 for uint8.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        pixel_values `[patches, channels · temporal_patch_size · patch_size²]` and
        grid_thw int64 `[images, 3]`, (frames, height, width) of each in patches, on the device of the images.

    Raises:
        TypeError: an image is not a tensor, or is neither uint8 nor floating; `mean` or `std` are not numbers.
        ValueError: there are no images; an image does not have a shape above or is not a multiple of the patch; two
            differ in dtype, device or channels; a patch size is not an int >= 1; `mean` and `std` are not one number
            per channel, or one is missing; `dtype` is given without them or not floating; `backend` is unknown or
            cannot serve these images. The message names the image.
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
    normalise = _checked_normalise(mean, std, dtype, images[0])
    chosen = select("pack_patches", backend, images[0])
    if chosen == "reference":
        values, _ = reference.pack_patches(
            images, patch_size, temporal_patch_size=temporal_patch_size, mean=mean, std=std, dtype=dtype
        )
    else:
        values = _pack_patches_fwd(images, patch_size, temporal_patch_size, *normalise, chosen)
    return values, torch.tensor(grid, dtype=torch.int64, device=images[0].device)


@custom_op("vot_kernels::pack_patches_fwd")
def _pack_patches_fwd(
    images: Sequence[Tensor],
    patch_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return the patches; see `pack_patches` and `Normalise`."""
    normalise = Normalise(mean, std, dtype)
    return load("pack_patches", backend).forward(images, patch_size, temporal_patch_size, normalise)


@_pack_patches_fwd.register_fake
def _(
    images: Sequence[Tensor],
    patch_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    grid = _grid_thw(_sizes(images), patch_size, temporal_patch_size)
    width = images[0].shape[-3] * temporal_patch_size * patch_size**2
    return images[0].new_empty(sum(t * y * x for t, y, x in grid), width, dtype=dtype)


@custom_op("vot_kernels::pack_patches_bwd")
@without_autocast
def _pack_patches_bwd(
    d_values: Tensor,
    sizes: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of the images, which have `dtype`; `sizes` has frames, height and width of each in turn,
    see `_sizes`."""
    normalise = Normalise(mean, std, d_values.dtype)
    return load("pack_patches", backend).backward(
        d_values, sizes, patch_size, temporal_patch_size, normalise, dtype
    )


@_pack_patches_bwd.register_fake
def _(
    d_values: Tensor,
    sizes: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    channels = d_values.shape[1] // (temporal_patch_size * patch_size**2)
    return [
        d_values.new_empty(*([frames] if frames else []), channels, height, width, dtype=dtype)
        for frames, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, patch_size, temporal_patch_size, mean, std, _, backend = inputs
    sizes, dtype, ctx.normalised = _sizes(images), images[0].dtype, bool(mean)
    ctx.arguments = sizes, patch_size, temporal_patch_size, mean, std, dtype, backend


def _backward(ctx: Any, d_values: Tensor) -> tuple[Any, ...]:
    d_images = _pack_patches_bwd(d_values, *ctx.arguments)
    no_numbers: list[Tensor] | None = None if ctx.normalised else []  # as torch.library counts an empty list
    return d_images, None, None, no_numbers, no_numbers, None, None


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


def _checked_normalise(
    mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype | None, image: Tensor
) -> Normalise:
    if mean is None and std is None:
        if dtype is not None:
            raise ValueError(
                f"dtype is that of normalised values and needs mean and std, got {brief(dtype)}."
            )
        return Normalise([], [], image.dtype)
    found: list[list[float]] = []
    for name, numbers in (("mean", mean), ("std", std)):
        if not isinstance(numbers, (list, tuple)) or len(numbers) != image.shape[-3]:
            raise ValueError(
                f"{name} must be {image.shape[-3]} numbers, one per channel, given together with the other of "
                f"mean and std, got {brief(numbers)}."
            )
        found.append([check_number(f"{name}[{i}]", number) for i, number in enumerate(numbers)])
    if 0.0 in found[1]:
        raise ValueError(f"std must not have a 0, got {brief(std)}.")
    default = torch.float32 if image.dtype == torch.uint8 else image.dtype
    chosen = default if dtype is None else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, got {brief(dtype)}.")
    return Normalise(found[0], found[1], chosen)


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
