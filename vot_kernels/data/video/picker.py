"""The choice of the frames that are shown at the wanted times, from frames in order of time."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Picker:
    """Takes frames in order of time and keeps, converted, those that are shown at the wanted times.

    Only one frame that is not kept is held: the latest, whose end is not known until the next one arrives.
    """

    def __init__(self, wanted: np.ndarray, tolerance: float, convert: Callable[[Any], np.ndarray]) -> None:
        self.wanted = wanted
        self.tolerance = tolerance  # seconds by which rounding may have moved a timestamp
        self.convert = convert
        self.index = 0
        self.frames: list[np.ndarray] = []
        self.times: list[float] = []
        self._held: tuple[float, Any] | None = None

    @property
    def done(self) -> bool:
        return self.index >= len(self.wanted)

    @property
    def next_wanted(self) -> float:
        return float(self.wanted[self.index])

    def offer(self, start: float, frame: Any) -> None:
        """Take the next frame, shown from `start` seconds; it ends the previous one."""
        self.close(start - self.tolerance)
        self._held = (start, frame)

    def close(self, end: float) -> None:
        """End the held frame at `end` seconds; keep it if a wanted time is before that."""
        if self._held is None or self.done or self.next_wanted >= end:
            return
        start, frame = self._held
        self.frames.append(self.convert(frame))
        self.times.append(start)
        self.index = int(np.searchsorted(self.wanted, end, side="left"))

    def take(self) -> list[np.ndarray]:
        """Return the frames kept since the last call, and forget them; their times stay."""
        taken, self.frames = self.frames, []
        return taken

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return frames `[frames, height, width, 3]` and times `[frames]`; this object's own frames are released."""
        return stacked(self.take()), np.array(self.times, dtype=np.float64)


def stacked(frames: list[np.ndarray]) -> np.ndarray:
    """Return frames `[height, width, 3]` as one array; each is released when it is copied."""
    clip = np.empty((len(frames), *frames[0].shape), dtype=np.uint8)
    for i in range(len(frames)):
        clip[i] = frames[i]
        frames[i] = clip[:0]  # frees the frame, so that there is no second copy of the clip
    return clip


def sampling_warnings(picker: Picker, complete: bool) -> list[str]:
    wanted, found = len(picker.wanted), len(picker.times)
    if complete and found < wanted:
        return [f"{wanted} times were asked for, but the file shows only {found} different frames at them."]
    return []
