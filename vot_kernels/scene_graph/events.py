"""Events that follow from boxes alone: two objects that turn where they meet, and one that turns at the frame's edge.

These are the rules by which DigitWorld tells hits and bounces from tracks, for boxes of any size. A camera that moves
turns every path at once, so they are for cameras that stand.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vot_kernels.scene_graph.graph import STSG, Event, Tracklet

GEOMETRIC_EVENTS = ("hits", "bounces")
REACH = 0.2  # gap between two boxes, in units of their mean size, at which they may have hit
TURNED = 0.35  # change of velocity, relative to the speed, that shows a hit
EDGE = 0.25  # distance to the frame's edge, in units of the box's own extent, at which it may have bounced
MOVING = 0.05  # least speed of what turns, in units of its own size per frame


def geometric_events(stsg: STSG) -> tuple[Event, ...]:
    """Derive events from the boxes of `stsg`; gaps between boxes are interpolated.

    Returns:
        Events by frame. "hits" has two participants and happens at the closest approach at which both paths turn;
        "bounces" has one. A score is the lowest of the boxes in question.
    """
    tracks = [_Path(tracklet) for tracklet in stsg.tracklets if len(tracklet.boxes) > 2]
    found = [event for n, a in enumerate(tracks) for b in tracks[n + 1 :] for event in _hits(a, b)]
    found += [event for track in tracks for event in _bounces(track)]
    return tuple(sorted(found, key=lambda event: (event.t, event.kind, event.participants)))


def with_geometric_events(stsg: STSG) -> STSG:
    """Return the graph with these events besides its events of other kinds."""
    kept = tuple(event for event in stsg.events if event.kind not in GEOMETRIC_EVENTS)
    return replace(stsg, events=(*geometric_events(stsg), *kept))


class _Path:
    """A tracklet without gaps, as arrays over the frames from its first to its last."""

    def __init__(self, tracklet: Tracklet) -> None:
        whole = tracklet.interpolated()
        self.id, self.first, self.last = tracklet.id, whole.frames[0], whole.frames[-1]
        self.boxes = np.array([box for box, _ in whole.boxes.values()])
        self.scores = np.array([score for _, score in whole.boxes.values()])
        self.centers = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
        self.sizes = np.maximum(self.boxes[:, 2:] - self.boxes[:, :2], 1e-6)

    def turns(self, frame: int) -> bool:
        """Whether the velocity changes at `frame`, which is not the first or last."""
        n = frame - self.first
        before, after = np.diff(self.centers[n - 1 : n + 2], axis=0) / self.sizes[n]
        speed = max(float(np.linalg.norm(before)), float(np.linalg.norm(after)))
        return speed >= MOVING and float(np.linalg.norm(after - before)) > TURNED * speed


def _hits(a: _Path, b: _Path) -> Iterator[Event]:
    first, last = max(a.first, b.first), min(a.last, b.last)
    if last - first < 2:
        return
    p, q = (track.boxes[first - track.first : last - track.first + 1] for track in (a, b))
    sides = (p[:, 2:] - p[:, :2] + q[:, 2:] - q[:, :2]) / 2
    gaps = np.maximum(np.maximum(q[:, :2] - p[:, 2:], p[:, :2] - q[:, 2:]), 0.0)
    gap = np.hypot(*gaps.T) / np.sqrt(np.maximum(sides.prod(1), 1e-12))
    apart = np.hypot(*(((p[:, :2] + p[:, 2:]) - (q[:, :2] + q[:, 2:])) / 2).T)
    for n in range(1, len(gap) - 1):
        closest = apart[n] <= apart[n - 1] and apart[n] < apart[n + 1]
        if closest and gap[n] <= REACH and a.turns(first + n) and b.turns(first + n):
            score = min(a.scores[first + n - a.first], b.scores[first + n - b.first])
            yield Event("hits", first + n, (a.id, b.id), float(score))


def _bounces(track: _Path) -> Iterator[Event]:
    for n in range(1, len(track.boxes) - 1):
        before, after = np.diff(track.centers[n - 1 : n + 2], axis=0)
        at_low = track.boxes[n, :2] < EDGE * track.sizes[n]
        at_high = 1 - track.boxes[n, 2:] < EDGE * track.sizes[n]
        back = (at_low & (before < 0) & (after > 0)) | (at_high & (before > 0) & (after < 0))
        if back.any() and track.turns(track.first + n):
            yield Event("bounces", track.first + n, (track.id,), float(track.scores[n]))
