"""Action Genome (Ji et al. 2020): objects and relations in frames of the videos of Charades, as scene graphs.

The data set has two pickles, which are never opened here, since a pickle can run code. Export both as JSON of the same
structure (tuples and arrays as lists), and keep them in one folder:

    object_bbox_and_relationship.json
        {"ABCDE.mp4/000063.png": [{"class": "book", "bbox": [x, y, w, h], "visible": true,
          "attention_relationship": ["looking_at"], "spatial_relationship": ["in_front_of"],
          "contacting_relationship": ["holding"], "metadata": {"set": "train", …}}, …], …}
    person_bbox.json
        {"ABCDE.mp4/000063.png": {"bbox": [[x1, y1, x2, y2]], "bbox_size": [width, height], …}, …}

Where the second is missing, people have no boxes. The videos say how many frames a second has, or `--fps` does.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Facts, Given, LeftOut, read_json, text, value
from vot_kernels.data.questions.formats.situations import PERSON, Situation, graph_of, words

WRITE_GRAPH = "Write the scene graph."
_PEOPLE = "person_bbox.json"
_FRAME = re.compile(r"([^/]+)/0*([1-9]\d{0,8})\.(?:png|jpg)")
_PERSON_FIRST = ("attention_relationship", "contacting_relationship")
_OBJECT_FIRST = "spatial_relationship"

_Frames = list[tuple[str, Any, Any]]
"""Of a video: the names of its frames, their objects, and their people or None."""


def records(path: Path) -> list[tuple[str, tuple[str, _Frames]]]:
    """Return the videos of the file."""
    people_file = path.with_name(_PEOPLE)
    people = read_json(people_file, dict) if people_file.is_file() and people_file != path else {}
    videos: dict[str, _Frames] = {}
    for name, objects in read_json(path, dict).items():
        videos.setdefault(name.split("/")[0], []).append((name, objects, people.get(name)))
    return [(video, (video, frames)) for video, frames in videos.items()]


def questions(record: tuple[str, _Frames], given: Given) -> Iterator[dict[str, Any] | LeftOut]:
    """Yield a question whose answer is the graph of a video; frames that cannot be read are left out of it."""
    name, frames = record
    situations: dict[int, Situation] = {}
    sizes: set[tuple[int, int]] = set()
    splits: set[str | None] = set()
    for frame, objects, people in frames:
        try:
            match = _FRAME.fullmatch(frame)
            if match is None:
                raise ValueError("A frame must be called VIDEO/NUMBER.png.")
            situations[int(match[2])] = _situation(objects, people)
            splits |= {_split(thing) for thing in objects}
            sizes |= _size(people)
        except ValueError as error:
            yield LeftOut(f"Its frame {frame} was left out: {error}")
    if not situations:
        raise ValueError("No frame of it can be read.")
    video = given.video(name)
    found = given.facts(video)
    width, height = sizes.pop() if len(sizes) == 1 else (found.width, found.height)
    graph = graph_of(situations, Facts(found.fps, width, height), source=f"Action Genome {name}")
    yield {
        "id": name,
        "video": video,
        "question": WRITE_GRAPH,
        "stsg": graph.to_dict(),
        "split": splits.pop() if len(splits) == 1 else None,
    }


def _situation(objects: Any, people: Any) -> Situation:
    if not isinstance(objects, list):
        raise ValueError("Its objects must be a list.")
    found = Situation({PERSON: _person(people)})
    for thing in objects:
        label = words(text(thing, "class"))
        if thing.get("visible") is False:
            continue
        found.boxes[label] = _sides(thing.get("bbox"))
        for key in (*_PERSON_FIRST, _OBJECT_FIRST):
            for predicate in value(thing, key, list) if thing.get(key) is not None else []:
                if not isinstance(predicate, str):
                    raise ValueError(f'"{key}" must be a list of strings.')
                ends = (label, PERSON) if key == _OBJECT_FIRST else (PERSON, label)
                found.relations.append((ends[0], words(predicate), ends[1]))
    return found


def _sides(box: Any) -> list[float] | None:
    """Return (x, y, w, h) as (x1, y1, x2, y2)."""
    if box is None:
        return None
    x, y, width, height = _four(box)
    if width < 0 or height < 0:
        raise ValueError("A box must be [x, y, width, height], got a negative side.")
    return [x, y, x + width, y + height]


def _person(people: Any) -> list[float] | None:
    """Return the first of the boxes of people, None if there is none."""
    boxes = people.get("bbox") if isinstance(people, dict) else None
    if not isinstance(boxes, list) or not boxes:
        return None
    box = _four(boxes[0])
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError("A box of a person must be [x1, y1, x2, y2], got its corners swapped.")
    return box


def _four(box: Any) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        raise ValueError("A box must be a list of four numbers.")
    return box


def _size(people: Any) -> set[tuple[int, int]]:
    """Return the size of the frame; nothing if it is not known."""
    size = people.get("bbox_size") if isinstance(people, dict) else None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(_is_number(side) and side > 0 for side in size)
    ):
        return set()
    return {(size[0], size[1])}


def _split(thing: dict[str, Any]) -> str | None:
    metadata = thing.get("metadata")
    split = metadata.get("set") if isinstance(metadata, dict) else None
    return split if isinstance(split, str) else None


def _is_number(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
