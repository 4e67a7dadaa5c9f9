"""The lossless form of a scene graph as plain data, and as JSON.

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
    """The data is not the plain form of a scene graph; the message says where and what is allowed."""


def to_dict(stsg: STSG) -> dict[str, Any]:
    """Return the graph as dicts, lists, strings and numbers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": stsg.source,
        "frame_times_s": list(stsg.frame_times_s),
        "vocabulary": {key: list(getattr(stsg.vocabulary, key)) for key in _VOCABULARY_KEYS},
        "tracklets": [
            {
                "id": t.id,
                "label": t.label,
                "attributes": list(t.attributes),
                "boxes": [[k, *box, score] for k, (box, score) in t.boxes.items()],
            }
            for t in stsg.tracklets
        ],
        "relations": [{key: getattr(r, key) for key in _RELATION_KEYS} for r in stsg.relations],
        "events": [
            {"kind": e.kind, "t": e.t, "participants": list(e.participants), "score": e.score}
            for e in stsg.events
        ],
    }


def to_json(stsg: STSG, *, indent: int | None = None) -> str:
    """Print `to_dict` as JSON, on one line or indented.

    Raises:
        ValueError: the graph holds NaN or infinity, which JSON cannot represent.
    """
    try:
        return json.dumps(to_dict(stsg), indent=indent, allow_nan=False)
    except ValueError:
        raise ValueError("The graph holds NaN or infinity, which JSON cannot represent.") from None


def from_json(text: str | bytes) -> STSG:
    """Read what `to_json` printed.

    Raises:
        STSGFormatError: the text is not JSON, or `from_dict` refuses its contents.
    """
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise STSGFormatError(f"The text is not JSON: {error}.") from None
    return from_dict(document)


def from_dict(document: Any) -> STSG:
    """Read what `to_dict` returned. The types are checked here; `STSG.validate` checks what the graph says.

    Raises:
        STSGFormatError: another format or version, a missing or unknown key, or a wrong type.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        given = repr(document.get("format")) if isinstance(document, dict) else described(document)
        raise STSGFormatError(f'A scene graph must be an object with "format": "{FORMAT}", got {given}.')
    if document.get("version") != VERSION:
        raise STSGFormatError(f"version must be {VERSION}, got {document.get('version')!r}.")
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
            raise STSGFormatError(f"{where} must be [frame, x1, y1, x2, y2, score], got {described(entry)}.")
        frame = _integer(entry[0], where)
        if frame in boxes:
            raise STSGFormatError(f"{where} must be the only box in frame {frame}, got a second one.")
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
    """One JSON object: returns typed values and names the place of an error."""

    def __init__(self, value: Any, where: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise STSGFormatError(f"{where} must be an object, got {described(value)}.")
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
            raise STSGFormatError(f"{self.where}.{key} must be a list, got {described(value)}.")
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
        raise STSGFormatError(f"{where} must be a string, got {described(value)}.")
    return value


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise STSGFormatError(f"{where} must be a whole number, got {described(value)}.")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_float(value)):
        raise STSGFormatError(f"{where} must be a finite number, got {described(value)}.")
    return float(value)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def described(value: Any) -> str:
    """Return what a JSON value is, for a sentence: "a list of 3", "the number 2"; of a string only that it is one."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value)) or f"the number {_float(value):.6g}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
