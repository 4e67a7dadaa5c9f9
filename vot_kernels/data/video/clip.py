"""The result of reading a file: frames, their times, and a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vot_kernels.data.video.picker import Picker
from vot_kernels.data.video.request import DEFAULT_NUM_FRAMES, Request


@dataclass(frozen=True)
class VideoInfo:
    """What a file is, what was requested and what was sampled. Times are seconds from its first frame.

    Attributes:
        path: the file.
        kind: "video", "image" or "animation" (a GIF, APNG or WebP with several frames).
        container, codec: names of the container format and of the codec.
        source_width, source_height: size in pixels as stored, before rotation and scaling.
        width, height: size in pixels of the sampled frames.
        rotation: degrees clockwise by which the frames were turned, as the file's metadata says.
        mirrored: whether the metadata also says to mirror the frames left to right, before turning.
        average_fps: frames per second on average, None for an image.
        duration_s: length as the file declares it or, if longer, as its timestamps show; 0 for an image.
        frames_sampled: number of sampled frames.
        sampled_times_s: their presentation times.
        fps, max_frames, num_frames, start, end, max_pixels: the request, None for options that were not given.
        complete: whether the whole requested range was read and nothing that was decoded was damaged.
        decoded_until_s: end of the last frame that was decoded.
        warnings: one sentence for each thing that a user should know.
    """

    path: str
    kind: Literal["video", "image", "animation"]
    container: str
    codec: str
    source_width: int
    source_height: int
    width: int
    height: int
    rotation: int
    mirrored: bool
    average_fps: float | None
    duration_s: float
    frames_sampled: int
    sampled_times_s: tuple[float, ...]
    fps: float | None
    max_frames: int | None
    num_frames: int | None
    start: float | None
    end: float | None
    max_pixels: int | None
    complete: bool
    decoded_until_s: float
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one paragraph: what the file is, what was sampled and when, and every warning."""
        size = f"{self.source_width}×{self.source_height}"
        what = f"{Path(self.path).name}: {self.kind} ({self.codec} in {self.container}), {size}"
        if self.rotation or self.mirrored:
            turn = ["mirrored"] * self.mirrored + [f"turned {self.rotation}° clockwise"] * bool(self.rotation)
            what += f", {' and '.join(turn)}"
        if self.kind != "image":
            rate = f" at {self.average_fps:.4g} fps" if self.average_fps else ""
            what += f", {self.duration_s:.2f} s{rate}"
        asked = [
            f"{name} {value:g}"
            for name, value in (
                ("fps", self.fps),
                ("max_frames", self.max_frames),
                ("num_frames", self.num_frames),
                ("start", self.start),
                ("end", self.end),
                ("max_pixels", self.max_pixels),
            )
            if value is not None
        ]
        request = ", ".join(asked) or f"the default, {DEFAULT_NUM_FRAMES} frames over the whole length"
        plural = "s" if self.frames_sampled != 1 else ""
        sampled = (
            f"Sampled {self.frames_sampled} frame{plural} of {self.width}×{self.height} (asked: {request})"
        )
        if self.kind != "image":
            sampled += f" at {_list_times(self.sampled_times_s)} s"
        return " ".join([f"{what}.", f"{sampled}.", *self.warnings])


def _list_times(times: tuple[float, ...]) -> str:
    shown = [f"{at:.2f}" for at in times]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:12], "…", *shown[-3:]])


@dataclass(frozen=True)
class VideoClip:
    """Sampled frames.

    Attributes:
        frames: uint8 RGB `[frames, height, width, 3]`.
        times: float64 `[frames]`, seconds from the first frame of the file.
        info: what the file is, and what was sampled.
    """

    frames: np.ndarray
    times: np.ndarray
    info: VideoInfo


class Orientation(NamedTuple):
    """The way from stored pixels to the shown picture: first transpose, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_rows ^ self.flip_columns

    @property
    def rotation(self) -> int:
        """Degrees clockwise, after mirroring left to right if `mirrored`."""
        if self.transpose:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_rows else 0

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn `[height, width, 3]`."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        if self.flip_rows:
            pixels = pixels[::-1]
        if self.flip_columns:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)


def make_clip(
    path: Path,
    request: Request,
    picker: Picker,
    *,
    orientation: Orientation,
    **facts: Any,
) -> VideoClip:
    frames, times = picker.result()
    info = make_info(
        path, request, times.tolist(), (frames.shape[2], frames.shape[1]), orientation=orientation, **facts
    )
    return VideoClip(frames, times, info)


def make_info(
    path: Path,
    request: Request,
    times: Sequence[float],
    size: tuple[int, int],
    *,
    orientation: Orientation,
    **facts: Any,
) -> VideoInfo:
    """Return the report about frames of `size` (width, height) that were sampled at `times`."""
    return VideoInfo(
        path=str(path),
        width=size[0],
        height=size[1],
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        frames_sampled=len(times),
        sampled_times_s=tuple(times),
        fps=None if request.fps is None else float(request.fps),
        max_frames=None if request.max_frames is None else int(request.max_frames),
        num_frames=None if request.num_frames is None else int(request.num_frames),
        start=None if request.start is None else float(request.start),
        end=None if request.end is None else float(request.end),
        max_pixels=None if request.max_pixels is None else int(request.max_pixels),
        **facts,
    )
