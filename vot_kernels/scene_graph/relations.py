"""Relations that follow from boxes alone, as intervals without flicker.

Per frame, each predicate is a number that is positive where it holds and grows with how clearly. An interval opens
where the number reaches `on` and closes where it falls below `off` < `on` (a Schmitt trigger), so noise of
less than on - off cannot break an interval up; intervals shorter than `min_duration` frames are dropped.
The same rules serve exact tracks and predicted ones, which makes the two comparable.

Lengths are fractions of the frame, speeds fractions of the frame per second by the real frame times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.scene_graph.graph import STSG, Relation, Tracklet

DIRECTIONS = ("left of", "right of", "above", "below")
MOTIONS = ("moves left", "moves right", "moves up", "moves down")
GEOMETRIC_PREDICATES = (*DIRECTIONS, "near", "approaches", *MOTIONS)
"""Every predicate `geometric_relations` knows. Motions are unary; `near` is symmetric; the rest directed."""

INVERSES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "near": "near"}
"""The predicate that says the same with subject and object exchanged."""


@dataclass(frozen=True)
class Threshold:
    """A relation begins at `on` and continues while its measure is at least `off`."""

    on: float
    off: float

    def __post_init__(self) -> None:
        if not self.off <= self.on:
            raise ValueError(f"Threshold.off must be at most on, got off={self.off} and on={self.on}.")


@dataclass(frozen=True)
class RelationRules:
    """When geometric relations hold.

    Attributes:
        direction: gap between the two boxes along the axis, in units of their mean extent along it. At 0 the boxes
            just touch; at -1 their centres are level. The axes are independent: an object can be left of *and* above
            another.
        nearness: minus the distance between the two boxes, in units of their mean size (root of the area).
        motion: speed along the axis, fractions of the frame per second.
        approach: the smaller of two speeds, fractions of the frame per second: how fast the distance between
            the centres shrinks, and how fast the subject moves towards the object. An object at rest is
            approached but does not approach.
        velocity_window: a velocity is the least-squares slope over this many known frames before and after.
        min_duration: frames from the first to the last of an interval, both counted.
        max_gap: an interval ends where the next frame that shows both objects is further away than this.
    """

    direction: Threshold = Threshold(on=0.0, off=-0.2)
    nearness: Threshold = Threshold(on=-0.5, off=-0.7)
    motion: Threshold = Threshold(on=0.1, off=0.05)
    approach: Threshold = Threshold(on=0.1, off=0.05)
    velocity_window: int = 2
    min_duration: int = 2
    max_gap: int = 4

    def __post_init__(self) -> None:
        for name in ("velocity_window", "min_duration", "max_gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"RelationRules.{name} must be at least 1, got {getattr(self, name)}.")


def geometric_relations(
    stsg: STSG,
    *,
    rules: RelationRules | None = None,
    predicates: Sequence[str] | None = None,
    inverses: bool = False,
) -> tuple[Relation, ...]:
    """Derive relations from the boxes of `stsg`.

    Args:
        stsg: the graph; its own relations are ignored.
        rules: thresholds, `RelationRules()` by default.
        predicates: which to derive; by default those of the graph's vocabulary that are geometric.
        inverses: also return what follows from another relation: `o2 right of o1` beside `o1 left of o2`, and
            `near` both ways. Otherwise the tracklet that comes first in the graph is the subject.

    Returns:
        Relations sorted by subject, object, predicate and time; a score is the mean, over the interval's frames, of
        the lower of the two boxes' scores.

    Raises:
        ValueError: a predicate that is not geometric.
    """
    rules = rules or RelationRules()
    if predicates is None:
        wanted = [p for p in GEOMETRIC_PREDICATES if p in stsg.vocabulary.predicates]
    else:
        wanted = list(predicates)
    unknown = [p for p in wanted if p not in GEOMETRIC_PREDICATES]
    if unknown:
        raise ValueError(
            f"A geometric predicate must be one of {', '.join(GEOMETRIC_PREDICATES)}, got {unknown[0]!r}."
        )
    times = np.array(stsg.frame_times_s)
    tracks = [_Track.of(t, times, rules.velocity_window) for t in stsg.tracklets if t.boxes]
    found: list[Relation] = []
    for i, a in enumerate(tracks):
        for j, b in enumerate(tracks):
            frames, at_a, at_b = _common(a, b)
            first = i < j or inverses
            measures = _motion(a) if i == j else _pair(a, b, at_a, at_b, first=first)
            scores = np.minimum(a.scores[at_a], b.scores[at_b])
            for predicate in wanted:
                if predicate in measures:
                    threshold = _threshold(rules, predicate)
                    for t0, t1, score in _intervals(measures[predicate], threshold, frames, scores, rules):
                        found.append(Relation(a.id, predicate, b.id, t0, t1, score))
    return tuple(found)


def with_geometric_relations(stsg: STSG, *, rules: RelationRules | None = None) -> STSG:
    """Return the graph with its geometric relations derived anew; relations of other predicates are kept."""
    kept = [r for r in stsg.relations if r.predicate not in GEOMETRIC_PREDICATES]
    return replace(stsg, relations=(*geometric_relations(stsg, rules=rules), *kept))


@dataclass(frozen=True)
class _Track:
    """A tracklet as arrays over the frames in which it is present."""

    id: str
    frames: np.ndarray  # int64 [n]
    boxes: np.ndarray  # float64 [n, 4]
    scores: np.ndarray  # float64 [n]
    velocities: np.ndarray  # float64 [n, 2], fractions of the frame per second

    @classmethod
    def of(cls, tracklet: Tracklet, times: np.ndarray, window: int) -> "_Track":
        frames = np.array(tracklet.frames)
        if frames[0] < 0 or frames[-1] >= len(times):
            raise ValueError(
                f"{tracklet.id} has boxes in the frames {frames[0]} to {frames[-1]}, but the graph has "
                f"{len(times)} frames."
            )
        boxes = np.array([box for box, _ in tracklet.boxes.values()])
        scores = np.array([score for _, score in tracklet.boxes.values()])
        velocities = _velocities(times[frames], _centers(boxes), window)
        return cls(tracklet.id, frames, boxes, scores, velocities)


def _centers(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _velocities(times: np.ndarray, centers: np.ndarray, window: int) -> np.ndarray:
    """Return least-squares slopes of the centres over `window` frames on either side; 0 for a single frame."""
    velocities = np.zeros_like(centers)
    for n in range(len(times)):
        near = slice(max(0, n - window), n + window + 1)
        t = times[near]
        t = t - t.sum() / len(t)
        spread = (t * t).sum()
        if spread > 0:
            velocities[n] = t @ centers[near] / spread
    return velocities


def _common(a: _Track, b: _Track) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the frames that show both, and their indices in either track."""
    if np.array_equal(a.frames, b.frames):  # most tracks are there in all frames
        every = np.arange(len(a.frames))
        return a.frames.tolist(), every, every
    frames, at_a, at_b = np.intersect1d(a.frames, b.frames, assume_unique=True, return_indices=True)
    return frames.tolist(), at_a, at_b


def _motion(track: _Track) -> dict[str, np.ndarray]:
    x, y = track.velocities.T
    return {"moves left": -x, "moves right": x, "moves up": -y, "moves down": y}


def _pair(a: _Track, b: _Track, at_a: np.ndarray, at_b: np.ndarray, first: bool) -> dict[str, np.ndarray]:
    """Measure `a … b` over their common frames; `first`: also the measures that have an inverse in `b … a`."""
    p, q = a.boxes[at_a], b.boxes[at_b]
    measures = {"approaches": _approach(p, q, a.velocities[at_a], b.velocities[at_b])}
    if first:
        size = np.maximum((p[:, 2:] - p[:, :2] + q[:, 2:] - q[:, :2]) / 2, 1e-6)  # mean extents [n, 2]
        before, after = (q[:, :2] - p[:, 2:]) / size, (p[:, :2] - q[:, 2:]) / size
        apart = np.maximum(np.maximum(before, after) * size, 0.0)
        measures["left of"], measures["above"] = before.T
        measures["right of"], measures["below"] = after.T
        measures["near"] = -np.hypot(*apart.T) / np.sqrt(size.prod(1))
    return measures


def _approach(p: np.ndarray, q: np.ndarray, v_p: np.ndarray, v_q: np.ndarray) -> np.ndarray:
    away = _centers(q) - _centers(p)
    towards = away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-9)
    own, closing = (v_p * towards).sum(1), ((v_p - v_q) * towards).sum(1)
    return np.minimum(own, closing)


def _threshold(rules: RelationRules, predicate: str) -> Threshold:
    if predicate in DIRECTIONS:
        return rules.direction
    if predicate in MOTIONS:
        return rules.motion
    return rules.nearness if predicate == "near" else rules.approach


def _intervals(
    measure: np.ndarray, threshold: Threshold, frames: list[int], scores: np.ndarray, rules: RelationRules
) -> Iterator[tuple[int, int, float]]:
    """Yield (t0, t1, mean score) of each run that opens at `on`, stays at or above `off` and is long enough."""
    start: int | None = None
    numbers = measure.tolist()  # of Python, which compares its own numbers faster
    for n in range(len(frames) + 1):
        inside = n < len(frames)
        if start is not None:
            closes = not inside or numbers[n] < threshold.off or frames[n] - frames[n - 1] > rules.max_gap
            if closes:
                t0, t1 = frames[start], frames[n - 1]
                if t1 - t0 + 1 >= rules.min_duration:
                    yield t0, t1, float(scores[start:n].sum()) / (n - start)
                start = None
        if start is None and inside and numbers[n] >= threshold.on:
            start = n
