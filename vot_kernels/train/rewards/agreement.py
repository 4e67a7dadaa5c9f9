"""How far a scene graph agrees with a true one: tracks, events, and relations frame by frame."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from vot_kernels.scene_graph.graph import STSG, Event, Tracklet

Item = TypeVar("Item")


def track_iou(said: STSG, true: STSG) -> float:
    """Return the mean over tracks of the IoU of those of equal names, in [0, 1]; 1 for two graphs without tracks."""
    return mean_of_matches(
        said.tracklets, true.tracklets, lambda a, b: _vt_iou(a, b) if a.name == b.name else 0.0
    )


def event_iou(said: STSG, true: STSG) -> float:
    """Return the mean over events of the temporal IoU of those told in equal words, in [0, 1]; 1 without events."""
    return mean_of_matches(
        said.events,
        true.events,
        lambda a, b: said.interval(a).iou(true.interval(b)) if told(a, said) == told(b, true) else 0.0,
    )


def triplets_found(said: STSG, true: STSG, iou: float = 0.5) -> tuple[int, int]:
    """Return how many of the true triplets, one for each relation and frame, the graph has, and how many there are.

    A triplet <subject, predicate, object> is found if the graph has the same predicate in the same frame between tracks
    of the same names, both with boxes that overlap the true ones by at least `iou`. Summed over clips the share is the
    recall of Action Genome (Ji et al., CVPR 2020, scene graph detection), without a limit on predictions.
    """
    stated: dict[tuple[int, str], list[tuple[Tracklet, Tracklet]]] = {}
    for frame, predicate, *pair in _triplets(said):
        stated.setdefault((frame, predicate), []).append((pair[0], pair[1]))

    def same(a: Tracklet, b: Tracklet, frame: int) -> bool:
        here, there = a.box(frame), b.box(frame)
        return a.name == b.name and here is not None and there is not None and here.iou(there) >= iou

    found = total = 0
    for frame, predicate, subject, object_ in _triplets(true):
        total += 1
        found += any(
            same(a, subject, frame) and same(b, object_, frame) for a, b in stated.get((frame, predicate), ())
        )
    return found, total


def told(event: Event, graph: STSG) -> tuple[str, tuple[str, ...]]:
    """Return kind and participants by name; who hits whom is not told apart."""
    return event.kind, tuple(sorted(graph.tracklet(id).name for id in event.participants))


def mean_of_matches(
    said: Sequence[Item], true: Sequence[Item], score: Callable[[Item, Item], float]
) -> float:
    """Return the largest sum of scores of pairs over the longer length, in [0, 1]; 1 for two empty sequences."""
    if not said and not true:
        return 1.0
    if not said or not true:
        return 0.0
    scores = np.array([[score(a, b) for b in true] for a in said])
    pairs = linear_sum_assignment(scores, maximize=True)
    return float(scores[pairs].sum()) / max(len(said), len(true))


def _triplets(graph: STSG) -> Iterator[tuple[int, str, Tracklet, Tracklet]]:
    for relation in graph.relations:
        pair = graph.tracklet(relation.subject), graph.tracklet(relation.object)
        for frame in range(relation.t0, relation.t1 + 1):
            yield frame, relation.predicate, *pair


def _vt_iou(a: Tracklet, b: Tracklet) -> float:
    frames = {*a.boxes, *b.boxes}
    if not frames:
        return 1.0
    both = (k for k in frames if k in a.boxes and k in b.boxes)
    return sum(1.0 if a.box(k) == b.box(k) else a.boxes[k][0].iou(b.boxes[k][0]) for k in both) / len(frames)
