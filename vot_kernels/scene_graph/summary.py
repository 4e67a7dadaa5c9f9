"""Shorter forms of a long video's graph: what matters most of it, and some of its frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

from vot_kernels.scene_graph.graph import STSG, Event, Relation

Item = Event | Relation
T = TypeVar("T")


def summarised(stsg: STSG, most: int, importance: Callable[[Item], Any]) -> STSG:
    """Return the graph with at most `most` of its events and relations, those of the greatest importance.

    Of equally important ones that do not all fit, an even choice over the time of the video stays. Tracklets and
    frames are left as they are.

    Args:
        importance: returns something that can be compared, such as a number or a tuple of numbers.

    Raises:
        ValueError: `most` is negative.
    """
    if most < 0:
        raise ValueError(f"most must be at least 0, got {most}.")
    items: list[Item] = [*stsg.events, *stsg.relations]
    ranked = sorted(items, key=importance, reverse=True)
    kept: set[int] = set()
    for _, group in groupby(ranked, key=importance):
        kept.update(map(id, evenly(sorted(group, key=_begin), most - len(kept))))
    return replace(
        stsg,
        events=tuple(e for e in stsg.events if id(e) in kept),
        relations=tuple(r for r in stsg.relations if id(r) in kept),
    )


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """Return an even choice of at most `most` items."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def _begin(item: Item) -> int:
    return item.t if isinstance(item, Event) else item.t0


def at_frames(stsg: STSG, frames: Sequence[int], max_gap: int | None = None) -> STSG:
    """Return the graph of some of the frames, in increasing order: frame k of the result is frame `frames[k]`.

    Boxes are interpolated over gaps of at most `max_gap` frames (None: of any length). Relations hold in those of the
    frames in which they held, and of the events those in one of the frames stay.

    Raises:
        ValueError: the frames do not increase, or the graph does not have one of them.
    """
    if list(frames) != sorted(set(frames)) or any(not 0 <= k < stsg.num_frames for k in frames):
        raise ValueError(f"frames must increase from 0 to {stsg.num_frames - 1} at most, got {list(frames)}.")
    place = {frame: k for k, frame in enumerate(frames)}
    tracklets = tuple(
        replace(
            t, boxes={place[k]: entry for k, entry in t.interpolated(max_gap).boxes.items() if k in place}
        )
        for t in stsg.tracklets
    )
    relations = []
    for relation in stsg.relations:
        held = [k for k, frame in enumerate(frames) if relation.t0 <= frame <= relation.t1]
        if held:
            relations.append(replace(relation, t0=held[0], t1=held[-1]))
    return replace(
        stsg,
        frame_times_s=tuple(stsg.frame_times_s[frame] for frame in frames),
        tracklets=tracklets,
        relations=tuple(relations),
        events=tuple(replace(e, t=place[e.t]) for e in stsg.events if e.t in place),
    )
