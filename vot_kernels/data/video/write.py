"""Writing of frames as an mp4 file."""

import itertools
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vot_kernels.data.video.request import MAX_FPS, VideoError, check_number
from vot_kernels.files import atomic_write

_MP4 = {"movflags": "+faststart", "fflags": "+bitexact"}


def save_mp4(
    path: str | os.PathLike[str],
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | Fraction,
    *,
    crf: int = 18,
    deterministic: bool = True,
) -> Path:
    """Write frames as H.264 (yuv420p, BT.601) in mp4 with the index in front; the file appears only when complete.

    Args:
        path: the file to write; its name must end in ".mp4".
        frames: uint8 RGB `[frames, height, width, 3]`, or an iterable of `[height, width, 3]`. Width and
            height must be even, as 4:2:0 colour needs; they are not padded, so that boxes given as fractions
            of the frame stay right.
        fps: frames per second.
        crf: constant rate factor, 0 (nearly lossless) to 51 (worst).
        deterministic: encode in one thread, so that equal frames give equal bytes with the same libx264.

    Returns:
        The path written.
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise VideoError(f"An mp4 file name must end in '.mp4', got '{target}'.")
    check_number("fps", fps, lambda x: 0 < x <= MAX_FPS, f"above 0 and at most {MAX_FPS:g}")  # type: ignore[arg-type]
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
        raise VideoError(f"crf must be a whole number from 0 to 51, got {crf!r}.")
    images = iter(frames)
    first = next(images, None)
    if first is None:
        raise VideoError("At least one frame is needed to write a video, got none.")
    shape = _check_frame(first)
    rate = Fraction(fps).limit_denominator(100_000)
    with (
        atomic_write(target) as temporary,
        av.open(str(temporary), "w", format="mp4", options=_MP4) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = shape[1], shape[0], "yuv420p"
        stream.codec_context.color_range = 1  # limited
        stream.codec_context.colorspace = 6  # SMPTE 170M, the matrix that libav converts RGB with
        if deterministic:
            stream.codec_context.thread_count = 1
        for image in itertools.chain([first], images):
            if _check_frame(image) != shape:
                raise VideoError(f"All frames must have one shape, got {shape} and {image.shape}.")
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
            )
        container.mux(stream.encode())
    return target


def _check_frame(frame: np.ndarray) -> tuple[int, int, int]:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise VideoError(f"A frame must be a uint8 array [height, width, 3], got {given}.")
    height, width = frame.shape[:2]
    if height % 2 or width % 2 or not height or not width:
        raise VideoError(f"H.264 with 4:2:0 colour needs an even width and height, got {width}×{height}.")
    return height, width, 3
