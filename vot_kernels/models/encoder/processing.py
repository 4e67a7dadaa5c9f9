"""The conversion of images and clips of any size to packed patches."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from vot_kernels.ops.pack_patches import pack_patches


class VotImageProcessor(ImageProcessingMixin):
    """Resizes, normalises and packs images and clips of mixed sizes.

    Each input keeps its aspect ratio up to rounding to whole patches, and its area is scaled into
    `[min_pixels, max_pixels]`. The output follows the Qwen-VL convention.

    Args:
        patch_size, temporal_patch_size: as in the encoder's configuration.
        min_pixels, max_pixels: allowed area of one frame, in pixels.
        image_mean, image_std: mean and standard deviation to normalise values in [0, 1].
        merge_size: sides of a frame are whole multiples of this many patches, for models that merge as many.
    """

    model_input_names = ["pixel_values", "image_grid_thw", "fps"]

    def __init__(
        self,
        patch_size: int = 8,
        temporal_patch_size: int = 1,
        min_pixels: int = 32 * 32,
        max_pixels: int = 448 * 448,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        merge_size: int = 1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.merge_size = merge_size

    def __call__(
        self, images: Any, fps: float | Sequence[float] | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Pack a list of images `[H, W, 3]` and clips `[T, H, W, 3]` (uint8, numpy, torch or PIL).

        Args:
            images: one input or a list of inputs of any sizes.
            fps: frames per second of each clip, or one number for all; 0 (images) if not given.
            return_tensors: only "pt".

        Returns:
            `pixel_values` float32 `[patches, C * tp * p * p]`, `image_grid_thw` int64 `[inputs, 3]`,
            `fps` float32 `[inputs]`.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}.')
        inputs = list(images) if isinstance(images, list | tuple) else [images]
        if not inputs:
            raise ValueError("images must have at least one image or clip, got an empty list.")
        rates = [float(fps or 0.0)] * len(inputs) if not isinstance(fps, Sequence) else list(fps)
        if len(rates) != len(inputs):
            raise ValueError(
                f"fps must be one number or one per input ({len(inputs)}), got {len(rates)} numbers."
            )
        clips = [self._prepare(image) for image in inputs]
        if any(clip.is_floating_point() for clip in clips):
            clips = [clip if clip.is_floating_point() else clip.float().div_(255) for clip in clips]
        packed, grid = pack_patches(
            clips,
            self.patch_size,
            temporal_patch_size=self.temporal_patch_size,
            mean=self.image_mean,
            std=self.image_std,
        )
        return BatchFeature(
            {"pixel_values": packed, "image_grid_thw": grid, "fps": torch.tensor(rates, dtype=torch.float32)}
        )

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size in pixels, in whole patches, to which a frame of `height` x `width` is resized."""
        patch = self.patch_size * self.merge_size
        area = min(max(height * width, self.min_pixels), self.max_pixels)
        scale = math.sqrt(area / (height * width))
        rounded = [max(patch, round(side * scale / patch) * patch) for side in (height, width)]
        while rounded[0] * rounded[1] > self.max_pixels and max(rounded) > patch:
            rounded[rounded.index(max(rounded))] -= patch
        return rounded[0], rounded[1]

    def _prepare(self, image: Any) -> Tensor:
        """Return the clip at its target size: uint8 as it is, or floating from 0 to 1 if it had to be resized."""
        clip = _to_clip(image)
        size = self.target_size(*clip.shape[-2:])
        if clip.shape[-2:] != size:
            clip = clip.float().div_(255)
            clip = F.interpolate(clip, size=size, mode="bilinear", antialias=True, align_corners=False)
        missing = -clip.shape[0] % self.temporal_patch_size
        if missing:  # repeat the last frame to fill the last temporal patch
            clip = torch.cat([clip, clip[-1:].expand(missing, -1, -1, -1)])
        return clip


def _to_clip(image: Any) -> Tensor:
    """Return uint8 `[T, 3, H, W]` from an RGB image or clip in numpy, torch or PIL form."""
    tensor = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or tensor.dtype != torch.uint8 or tensor.numel() == 0:
        raise ValueError(
            "An image must be uint8 [height, width, 3] and a clip uint8 [frames, height, width, 3], "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}."
        )
    return tensor.permute(0, 3, 1, 2)
