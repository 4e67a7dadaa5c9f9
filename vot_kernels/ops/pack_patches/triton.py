"""The Triton backend of `pack_patches`: all images in one launch, each number read once and written once."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import gcd
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div
from vot_kernels.ops.pack_patches.normalise import Normalise

_PACK = Kernel("pack_patches", "pack", "pack_patches.patches:_pack_patches_kernel")
_UNPACK = Kernel("pack_patches", "unpack", "pack_patches.patches:_unpack_patches_kernel")
_VECTOR = 16  # bytes of the widest load


def forward(
    images: Sequence[Tensor], patch_size: int, temporal_patch_size: int, normalise: Normalise
) -> Tensor:
    """Return `[patches, channels · temporal_patch_size · patch_size²]`."""
    channels = images[0].shape[-3]
    values = channels * temporal_patch_size * patch_size**2
    clips = [image if image.ndim == 4 else image.expand(temporal_patch_size, -1, -1, -1) for image in images]
    patches = [clip.numel() // values for clip in clips]
    out = images[0].new_empty(sum(patches), values, dtype=normalise.dtype)
    scales = shifts = None
    if normalise.mean:
        shades = 255.0 if images[0].dtype == torch.uint8 else 1.0
        scales = tuple(1 / (shades * std) for std in normalise.std)
        shifts = tuple(-mean / std for mean, std in zip(normalise.mean, normalise.std, strict=True))
    _PACK.launch(
        _grid(patches, values),
        key=_key(out),
        out_ptr=out,
        scales=scales,
        shifts=shifts,
        COLUMNS_APART=any(clip.stride(3) != 1 for clip in clips),
        CHANNELS=channels,
        FRAMES=temporal_patch_size,
        **_table(clips, patches, _starts(patches), patch_size),
    )
    return out


def backward(
    d_values: Tensor,
    sizes: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    normalise: Normalise,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the gradients of the images; the arguments are those of the PyTorch backend."""
    d_values = d_values.contiguous()
    channels = d_values.shape[1] // (temporal_patch_size * patch_size**2)
    d_images = [
        d_values.new_empty(*([frames] if frames else []), channels, height, width, dtype=dtype)
        for frames, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True)
    ]
    # A still image with one frame in a patch is a clip of one frame.
    clips = [x if x.ndim == 4 else x[None] for x in d_images]
    patches = [
        clip.numel() // (channels * patch_size**2 * (temporal_patch_size if image.ndim == 4 else 1))
        for clip, image in zip(clips, d_images, strict=True)
    ]
    starts = _starts(patches)
    scales = tuple(1 / std for std in normalise.std) or None
    for still in (False, True):
        chosen = [i for i, image in enumerate(d_images) if (image.ndim == 3) == still]
        frames = 1 if still else temporal_patch_size
        some = [patches[i] for i in chosen]
        if not chosen:
            continue
        _UNPACK.launch(
            _grid(some, channels * frames * patch_size**2),
            key=_key(d_values),
            d_out_ptr=d_values,
            scales=scales,
            CHANNELS=channels,
            FRAMES=frames,
            REPEATS=temporal_patch_size // frames,
            **_table([clips[i] for i in chosen], some, [starts[i] for i in chosen], patch_size),
        )
    return d_images


def _table(
    clips: Sequence[Tensor], patches: Sequence[int], rows: Sequence[int], patch_size: int
) -> dict[str, Any]:
    """Return the table of the clips `[frames, channels, height, width]` that the kernels read, and what it implies."""
    size = clips[0].element_size()
    places = [clip.data_ptr() // size for clip in clips]
    unit = gcd(_VECTOR // size, patch_size, *places, *(n for clip in clips for n in clip.stride()[:3]))
    columns = [
        accumulate(patches, initial=0),
        [clip.data_ptr() for clip in clips],
        rows,
        [clip.shape[2] // patch_size for clip in clips],
        [clip.shape[3] // patch_size for clip in clips],
        *([clip.stride(axis) // unit for clip in clips] for axis in (0, 1, 2)),
        [clip.stride(3) for clip in clips],
    ]
    table = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return {
        "table_ptr": table.to(clips[0].device),
        "count": len(clips),
        "TYPE": _triton_type(clips[0].dtype),
        "PATCH": patch_size,
        "UNIT": unit,
    }


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    names = {torch.uint8: "uint8", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return getattr(tl, names.get(dtype, "float32"))


def _starts(counts: Sequence[int]) -> list[int]:
    """Return the sum of the counts before each."""
    return list(accumulate(counts, initial=0))[:-1]


def _grid(patches: Sequence[int], values: int) -> Any:
    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        tiles = sum(patches) // blocks["BLOCK_P"] + len(patches)
        return (tiles * ceil_div(values, blocks["BLOCK_V"]),)

    return grid


def _key(values: Tensor) -> dict[str, int]:
    return {"bits": 8 * values.element_size()}
