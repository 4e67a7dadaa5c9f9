"""A request for frames: which times, and of what size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

DEFAULT_NUM_FRAMES = 16
MAX_FPS = 1000.0
MAX_NUM_FRAMES = 1_000_000


class VideoError(ValueError):
    """The input cannot be used, or the request is invalid for it; the message is one sentence."""


@dataclass(frozen=True)
class Request:
    """A checked request for frames."""

    fps: float | None
    num_frames: int | None
    start: float | None
    end: float | None
    max_pixels: int | None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise VideoError(
                f"Give fps or num_frames, not both (got fps={self.fps}, num_frames={self.num_frames})."
            )
        check_number("fps", self.fps, lambda x: 0 < x <= MAX_FPS, f"above 0 and at most {MAX_FPS:g}")
        _check_whole("num_frames", self.num_frames, MAX_NUM_FRAMES)
        _check_whole("max_pixels", self.max_pixels, None)
        _check_whole("max_frames", self.max_frames, MAX_NUM_FRAMES)
        if self.max_frames is not None and self.fps is None:
            raise VideoError(f"max_frames must come with fps, got max_frames={self.max_frames} alone.")
        check_number("start", self.start, lambda x: x >= 0, "seconds from 0 on")
        check_number("end", self.end, lambda x: x > 0, "seconds above 0")
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise VideoError(
                f"start must be before end, but start is {self.start or 0:g} s and end is {self.end:g} s."
            )

    def span(self, duration: float, name: str) -> tuple[float, float]:
        """Return the range to sample, in seconds, of something that lasts `duration` seconds."""
        start = self.start or 0.0
        if start > 0 and start >= duration:
            raise VideoError(f"start is {start:g} s, but {name} ends at {duration:.3f} s.")
        return start, duration if self.end is None else min(self.end, duration)

    def times(self, start: float, end: float) -> np.ndarray:
        """Return the wanted times, increasing, in seconds."""
        if self.fps is not None:
            # The margin keeps rounding of the duration from adding a time at the very end.
            count = max(1, math.ceil((end - start) * self.fps - 1e-3))
            if self.max_frames is None or count <= self.max_frames:
                return start + np.arange(count) / self.fps
        count = self.max_frames or self.num_frames or DEFAULT_NUM_FRAMES
        return start + (np.arange(count) + 0.5) * ((end - start) / count)

    def size(self, width: float, height: float) -> tuple[int, int]:
        """Return width and height in pixels after scaling to `max_pixels`."""
        if self.max_pixels is None or width * height <= self.max_pixels:
            return max(1, round(width)), max(1, round(height))
        scale = math.sqrt(self.max_pixels / (width * height))
        columns, rows = _even(width * scale), _even(height * scale)
        # If one side is one pixel already, the other side alone shrinks to fit the area.
        return min(columns, _even(self.max_pixels / rows)), min(rows, _even(self.max_pixels / columns))


def check_number(name: str, value: float | None, allowed: Callable[[float], bool], words: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction | np.integer | np.floating):
        raise VideoError(f"{name} must be a number ({words}), got {value!r}.")
    if not math.isfinite(value) or not allowed(float(value)):
        raise VideoError(f"{name} must be {words}, got {value}.")


def _check_whole(name: str, value: int | None, most: int | None) -> None:
    if value is None:
        return
    words = "a whole number from 1 on" if most is None else f"a whole number from 1 to {most}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise VideoError(f"{name} must be {words}, got {value!r}.")
    if value < 1 or (most is not None and value > most):
        raise VideoError(f"{name} must be {words}, got {value}.")


def _even(side: float) -> int:
    """Return the largest even whole number not above `side`, or 1 if there is none."""
    return max(1, int(side) // 2 * 2)
