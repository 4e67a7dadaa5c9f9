"""Scene graphs from annotated frames, in which a class has one object: what STAR and Action Genome have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vot_kernels.data.questions.formats.given import Facts
from vot_kernels.scene_graph.graph import STSG, Box, Relation, Tracklet, Vocabulary
from vot_kernels.scene_graph.text import printable

PERSON = "person"


@dataclass
class Situation:
    """What an annotated frame shows.

    Attributes:
        boxes: for each class its box in pixels, (x1, y1, x2, y2), or None where it has none.
        relations: (subject, predicate, object), classes all; subject and object are equal for what somebody does.
    """

    boxes: dict[str, Sequence[float] | None] = field(default_factory=dict)
    relations: list[tuple[str, str, str]] = field(default_factory=list)


def words(label: str) -> str:
    """Return a label as words: "in_front_of" is "in front of"."""
    return printable(label.replace("_", " ").lower())


def graph_of(situations: Mapping[int, Situation], facts: Facts, source: str) -> STSG:
    """Return the graph of annotated frames, which are its frames 0, 1, 2, …

    Args:
        situations: by the number that ffmpeg gives a frame, from 1.
        facts: of the video; without its size, no object has boxes.

    Raises:
        ValueError: the frames per second are not known.
    """
    if not facts.fps:
        raise ValueError(
            "The frames have numbers, but neither the video nor --fps says how many a second has."
        )
    numbers = sorted(situations)
    shown = [situations[number] for number in numbers]
    labels = tuple(dict.fromkeys(label for frame in shown for label in frame.boxes))
    ids = {label: f"o{n}" for n, label in enumerate(labels, 1)}
    boxes: dict[str, dict[int, tuple[Box, float]]] = {label: {} for label in labels}
    for k, frame in enumerate(shown):
        for label, box in frame.boxes.items():
            if box is not None and facts.width and facts.height:
                boxes[label][k] = (_box(box, facts.width, facts.height), 1.0)
    relations = [
        Relation(ids[subject], predicate, ids[other], first, last)
        for (subject, predicate, other), frames in _frames_of(shown).items()
        for first, last in _runs(frames)
    ]
    return STSG(
        frame_times_s=tuple((number - 1) / facts.fps for number in numbers),
        tracklets=tuple(Tracklet(ids[label], label, (), boxes[label]) for label in labels),
        relations=tuple(relations),
        vocabulary=Vocabulary(labels, predicates=tuple(dict.fromkeys(r.predicate for r in relations))),
        source=source,
    )


def _frames_of(shown: Sequence[Situation]) -> dict[tuple[str, str, str], list[int]]:
    found: dict[tuple[str, str, str], list[int]] = {}
    for k, frame in enumerate(shown):
        for relation in dict.fromkeys(frame.relations):
            found.setdefault(relation, []).append(k)
    return found


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last of each run of whole numbers without a gap."""
    breaks = [n for n in range(1, len(frames)) if frames[n] > frames[n - 1] + 1]
    starts, ends = [0, *breaks], [*(n - 1 for n in breaks), len(frames) - 1]
    return [(frames[a], frames[b]) for a, b in zip(starts, ends, strict=True)]


def _box(box: Sequence[float], width: int, height: int) -> Box:
    """Return a box in fractions of the frame, cut off at its edges."""
    x1, y1, x2, y2 = (
        min(max(side / size, 0.0), 1.0) for side, size in zip(box, (width, height) * 2, strict=True)
    )
    return Box(x1, y1, x2, y2)
