"""STAR (Wu et al. 2021): a JSON list of questions about parts of the videos of Charades, with situation graphs.

    [{"question_id": "Interaction_T1_1", "question": "…", "video_id": "ABCDE", "start": 2.5, "end": 9.0,
      "answer": "The book.", "question_program": […],
      "choices": [{"choice_id": 0, "choice": "The book.", "choice_program": […]}, …],
      "situations": {"000063": {"actions": ["a001"], "bbox": [[x1, y1, x2, y2], …], "bbox_labels": ["o000", …],
                                "rel_pairs": [["o000", "o003"], …], "rel_labels": ["r009", …]}, …}}]

What the codes of the graphs mean is in object_classes.txt, relationship_classes.txt and action_classes.txt of the data
set; where these are beside the file, the questions have scene graphs. Programs are not read.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Given, LeftOut, read_json, text, value
from vot_kernels.data.questions.formats.situations import PERSON, Situation, graph_of, words
from vot_kernels.files import read_text

_CLASSES = ("object_classes.txt", "relationship_classes.txt", "action_classes.txt")


def records(path: Path) -> list[tuple[str, Any]]:
    """Return the questions of the file."""
    return [(f"question {n}", record) for n, record in enumerate(read_json(path, list), 1)]


def questions(record: Any, given: Given) -> Iterator[dict[str, Any] | LeftOut]:
    """Yield a question; a graph that cannot be used is left out of it."""
    id, video = text(record, "question_id"), given.video(text(record, "video_id"))
    found: dict[str, Any] = {
        "id": id,
        "video": video,
        "question": text(record, "question"),
        "answer": text(record, "answer"),
        "candidates": [text(choice, "choice") for choice in value(record, "choices", list)],
        "part": [record.get("start"), record.get("end")],
    }
    classes = _classes(given.source.parent)
    if record.get("situations") and classes:
        try:
            shown = {
                _number(name): _situation(frame, classes)
                for name, frame in value(record, "situations", dict).items()
            }
            found["stsg"] = graph_of(shown, given.facts(video), source=f"STAR {id}").to_dict()
        except ValueError as error:
            yield LeftOut(f"Its graph alone was left out: {error}")
    yield found


def _situation(frame: Any, classes: Mapping[str, str]) -> Situation:
    found = Situation()
    boxes = frame.get("bbox") if isinstance(frame, dict) else None
    labels = [_meaning(code, classes) for code in value(frame, "bbox_labels", list)]
    if not isinstance(boxes, list) or len(boxes) != len(labels):
        boxes = [None] * len(labels)
    for label, box in zip(labels, boxes, strict=True):
        found.boxes[label] = _sides(box)
    pairs, codes = value(frame, "rel_pairs", list), value(frame, "rel_labels", list)
    if len(pairs) != len(codes):
        raise ValueError(f"There must be a label for each of the {len(pairs)} pairs, got {len(codes)}.")
    for pair, code in zip(pairs, codes, strict=True):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("A pair must be a list of two objects.")
        subject, other = (_meaning(name, classes) for name in pair)
        found.relations.append((subject, _meaning(code, classes), other))
    found.relations += [(PERSON, _meaning(code, classes), PERSON) for code in value(frame, "actions", list)]
    for subject, _, other in found.relations:  # what takes part is there, with or without a box
        found.boxes.setdefault(subject, None)
        found.boxes.setdefault(other, None)
    return found


def _sides(box: Any) -> list[float] | None:
    whole = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    return box if whole and box[0] <= box[2] and box[1] <= box[3] else None


def _number(frame: str) -> int:
    if not (frame.isdecimal() and frame.isascii() and int(frame) > 0):
        raise ValueError(f"A frame must be a number from 1 on, got {frame!r}.")
    return int(frame)


def _meaning(code: Any, classes: Mapping[str, str]) -> str:
    if not isinstance(code, str) or code not in classes:
        raise ValueError(f"The classes do not say what {code!r} means.")
    return classes[code]


@lru_cache(maxsize=8)
def _classes(folder: Path) -> dict[str, str]:
    """Return what each code means; nothing where a file with classes is missing."""
    files = [folder / name for name in _CLASSES]
    if not all(file.is_file() for file in files):
        return {}
    lines = [line.split(maxsplit=1) for file in files for line in read_text(file).splitlines()]
    return {line[0]: words(line[1]) for line in lines if len(line) == 2}
