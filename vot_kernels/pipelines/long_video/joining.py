"""Joining the scene graphs of overlapping windows into one that does not grow with the number of frames."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import numpy as np

from vot_kernels.extras import imports_for
from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

with imports_for("Joining the windows of a long video", "video"):
    from scipy.optimize import linear_sum_assignment

IOU_SHARE = 2 / 3  # of the score of a match; the rest is appearance
MIN_MATCH = 0.5  # lowest score of a match
EVERY = 4  # frames from one kept box to the next, before there are too many
MAX_BOXES = 256  # of a tracklet, besides those at events


_Name = tuple[tuple[str, ...], str]


@dataclass
class _Track:
    """A tracklet that windows continue.

    `names` counts the boxes under each (attributes, label), those that were thinned out among them; `newest` is its
    name in the last window that saw it.
    """

    id: str
    newest: _Name
    names: Counter[_Name] = field(default_factory=Counter)
    boxes: dict[int, tuple[Box, float]] = field(default_factory=dict)


class GraphJoiner:
    """Joins the graphs of windows, given in order of time, into the graph of the whole video.

    A tracklet of a window continues the earlier one that it matches best over the shared frames: by the mean IoU of
    their boxes and by the share of words that their names have in common, as one assignment over all pairs. Up to the
    middle of the shared frames the earlier window counts, from there on the later one, so that neither is trusted at
    its edge. Relations that go on there become one.

    The result is a summary: every 4th box of the past stays, or every 8th, 16th … as there are more than 256 of a
    tracklet, besides its first box and those at events. Events and relations all stay, but those of a tracklet that
    the edge of a window alone showed go with it.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.every = EVERY
        self.vocabulary = Vocabulary()
        self._tracks: list[_Track] = []
        self._events: list[Event] = []
        self._relations: list[Relation] = []  # those that no later window can change
        self._recent: list[Relation] = []
        self._settled = 0  # frames before this one have been thinned out

    def add(self, window: STSG, start: int) -> dict[str, str]:
        """Add a window whose first frame is frame `start` of the video; return the joined id of each of its tracklets.

        Raises:
            ValueError: there are frames missing between the windows so far and this one.
        """
        end = len(self.times)
        if not 0 <= start <= end:
            raise ValueError(f"A window must start at one of the frames 0 to {end}, got {start}.")
        self.vocabulary = _both(self.vocabulary, window.vocabulary)
        self.times += window.frame_times_s[end - start :]
        tracks = self._identify(window, start, end)
        cut = (start + end) // 2
        self._add_boxes(window, tracks, start, cut, end)
        ids = {id: track.id for id, track in tracks.items()}
        self._add_events(window, ids, start, cut)
        self._add_relations(window, ids, start, cut)
        self._thin(start)
        return ids

    def graph(self, source: str = "") -> STSG:
        """Return the graph of all windows so far."""
        # A later window may have taken all boxes of a track back.
        seen = {track.id: track for track in self._tracks if track.boxes}
        relations = (*self._relations, *self._recent)
        return STSG(
            frame_times_s=tuple(self.times),
            tracklets=tuple(_tracklet(track) for track in seen.values()),
            relations=tuple(r for r in relations if r.subject in seen and r.object in seen),
            events=tuple(e for e in self._events if all(id in seen for id in e.participants)),
            vocabulary=self.vocabulary,
            source=source,
        )

    def _identify(self, window: STSG, start: int, end: int) -> dict[str, _Track]:
        """Return the track that each tracklet of a window continues, a new one if none fits."""
        shared = range(start, end)
        old = [track for track in self._tracks if any(k in track.boxes for k in shared)]
        found: dict[str, _Track] = {}
        if old and window.tracklets:
            scores = np.array([[_match(track, t, start, shared) for t in window.tracklets] for track in old])
            for row, column in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
                if scores[row, column] > MIN_MATCH:
                    found[window.tracklets[column].id] = old[row]
        for tracklet in window.tracklets:
            if tracklet.id not in found:
                found[tracklet.id] = _Track(f"o{len(self._tracks) + 1}", _name(tracklet))
                self._tracks.append(found[tracklet.id])
        return found

    def _add_boxes(self, window: STSG, tracks: dict[str, _Track], start: int, cut: int, end: int) -> None:
        for track in self._tracks:
            # These boxes are of the window before.
            for k in [k for k in range(cut, end) if k in track.boxes]:
                del track.boxes[k]
                track.names[track.newest] -= 1
        for tracklet in window.tracklets:
            track = tracks[tracklet.id]
            new = {k + start: entry for k, entry in tracklet.boxes.items() if k + start >= cut}
            track.boxes |= new
            track.newest = _name(tracklet)
            track.names[track.newest] += len(new)

    def _add_events(self, window: STSG, ids: dict[str, str], start: int, cut: int) -> None:
        """Take the events before the cut from the earlier windows, and the others from the new one.

        What the two see in neighbouring frames, one on either side of the cut, is one event, and is kept once.
        """
        new = [
            replace(e, t=e.t + start, participants=tuple(ids[id] for id in e.participants))
            for e in window.events
        ]
        first = next((i for i, e in enumerate(self._events) if e.t >= cut - 1), len(self._events))
        earlier, here = _around(self._events[first:], cut), _around(new, cut)
        doubled = {who for who, frames in earlier.items() if (frames, here[who]) == ({cut - 1}, {cut})}
        missed = {who for who, frames in earlier.items() if (frames, here[who]) == ({cut}, {cut - 1})}
        lost = [e for e in self._events[first:] if e.t == cut and _who(e) in missed]
        kept = [e for e in self._events[first:] if e.t < cut]
        added = [e for e in new if e.t > cut or (e.t == cut and _who(e) not in doubled)]
        self._events[first:] = sorted([*kept, *lost, *added], key=lambda event: event.t)

    def _add_relations(self, window: STSG, ids: dict[str, str], start: int, cut: int) -> None:
        going_on: dict[tuple[str, str, str], Relation] = {}
        for relation in self._recent:
            if relation.t1 >= cut and relation.t0 < cut:
                going_on[_key(relation)] = replace(relation, t1=cut - 1)
            elif relation.t1 < cut:
                self._relations.append(relation)
        self._recent = []
        for relation in window.relations:
            if relation.t1 + start < cut:
                continue
            new = Relation(
                ids[relation.subject], relation.predicate, ids[relation.object],
                max(relation.t0 + start, cut), relation.t1 + start, relation.score,
            )  # fmt: skip
            before = going_on.pop(_key(new), None) if new.t0 == cut else None
            self._recent.append(new if before is None else _joined(before, new))
        self._relations += going_on.values()

    def _thin(self, start: int) -> None:
        """Drop most boxes of the frames before `start`, which no later window shares, but no track's first."""
        begin, self._settled = self._settled, start
        while True:
            for track in self._tracks:
                at_events = {e.t for e in self._events if track.id in e.participants and e.t >= begin}
                first = min(track.boxes, default=None)
                for k in [k for k in track.boxes if begin <= k < start]:
                    if k % self.every and k != first and k not in at_events:
                        del track.boxes[k]
            if start / self.every <= MAX_BOXES:
                return
            self.every, begin = 2 * self.every, 0


def _both(first: Vocabulary, second: Vocabulary) -> Vocabulary:
    """Return the words of two vocabularies: eyes without a closed one know of a window what they found in it."""
    parts = ((getattr(first, f.name), getattr(second, f.name)) for f in fields(Vocabulary))
    return first if first == second else Vocabulary(*(tuple(dict.fromkeys(a + b)) for a, b in parts))


def _match(track: _Track, tracklet: Tracklet, start: int, shared: Iterable[int]) -> float:
    ious = []
    for k in shared:
        old, new = track.boxes.get(k), tracklet.boxes.get(k - start)
        if old or new:
            ious.append(old[0].iou(new[0]) if old and new else 0.0)
    (attributes, label), _ = track.names.most_common(1)[0]
    old_words, new_words = {label, *attributes}, {tracklet.label, *tracklet.attributes}
    alike = len(old_words & new_words) / len(old_words | new_words)
    iou = sum(ious) / len(ious) if ious else 0.0
    return IOU_SHARE * iou + (1 - IOU_SHARE) * alike


def _tracklet(track: _Track) -> Tracklet:
    (attributes, label), _ = track.names.most_common(1)[0]
    return Tracklet(track.id, label, attributes, track.boxes)


def _name(tracklet: Tracklet) -> _Name:
    return tracklet.attributes, tracklet.label


def _who(event: Event) -> tuple[str, frozenset[str]]:
    return event.kind, frozenset(event.participants)


def _around(events: Iterable[Event], cut: int) -> dict[tuple[str, frozenset[str]], set[int]]:
    """Return in which of the two frames around the cut each thing happens."""
    found: dict[tuple[str, frozenset[str]], set[int]] = defaultdict(set)
    for event in events:
        if event.t in (cut - 1, cut):
            found[_who(event)].add(event.t)
    return found


def _key(relation: Relation) -> tuple[str, str, str]:
    return relation.subject, relation.predicate, relation.object


def _joined(before: Relation, after: Relation) -> Relation:
    """Return two parts of one relation as a whole, its score the mean over their frames."""
    first, second = before.t1 - before.t0 + 1, after.t1 - after.t0 + 1
    score = (first * before.score + second * after.score) / (first + second)
    return replace(before, t1=after.t1, score=score)
