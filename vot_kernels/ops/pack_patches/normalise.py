"""The normalisation of colours that `pack_patches` does on its way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Normalise(NamedTuple):
    """How colours are normalised.

    Attributes:
        mean, std: of each channel, for colours from 0 to 1; both are empty where nothing changes.
        dtype: of the result.
    """

    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype

    def images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the images, normalised; they are the same tensors where nothing changes."""
        return [self._image(image) for image in images] if self.mean else list(images)

    def gradients(self, d_images: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return the gradients of images of `dtype`, from those of what `images` returned."""
        if not self.mean:
            return list(d_images)
        return [(x.to(_wide(dtype)) / self._channels(self.std, x, dtype)).to(dtype) for x in d_images]

    def _image(self, image: Tensor) -> Tensor:
        mean, std = (self._channels(numbers, image, image.dtype) for numbers in (self.mean, self.std))
        wide = image.to(mean.dtype)
        return ((wide / 255 if image.dtype == torch.uint8 else wide) - mean).div_(std).to(self.dtype)

    @staticmethod
    def _channels(numbers: Sequence[float], image: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=_wide(dtype), device=image.device)[:, None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else torch.promote_types(dtype, torch.float32)
