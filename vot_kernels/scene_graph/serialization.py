"""The lossless JSON form of a scene graph.

    {"format": "vot-kernels/stsg", "version": 1, "source": "…", "frame_times_s": [0.0, 0.125],
     "vocabulary": {"labels": […], "attributes": […], "predicates": […], "events": […]},
     "tracklets": [{"id": "o1", "label": "digit 3", "attributes": ["red"],
                    "boxes": [[frame, x1, y1, x2, y2, score], …]}],
     "relations": [{"subject": "o1", "predicate": "left of", "object": "o2", "t0": 0, "t1": 7, "score": 1.0}],
     "events": [{"kind": "hits", "t": 6, "participants": ["o1", "o2"], "score": 1.0}]}

Floats are written in full, so that reading gives back an equal graph.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

FORMAT = "vot-kernels/stsg"
VERSION = 1

_GRAPH_KEYS = (
    "format",
    "version",
    "source",
    "frame_times_s",
    "vocabulary",
    "tracklets",
    "relations",
    "events",
)
_VOCABULARY_KEYS = ("labels", "attributes", "predicates", "events")
_TRACKLET_KEYS = ("id", "label", "attributes", "boxes")
_RELATION_KEYS = ("subject", "predicate", "object", "t0", "t1", "score")
_EVENT_KEYS = ("kind", "t", "participants", "score")


class STSGFormatError(ValueError):
    """A text is not the JSON form of a scene graph; the message says where and what is allowed."""


def to_json(stsg: STSG, *, indent: int | None = None) -> str:
    """Print the JSON form on one line, or indented.

    Raises:
        ValueError: the graph holds NaN or infinity, which JSON has no number for.
    """
    vocabulary = stsg.vocabulary
    document = {
        "format": FORMAT,
        "version": VERSION,
        "source": stsg.source,
        "frame_times_s": stsg.frame_times_s,
        "vocabulary": {key: getattr(vocabulary, key) for key in _VOCABULARY_KEYS},
        "tracklets": [
            {
                "id": t.id,
                "label": t.label,
                "attributes": t.attributes,
                "boxes": [[k, *box, score] for k, (box, score) in t.boxes.items()],
            }
            for t in stsg.tracklets
        ],
        "relations": [{key: getattr(r, key) for key in _RELATION_KEYS} for r in stsg.relations],
        "events": [{key: getattr(e, key) for key in _EVENT_KEYS} for e in stsg.events],
    }
    try:
        return json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:
        raise ValueError("The graph holds NaN or infinity, which JSON has no number for.") from None


def from_json(text: str | bytes) -> STSG:
    """Read the JSON form. The content is checked for its types; `STSG.validate` checks what it says.

    Raises:
        STSGFormatError: no JSON, another format or version, a missing or unknown key, or a wrong type.
    """
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise STSGFormatError(f"The text is not JSON: {error}.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise STSGFormatError(f'The JSON is not a scene graph; that is an object with "format": "{FORMAT}".')
    if document.get("version") != VERSION:
        raise STSGFormatError(
            f"Version {document.get('version')!r} was given; version {VERSION} can be read."
        )
    graph = _Reader(document, "graph", _GRAPH_KEYS)
    words = graph.reader("vocabulary", _VOCABULARY_KEYS)
    return STSG(
        frame_times_s=tuple(graph.numbers("frame_times_s")),
        tracklets=tuple(map(_tracklet, graph.readers("tracklets", _TRACKLET_KEYS))),
        relations=tuple(map(_relation, graph.readers("relations", _RELATION_KEYS))),
        events=tuple(map(_event, graph.readers("events", _EVENT_KEYS))),
        vocabulary=Vocabulary(*(words.strings(key) for key in _VOCABULARY_KEYS)),
        source=graph.string("source"),
    )


def _tracklet(reader: "_Reader") -> Tracklet:
    boxes: dict[int, tuple[Box, float]] = {}
    for i, entry in enumerate(reader.list("boxes")):
        where = f"{reader.where}.boxes[{i}]"
        if not isinstance(entry, list) or len(entry) != 6:
            raise STSGFormatError(f"{where} is not [frame, x1, y1, x2, y2, score].")
        frame = _integer(entry[0], where)
        if frame in boxes:
            raise STSGFormatError(f"{where} is a second box in frame {frame}; there is one per frame.")
        x1, y1, x2, y2, score = (_number(value, where) for value in entry[1:])
        boxes[frame] = (Box(x1, y1, x2, y2), score)
    return Tracklet(reader.string("id"), reader.string("label"), reader.strings("attributes"), boxes)


def _relation(reader: "_Reader") -> Relation:
    subject, predicate, object = map(reader.string, ("subject", "predicate", "object"))
    return Relation(
        subject, predicate, object, reader.integer("t0"), reader.integer("t1"), reader.number("score")
    )


def _event(reader: "_Reader") -> Event:
    return Event(
        reader.string("kind"), reader.integer("t"), reader.strings("participants"), reader.number("score")
    )


class _Reader:
    """One JSON object: hands out typed values and names the place of what is wrong."""

    def __init__(self, value: Any, where: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise STSGFormatError(f"{where} is {_kind(value)}; an object is allowed there.")
        for key in keys:
            if key not in value:
                raise STSGFormatError(f"{where} has no {key!r}; its keys are {', '.join(keys)}.")
        for key in value:
            if key not in keys:
                raise STSGFormatError(f"{where} has the unknown key {key!r}; its keys are {', '.join(keys)}.")
        self.value, self.where = value, where

    def reader(self, key: str, keys: tuple[str, ...]) -> "_Reader":
        return _Reader(self.value[key], f"{self.where}.{key}", keys)

    def readers(self, key: str, keys: tuple[str, ...]) -> Iterator["_Reader"]:
        return (_Reader(v, f"{self.where}.{key}[{i}]", keys) for i, v in enumerate(self.list(key)))

    def list(self, key: str) -> list:
        value = self.value[key]
        if not isinstance(value, list):
            raise STSGFormatError(f"{self.where}.{key} is {_kind(value)}; a list is allowed there.")
        return value

    def string(self, key: str) -> str:
        return _string(self.value[key], f"{self.where}.{key}")

    def integer(self, key: str) -> int:
        return _integer(self.value[key], f"{self.where}.{key}")

    def number(self, key: str) -> float:
        return _number(self.value[key], f"{self.where}.{key}")

    def strings(self, key: str) -> tuple[str, ...]:
        return tuple(_string(v, f"{self.where}.{key}[{i}]") for i, v in enumerate(self.list(key)))

    def numbers(self, key: str) -> Iterator[float]:
        return (_number(v, f"{self.where}.{key}[{i}]") for i, v in enumerate(self.list(key)))


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise STSGFormatError(f"{where} is {_kind(value)}; a string is allowed there.")
    return value


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise STSGFormatError(f"{where} holds {_kind(value)}; a whole number is allowed there.")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_float(value)):
        raise STSGFormatError(f"{where} holds {_kind(value)}; a finite number is allowed there.")
    return float(value)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value)) or f"the number {_float(value):.6g}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
