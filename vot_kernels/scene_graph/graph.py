"""The typed spatial-temporal scene graph: tracked boxes, relations over frame intervals, events at a frame.

Frames are counted from 0 and index `STSG.frame_times_s`; boxes are fractions of the frame, (0, 0) top left.
All types are immutable and compare by value. Only `to_packed` needs numpy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vot_kernels.scene_graph.interval import Interval

if TYPE_CHECKING:
    from vot_kernels.scene_graph.text import ParseIssue

_TRACK_ID = re.compile(r"o[1-9][0-9]*")


class Box(NamedTuple):
    """A box (x1, y1, x2, y2) in fractions of the frame's width and height, (x1, y1) its top left corner."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def center(self) -> tuple[float, float]:
        """The centre (x, y), fractions of the frame."""
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def area(self) -> float:
        """The area as a fraction of the frame; 0 for a box without extent."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)

    def iou(self, other: Box) -> float:
        """Intersection over union with `other`; 0 where both have no area."""
        shared = Box(
            max(self.x1, other.x1), max(self.y1, other.y1), min(self.x2, other.x2), min(self.y2, other.y2)
        ).area
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0


@dataclass(frozen=True)
class Tracklet:
    """One object followed over frames.

    Attributes:
        id: "o1", "o2", …
        label: its class.
        attributes: words that go before the label in its name.
        boxes: frame index -> (box, score), sorted by frame; any mapping to anything box-like may be given.
    """

    id: str
    label: str
    attributes: tuple[str, ...] = ()
    boxes: Mapping[int, tuple[Box, float]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", tuple(self.attributes))
        boxes = {int(k): (Box(*map(float, box)), float(score)) for k, (box, score) in self.boxes.items()}
        object.__setattr__(self, "boxes", dict(sorted(boxes.items())))

    @property
    def name(self) -> str:
        """The display name: attributes, then label ("red digit 3")."""
        return " ".join((*self.attributes, self.label))

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames in which it is present, ascending."""
        return tuple(self.boxes)

    def box(self, frame: int) -> Box | None:
        """Return its box in `frame`, or None if it is absent."""
        entry = self.boxes.get(frame)
        return None if entry is None else entry[0]

    def between(self, t0: int, t1: int) -> Tracklet:
        """Return the same tracklet with only the boxes of frames t0 … t1 (inclusive)."""
        return replace(self, boxes={k: entry for k, entry in self.boxes.items() if t0 <= k <= t1})

    def interpolated(self, max_gap: int | None = None) -> Tracklet:
        """Return the same tracklet with boxes linearly interpolated between known frames.

        Gaps of more than `max_gap` frames (None: no limit) stay open. The score of an interpolated box is the lower
        of its neighbours' scores.
        """
        boxes = dict(self.boxes)
        for a, b in zip(self.frames, self.frames[1:], strict=False):
            if max_gap is not None and b - a > max_gap:
                continue
            (box_a, score_a), (box_b, score_b) = self.boxes[a], self.boxes[b]
            for k in range(a + 1, b):
                w = (k - a) / (b - a)
                box = Box(*((1 - w) * p + w * q for p, q in zip(box_a, box_b, strict=True)))
                boxes[k] = (box, min(score_a, score_b))
        return replace(self, boxes=boxes)


@dataclass(frozen=True)
class Relation:
    """`subject predicate object` over a range of frames. A unary relation has object == subject.

    Attributes:
        subject, object: track ids.
        predicate: a word of the vocabulary, such as "left of".
        t0, t1: first and last frame, both inclusive.
        score: confidence in [0, 1].
    """

    subject: str
    predicate: str
    object: str
    t0: int
    t1: int
    score: float = 1.0

    def __post_init__(self) -> None:
        _make_plain(self, "t0", "t1")


@dataclass(frozen=True)
class Event:
    """Something that happens in one frame.

    Attributes:
        kind: a word of the vocabulary, such as "hits".
        t: the frame.
        participants: track ids, the actor first.
        score: confidence in [0, 1].
    """

    kind: str
    t: int
    participants: tuple[str, ...]
    score: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "participants", tuple(self.participants))
        _make_plain(self, "t")


def _make_plain(item: Relation | Event, *frames: str) -> None:
    """Convert NumPy numbers, which JSON cannot print, to Python's."""
    for name in frames:
        object.__setattr__(item, name, int(getattr(item, name)))
    object.__setattr__(item, "score", float(item.score))


@dataclass(frozen=True)
class Vocabulary:
    """The closed sets of words a graph may use."""

    labels: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("labels", "attributes", "predicates", "events"):
            words = getattr(self, part)
            if isinstance(words, str):
                raise TypeError(f"Vocabulary.{part} must be a sequence of words, got the string {words!r}.")
            object.__setattr__(self, part, tuple(words))


class Node(NamedTuple):
    """A tracklet in one frame; `track` is its index in `STSG.tracklets`."""

    track: int
    id: str
    label: str
    attributes: tuple[str, ...]
    box: Box
    score: float


class CorefEdge(NamedTuple):
    """The same tracklet in one frame and in the next frame it is present in."""

    id: str
    frame: int
    next_frame: int


@dataclass(frozen=True)
class SceneFrame:
    """One frame of the graph.

    Attributes:
        index, time_s: index of the frame, and its time in seconds.
        nodes: the tracklets that are present in it.
        relations, events: those that hold or happen in it.
    """

    index: int
    time_s: float
    nodes: tuple[Node, ...]
    relations: tuple[Relation, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, eq=False)
class PackedGraph:
    """The nodes of all frames, concatenated for the graph transformer and sorted by frame.

    Edge types are the vocabulary's predicates, then its events. A unary relation or event is a loop.

    Attributes:
        lengths: int64 `[frames]`, nodes per frame, zeros allowed.
        track: int64 `[nodes]`, index in `STSG.tracklets`.
        label: int64 `[nodes]`, index in `vocabulary.labels`; `len(labels)` for any other label.
        attributes: float32 `[nodes, attributes]`, 1 where the attribute is present.
        boxes: float32 `[nodes, 4]`, x1, y1, x2, y2 in fractions of the frame.
        scores: float32 `[nodes]`.
        edges: int64 `[edges, 3]`, subject node, object node, type; both ends are in the same frame.
        edge_scores: float32 `[edges]`.
        coref: int64 `[links, 2]`, a node and the same tracklet's next node.
        num_tracks: number of tracklets, including those without nodes.
    """

    lengths: np.ndarray
    track: np.ndarray
    label: np.ndarray
    attributes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    edges: np.ndarray
    edge_scores: np.ndarray
    coref: np.ndarray
    num_tracks: int


@dataclass(frozen=True)
class STSG:
    """A video as a graph.

    Attributes:
        frame_times_s: time of each frame, in seconds.
        tracklets, relations, events: the parts of the graph.
        vocabulary: the words it may use.
        source: where the graph comes from, for people.
    """

    frame_times_s: tuple[float, ...]
    tracklets: tuple[Tracklet, ...] = ()
    relations: tuple[Relation, ...] = ()
    events: tuple[Event, ...] = ()
    vocabulary: Vocabulary = Vocabulary()
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame_times_s", tuple(map(float, self.frame_times_s)))
        for part in ("tracklets", "relations", "events"):
            object.__setattr__(self, part, tuple(getattr(self, part)))

    @property
    def num_frames(self) -> int:
        return len(self.frame_times_s)

    def tracklet(self, id: str) -> Tracklet:
        """Return the tracklet called `id`; KeyError if there is none."""
        for tracklet in self.tracklets:
            if tracklet.id == id:
                return tracklet
        raise KeyError(
            f"There is no tracklet {id!r}; the graph has {', '.join(t.id for t in self.tracklets) or 'none'}."
        )

    def frame(self, k: int) -> SceneFrame:
        """Return everything about frame `k`, 0 ≤ k < num_frames; IndexError outside of this range."""
        if not 0 <= k < self.num_frames:
            raise IndexError(f"Frame {k} was asked for; the graph has the frames 0 to {self.num_frames - 1}.")
        nodes = (
            Node(i, t.id, t.label, t.attributes, *t.boxes[k])
            for i, t in enumerate(self.tracklets)
            if k in t.boxes
        )
        return SceneFrame(
            index=k,
            time_s=self.frame_times_s[k],
            nodes=tuple(nodes),
            relations=tuple(r for r in self.relations if r.t0 <= k <= r.t1),
            events=tuple(e for e in self.events if e.t == k),
        )

    def interval(self, item: Relation | Event) -> Interval:
        """Return when a relation holds or an event happens, in seconds.

        A relation lasts from its first to its last frame. An event lies somewhere between the frame before its own
        and the one after it, so these are its ends.
        """
        first, last = (item.t0, item.t1) if isinstance(item, Relation) else (item.t - 1, item.t + 1)
        times = self.frame_times_s
        return Interval(times[max(first, 0)], times[min(last, self.num_frames - 1)])

    def subgraph(self, ids: Collection[str] | None = None, t0: int = 0, t1: int | None = None) -> STSG:
        """Return the part about the tracklets `ids` (None: all) in the frames t0 … t1 (inclusive; None: to the end).

        Relations are cut to the interval; relations and events that involve others are dropped. Frames keep their
        indices and times, so that evidence from a subgraph refers to the same moments of the video.
        """
        wanted = {t.id for t in self.tracklets} if ids is None else set(ids)
        last = self.num_frames - 1 if t1 is None else t1
        relations = (
            replace(r, t0=max(r.t0, t0), t1=min(r.t1, last))
            for r in self.relations
            if {r.subject, r.object} <= wanted and r.t0 <= last and r.t1 >= t0
        )
        return replace(
            self,
            tracklets=tuple(t.between(t0, last) for t in self.tracklets if t.id in wanted),
            relations=tuple(relations),
            events=tuple(e for e in self.events if set(e.participants) <= wanted and t0 <= e.t <= last),
        )

    def coref_edges(self) -> tuple[CorefEdge, ...]:
        """Return the links from each box to the same tracklet's next box, by tracklet, then by frame."""
        return tuple(
            CorefEdge(t.id, a, b)
            for t in self.tracklets
            for a, b in zip(t.frames, t.frames[1:], strict=False)
        )

    def interpolated(self, max_gap: int | None = None) -> STSG:
        """Return the graph with every tracklet `Tracklet.interpolated`, as for text that has every 4th frame."""
        return replace(self, tracklets=tuple(t.interpolated(max_gap) for t in self.tracklets))

    def to_packed(self, vocabulary: Vocabulary | None = None) -> PackedGraph:
        """Return the graph as arrays, indexed by `vocabulary` (default: the graph's own).

        Words outside the vocabulary raise no error: a label gets the index `len(labels)`; an attribute, relation or
        event is dropped, as are relations and events in frames where one of their ends has no box.

        Raises:
            ValueError: a box is outside the frames 0 … num_frames-1.
        """
        return _pack(self, vocabulary or self.vocabulary)

    def validate(self) -> list[str]:
        """Return one readable sentence per problem of the graph; empty for a valid graph."""
        return list(_problems(self))

    def to_text(
        self, *, every: int = 4, boxes: bool = True, relations: bool = True, events: bool = True
    ) -> str:
        """The compact text form; see `vot_kernels.scene_graph.text.to_text`."""
        from vot_kernels.scene_graph.text import to_text

        return to_text(self, every=every, boxes=boxes, relations=relations, events=events)

    @staticmethod
    def from_text(
        text: str, vocabulary: Vocabulary | None = None, frame_times_s: Sequence[float] | None = None
    ) -> tuple[STSG, list[ParseIssue]]:
        """Read the text form, as a language model may have written it; see `vot_kernels.scene_graph.text.from_text`."""
        from vot_kernels.scene_graph.text import from_text

        return from_text(text, vocabulary, frame_times_s)

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as plain data; see `vot_kernels.scene_graph.serialization`."""
        from vot_kernels.scene_graph.serialization import to_dict

        return to_dict(self)

    @staticmethod
    def from_dict(document: Any) -> STSG:
        """Read what `to_dict` returned; see `vot_kernels.scene_graph.serialization.from_dict`."""
        from vot_kernels.scene_graph.serialization import from_dict

        return from_dict(document)

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON; see `vot_kernels.scene_graph.serialization.to_json`."""
        from vot_kernels.scene_graph.serialization import to_json

        return to_json(self, indent=indent)

    @staticmethod
    def from_json(text: str | bytes) -> STSG:
        """Read what `to_json` printed; see `vot_kernels.scene_graph.serialization.from_json`."""
        from vot_kernels.scene_graph.serialization import from_json

        return from_json(text)


def _pack(stsg: STSG, vocabulary: Vocabulary) -> PackedGraph:
    frames = stsg.num_frames
    places = sorted((k, i) for i, t in enumerate(stsg.tracklets) for k in t.boxes)
    if places and not 0 <= places[0][0] <= places[-1][0] < frames:
        raise ValueError(
            f"Boxes are in the frames {places[0][0]} to {places[-1][0]}, but the graph has {frames} frames."
        )
    node_at = {place: n for n, place in enumerate(places)}
    nodes = [(stsg.tracklets[i], *stsg.tracklets[i].boxes[k]) for k, i in places]
    label_index = _index(vocabulary.labels)
    attribute_index = _index(vocabulary.attributes)

    lengths = np.bincount(np.array([k for k, _ in places], np.int64), minlength=frames).astype(np.int64)
    attributes = np.zeros((len(nodes), len(vocabulary.attributes)), np.float32)
    for n, (tracklet, _, _) in enumerate(nodes):
        attributes[n, [attribute_index[a] for a in tracklet.attributes if a in attribute_index]] = 1
    edges = list(_edges(stsg, vocabulary, node_at))
    coref = [
        (node_at[a, i], node_at[b, i])
        for i, t in enumerate(stsg.tracklets)
        for a, b in zip(t.frames, t.frames[1:], strict=False)
    ]
    unknown = len(vocabulary.labels)
    return PackedGraph(
        lengths=lengths,
        track=np.array([i for _, i in places], np.int64),
        label=np.array([label_index.get(t.label, unknown) for t, _, _ in nodes], np.int64),
        attributes=attributes,
        boxes=np.array([box for _, box, _ in nodes], np.float32).reshape(-1, 4),
        scores=np.array([score for _, _, score in nodes], np.float32),
        edges=np.array([edge for edge, _ in edges], np.int64).reshape(-1, 3),
        edge_scores=np.array([score for _, score in edges], np.float32),
        coref=np.array(coref, np.int64).reshape(-1, 2),
        num_tracks=len(stsg.tracklets),
    )


def _index(words: Iterable[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def _edges(
    stsg: STSG, vocabulary: Vocabulary, node_at: Mapping[tuple[int, int], int]
) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Yield ((subject node, object node, type), score) for relations, frame by frame, then for events."""
    track = {t.id: i for i, t in enumerate(stsg.tracklets)}
    predicate_index, event_index = _index(vocabulary.predicates), _index(vocabulary.events)

    def edge(k: int, subject: str, object: str, type: int, score: float) -> Iterator:
        a = node_at.get((k, track.get(subject, -1)))
        b = node_at.get((k, track.get(object, -1)))
        if a is not None and b is not None:
            yield (a, b, type), score

    for r in stsg.relations:
        if r.predicate in predicate_index:
            for k in range(max(r.t0, 0), min(r.t1, stsg.num_frames - 1) + 1):
                yield from edge(k, r.subject, r.object, predicate_index[r.predicate], r.score)
    for e in stsg.events:
        if e.kind in event_index and e.participants:
            type = len(vocabulary.predicates) + event_index[e.kind]
            for other in e.participants[1:] or e.participants:
                yield from edge(e.t, e.participants[0], other, type, e.score)


def _problems(stsg: STSG) -> Iterator[str]:
    vocabulary, frames = stsg.vocabulary, stsg.num_frames
    yield from _time_problems(stsg.frame_times_s)
    ids = Counter(t.id for t in stsg.tracklets)
    for id, count in ids.items():
        if count > 1:
            yield f"The track id {id!r} is used {count} times; ids are unique."
        if not _TRACK_ID.fullmatch(id):
            yield f"The track id {id!r} is not of the form o1, o2, …"
    for t in stsg.tracklets:
        if t.label not in vocabulary.labels:
            yield f"{t.id}: the label {t.label!r} is not in the vocabulary."
        for attribute in t.attributes:
            if attribute not in vocabulary.attributes:
                yield f"{t.id}: the attribute {attribute!r} is not in the vocabulary."
        for k, (box, score) in t.boxes.items():
            if not 0 <= k < frames:
                yield f"{t.id}: frame {k} is outside the graph's {frames} frames."
            yield from (f"{t.id}, frame {k}: {problem}" for problem in _box_problems(box))
            yield from (f"{t.id}, frame {k}: {problem}" for problem in _score_problems(score))
    for r in stsg.relations:
        where = f"Relation {r.subject} {r.predicate} {r.object} @{r.t0}-{r.t1}"
        if r.predicate not in vocabulary.predicates:
            yield f"{where}: the predicate {r.predicate!r} is not in the vocabulary."
        for id in dict.fromkeys((r.subject, r.object)):
            if id not in ids:
                yield f"{where}: there is no tracklet {id!r}."
        if r.t0 > r.t1:
            yield f"{where}: it ends before it begins."
        if not (0 <= r.t0 < frames and 0 <= r.t1 < frames):
            yield f"{where}: it reaches outside the graph's {frames} frames."
        yield from (f"{where}: {problem}" for problem in _score_problems(r.score))
    for e in stsg.events:
        where = f"Event {e.kind} @{e.t}"
        if e.kind not in vocabulary.events:
            yield f"{where}: the kind {e.kind!r} is not in the vocabulary."
        for id in dict.fromkeys(e.participants):
            if id not in ids:
                yield f"{where}: there is no tracklet {id!r}."
        if not 0 <= e.t < frames:
            yield f"{where}: it lies outside the graph's {frames} frames."
        yield from (f"{where}: {problem}" for problem in _score_problems(e.score))


def _time_problems(times: Sequence[float]) -> Iterator[str]:
    if not all(map(math.isfinite, times)):
        yield "The frame times hold a value that is not finite."
    elif any(b <= a for a, b in zip(times, times[1:], strict=False)):
        yield "The frame times do not increase from frame to frame."


def _box_problems(box: Box) -> Iterator[str]:
    shown = ", ".join(f"{v:g}" for v in box)
    if not all(0 <= v <= 1 for v in box):
        yield f"the box ({shown}) reaches outside the frame, whose coordinates are 0 to 1."
    if box.x1 > box.x2 or box.y1 > box.y2:
        yield f"the box ({shown}) has its corners swapped; x1 ≤ x2 and y1 ≤ y2 hold."


def _score_problems(score: float) -> Iterator[str]:
    if not 0 <= score <= 1:
        yield f"the score {score:g} is not between 0 and 1."
