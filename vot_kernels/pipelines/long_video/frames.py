"""Frames of a stream: cut into windows that overlap, and a few of them kept to be shown."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

Frame = tuple[np.ndarray, float]
"""A frame, uint8 `[height, width, 3]`, and its time in seconds."""


class Window(NamedTuple):
    """Consecutive frames of a stream.

    Attributes:
        start: number of the first.
        new: how many of them, at the end, no earlier window had.
        frames: uint8 `[frames, height, width, 3]`.
        times: float64 `[frames]`, seconds.
    """

    start: int
    new: int
    frames: np.ndarray
    times: np.ndarray


def windows(frames: Iterable[Frame], size: int, overlap: int) -> Iterator[Window]:
    """Yield windows of `size` frames, each sharing at least `overlap` with the one before; a short stream is one.

    The last window ends with the stream and has the full size too, so that it shares more. Only the frames of one
    window are held.

    Raises:
        ValueError: not 0 < overlap < size.
    """
    if not 0 < overlap < size:
        raise ValueError(f"overlap must be between 1 and size - 1 = {size - 1}, got {overlap}.")
    held: deque[Frame] = deque(maxlen=size)
    count, new = 0, 0
    for frame in frames:
        held.append(frame)
        count, new = count + 1, new + 1
        if count == size or (count > size and new == size - overlap):
            yield _window(held, count, new)
            new = 0
    if new:
        yield _window(held, count, new)


def _window(held: deque[Frame], count: int, new: int) -> Window:
    pixels, times = zip(*held, strict=True)
    return Window(count - len(held), new, np.stack(pixels), np.array(times))


class Showcase:
    """An even choice of at most `most` frames of a stream whose length is not known beforehand."""

    def __init__(self, most: int) -> None:
        self.most, self.every, self.count = most, 1, 0
        self.kept: list[Frame] = []

    def watch(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Pass the frames on and keep every n-th; where that is too many, every other one is dropped."""
        for frame in frames:
            if self.count % self.every == 0:
                if len(self.kept) == self.most:
                    self.kept = self.kept[::2]
                    self.every *= 2
                if self.count % self.every == 0:
                    self.kept.append(frame)
            self.count += 1
            yield frame
