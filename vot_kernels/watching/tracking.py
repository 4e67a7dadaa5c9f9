"""Detections in single frames, linked into tracklets: each object of a frame goes on in the next one, or ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vot_kernels.extras import imports_for
from vot_kernels.scene_graph.graph import Box, Tracklet

BINS = 4  # per colour channel, of the histogram that is an object's appearance
MAX_MISSED = 2  # frames for which an object may go unseen
ALIKE = 0.7  # least sum of overlap and likeness, each up to 1, of one object in two frames
REACH = (
    2.0  # an object moves at most this many times its size between two sightings, beyond what its speed tells
)
MIN_SIGHTINGS = 2  # an object that is seen once in a longer clip is more likely none


class Found(NamedTuple):
    """An object in one frame: its box, a score in [0, 1], and its label."""

    box: Box
    score: float
    label: str


@dataclass
class _Track:
    label: str
    boxes: dict[int, tuple[Box, float]] = field(default_factory=dict)
    look: np.ndarray = field(default_factory=lambda: np.zeros(BINS**3))

    def add(self, frame: int, found: Found, look: np.ndarray) -> None:
        self.boxes[frame] = (found.box, found.score)
        self.look = look if len(self.boxes) == 1 else (self.look + look) / 2

    def expected(self, frame: int) -> Box:
        """Where it would be in `frame` at the velocity of its last two boxes."""
        frames = list(self.boxes)
        last = np.array(self.boxes[frames[-1]][0])
        if len(frames) == 1:
            return Box(*last)
        before = np.array(self.boxes[frames[-2]][0])
        velocity = (_center(last) - _center(before)) / (frames[-1] - frames[-2])
        return Box(*(last + np.tile(velocity, 2) * (frame - frames[-1])))


def link(frames: np.ndarray, found: Sequence[Sequence[Found]]) -> tuple[Tracklet, ...]:
    """Link what was found in each frame of a clip into tracklets "o1", "o2", …, by first appearance.

    The sum of how much boxes overlap, with the object moved on at its speed, and how alike their colours are is as
    great as it can be over all pairs of a frame (`scipy.optimize.linear_sum_assignment`). Only objects of one label
    are linked. Frames in which an object went unseen are interpolated.

    Args:
        frames: uint8 `[frames, height, width, 3]`.
        found: the objects of each frame.
    """
    tracks: list[_Track] = []
    for k, objects in enumerate(found):
        looks = [appearance(frames[k], item.box) for item in objects]
        open_tracks = [track for track in tracks if k - max(track.boxes) <= MAX_MISSED + 1]
        pairs = _pairs(open_tracks, objects, looks, k)
        for n, item in enumerate(objects):
            track = pairs.get(n)
            if track is None:
                track = _Track(item.label)
                tracks.append(track)
            track.add(k, item, looks[n])
    needed = min(MIN_SIGHTINGS, len(found))
    kept = [track for track in tracks if len(track.boxes) >= needed]
    return tuple(
        Tracklet(f"o{n}", track.label, (), track.boxes).interpolated(MAX_MISSED + 1)
        for n, track in enumerate(kept, 1)
    )


def _pairs(
    tracks: Sequence[_Track], objects: Sequence[Found], looks: Sequence[np.ndarray], frame: int
) -> dict[int, _Track]:
    """Return the track of each object that continues one, by the number of the object."""
    with imports_for("Tracking of objects", "video"):
        from scipy.optimize import linear_sum_assignment

    if not tracks or not objects:
        return {}
    likeness = np.array(
        [[_likeness(t, o, look, frame) for o, look in zip(objects, looks, strict=True)] for t in tracks]
    )
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    chosen = zip(rows.tolist(), columns.tolist(), strict=True)
    return {column: tracks[row] for row, column in chosen if likeness[row, column] >= ALIKE}


def _likeness(track: _Track, item: Found, look: np.ndarray, frame: int) -> float:
    """Overlap plus likeness of colours; 0 for what cannot be the same object."""
    if track.label != item.label:
        return 0.0
    there = track.expected(frame)
    size = np.sqrt(max(there.area, 1e-9)) + np.sqrt(max(item.box.area, 1e-9))
    if np.linalg.norm(_center(np.array(there)) - _center(np.array(item.box))) > REACH * size / 2:
        return 0.0
    return there.iou(item.box) + float(np.sqrt(track.look * look).sum())


def _center(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


def appearance(frame: np.ndarray, box: Box) -> np.ndarray:
    """Return the share of each colour in a box of a frame, float `[BINS³]` with the sum 1."""
    height, width = frame.shape[:2]
    x1, x2 = (int(np.clip(round(x * width), 0, width)) for x in (box.x1, box.x2))
    y1, y2 = (int(np.clip(round(y * height), 0, height)) for y in (box.y1, box.y2))
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    crop = frame[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].reshape(-1, 3).astype(np.int64) * BINS // 256
    counts = np.bincount(crop @ np.array([BINS * BINS, BINS, 1]), minlength=BINS**3)
    return counts / counts.sum()


def distinct(objects: Sequence[Found], overlap: float = 0.7) -> list[Found]:
    """Return the objects, surest first, without those that overlap a surer one of the same label."""
    kept: list[Found] = []
    for item in sorted(objects, key=lambda item: -item.score):
        if all(item.label != other.label or item.box.iou(other.box) < overlap for other in kept):
            kept.append(item)
    return kept
