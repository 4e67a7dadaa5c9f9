"""One question about a video with its answer, and its plain form: a line of a JSONL file.

    {"video": "a.mp4", "question": "Who comes in first?", "answer": "the dog", "candidates": ["the dog", "the cat"]}
    {"video": "a.mp4", "question": "When does the dog come in?", "start": 2.5, "end": 4.0}

What an answer is, if there is no "answer": the interval from "start" to "end", else the scene graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.serialization import STSGFormatError, described
from vot_kernels.scene_graph.words import fold

QuestionKind = Literal["choice", "open", "when", "graph"]
KINDS: tuple[QuestionKind, ...] = ("choice", "open", "when", "graph")
KEYS = (
    *("video", "question", "answer", "candidates", "start", "end"),
    *("stsg", "fps", "part", "split", "id", "source"),
)
"""What is read of a line; other keys may be there."""


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a video, and its answer.

    Attributes:
        video: path of the video, relative to the folder of the file if not absolute.
        question: its text.
        answer: the answer in words; the interval or the graph in words, if that is the answer.
        id: unique in the file.
        kind: "choice" has candidates, "when" an interval as the answer, "graph" a scene graph; others are "open".
        candidates: the answers to choose from, the right one among them; empty if there are none.
        interval: when, in seconds of the video, what is asked for happens.
        stsg: the scene graph of the video, or of what the question is about.
        part: the seconds of the video that the question is about; frames of other times are not shown.
        split: "train", "val", "test" or another name.
        source: where the question comes from, for people.
    """

    video: str
    question: str
    answer: str
    id: str
    kind: QuestionKind = "open"
    candidates: tuple[str, ...] = ()
    interval: Interval | None = None
    stsg: STSG | None = None
    part: Interval | None = None
    split: str | None = None
    source: str | None = None


def question_from_dict(fields: Any, id: str) -> VideoQuestion:
    """Read the plain form of a question; keys that are null count as missing.

    Args:
        fields: a dict with the keys `KEYS`, of which "video", "question" and an answer are needed.
        id: the id of a question without one.

    Raises:
        ValueError: the first thing that is wrong, in one sentence.
    """
    if not isinstance(fields, dict):
        raise ValueError(f'A line must be an object with "video" and "question", got {described(fields)}.')
    given = {key: fields[key] for key in KEYS if fields.get(key) is not None}
    texts = {
        key: _text(given, key) for key in ("video", "question", "answer", "split", "source") if key in given
    }
    for key in ("video", "question"):
        if key not in texts:
            raise ValueError(f'"{key}" is missing; it must be a string.')
    if "://" in texts["video"]:
        raise ValueError(f'"video" must be a local path, got the URL {_shown(texts["video"])}.')
    candidates, interval, stsg = _candidates(given), _interval(given), _stsg(given)
    kind, answer = _answer(texts.get("answer"), candidates, interval, stsg)
    return VideoQuestion(
        video=texts["video"],
        question=texts["question"],
        answer=answer,
        id=id_of(given, id),
        kind=kind,
        candidates=candidates,
        interval=interval,
        stsg=stsg,
        part=_part(given, interval),
        split=texts.get("split"),
        source=texts.get("source"),
    )


def question_to_dict(question: VideoQuestion) -> dict[str, Any]:
    """Return the plain form, which `question_from_dict` reads back as an equal question."""
    found: dict[str, Any] = {"id": question.id, "video": question.video, "question": question.question}
    if question.kind in ("choice", "open"):
        found["answer"] = question.answer
    if question.candidates:
        found["candidates"] = list(question.candidates)
    if question.interval is not None:
        found |= {"start": question.interval.start_s, "end": question.interval.end_s}
    if question.stsg is not None:
        found["stsg"] = question.stsg.to_dict()
    if question.part is not None:
        found["part"] = [question.part.start_s, question.part.end_s]
    named = {"split": question.split, "source": question.source}
    return found | {key: value for key, value in named.items() if value is not None}


def _answer(
    said: str | None, candidates: tuple[str, ...], interval: Interval | None, stsg: STSG | None
) -> tuple[QuestionKind, str]:
    if candidates and said not in candidates:
        given = "no answer" if said is None else _shown(said)
        listed = " | ".join(map(_shown, candidates[:8])) + (" | …" if len(candidates) > 8 else "")
        raise ValueError(f'"answer" must be one of the candidates {listed}, got {given}.')
    if said is not None:
        return ("choice" if candidates else "open"), said
    if interval is not None:
        return "when", str(interval)
    if stsg is not None:
        return "graph", stsg.to_text()
    raise ValueError(
        '"answer" is missing; it must be a string, or there must be "start" and "end", or "stsg".'
    )


def _candidates(given: Mapping[str, Any]) -> tuple[str, ...]:
    found = given.get("candidates", [])
    if not isinstance(found, list) or ("candidates" in given and len(found) < 2):
        raise ValueError(f'"candidates" must be a list of at least two strings, got {described(found)}.')
    texts = tuple(_text({f"candidates[{n}]": text}, f"candidates[{n}]") for n, text in enumerate(found))
    first: dict[str, str] = {}
    for text in texts:
        if (same := first.get(fold(text))) is not None:
            raise ValueError(f'"candidates" must differ, but {_shown(same)} and {_shown(text)} are the same.')
        first[fold(text)] = text
    return texts


def _interval(given: Mapping[str, Any]) -> Interval | None:
    if ("start" in given) != ("end" in given):
        here, missing = ("start", "end") if "start" in given else ("end", "start")
        raise ValueError(f'"{here}" must come with "{missing}", which is missing.')
    if "start" not in given:
        return None
    start, end = _seconds(given["start"], "start"), _seconds(given["end"], "end")
    if start > end:
        raise ValueError(f'"start" must not be after "end", got {start:g} s to {end:g} s.')
    return Interval(start, end)


def part_of(given: Mapping[str, Any]) -> Interval | None:
    """Return the "part" of the video that the plain form of a question is about; None for the whole of it.

    Raises:
        ValueError: it is no interval in seconds.
    """
    if given.get("part") is None:
        return None
    ends = given["part"]
    if not isinstance(ends, list) or len(ends) != 2:
        raise ValueError(f'"part" must be [start, end] in seconds, got {described(ends)}.')
    start, end = (_seconds(value, "part") for value in ends)
    if start >= end:
        raise ValueError(f'"part" must begin before it ends, got {start:g} s to {end:g} s.')
    return Interval(start, end)


def _part(given: Mapping[str, Any], interval: Interval | None) -> Interval | None:
    part = part_of(given)
    if part is not None and interval is not None and part.shared(interval) != interval:
        raise ValueError(f"The interval {interval} must lie in the part {part} that the question is about.")
    return part


def _stsg(given: Mapping[str, Any]) -> STSG | None:
    if "stsg" not in given:
        return None
    form = given["stsg"]
    rate = _seconds(given.get("fps", 1.0), "fps")
    if rate == 0:
        raise ValueError('"fps" must be above 0, got 0.')
    if isinstance(form, str):
        graph, issues = STSG.from_text(form)
        if issues:
            raise ValueError(
                f'"stsg" does not parse: in its line {issues[0].line}, {issues[0].message.rstrip(".")}.'
            )
        graph = replace(graph, frame_times_s=tuple(time / rate for time in graph.frame_times_s))
    elif isinstance(form, dict):
        try:
            graph = STSG.from_dict(form)
        except STSGFormatError as error:
            raise ValueError(f'"stsg" does not parse: {error}') from None
    else:
        raise ValueError(f'"stsg" must be a scene graph as text or as an object, got {described(form)}.')
    if problems := graph.validate():
        raise ValueError(f'"stsg" is not a valid graph: {problems[0]}')
    try:
        graph.to_text()  # which models read
    except ValueError as error:
        raise ValueError(f'"stsg" is not a valid graph: {error}') from None
    return graph


def id_of(given: Mapping[str, Any], default: str) -> str:
    """Return the "id" in the plain form of a question, or `default` where it is missing or null.

    Raises:
        ValueError: it is neither a text nor a whole number.
    """
    id = default if given.get("id") is None else given["id"]
    return str(id) if isinstance(id, int) and not isinstance(id, bool) else _text({"id": id}, "id")


def _text(given: Mapping[str, Any], key: str) -> str:
    """Return a string without space around it."""
    value = given[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a string, got {described(value)}.')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" must be text that UTF-8 can write, got {value[:80]!a}.') from None
    if not value.strip():
        raise ValueError(f'"{key}" must say something, got an empty string.')
    return value.strip()


def _seconds(value: Any, key: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1e9:  # nor what is no number, NaN
        raise ValueError(f'"{key}" must be a number from 0 to 1e9, got {described(value)}.')
    return float(value)


def _shown(text: str) -> str:
    """Return a text in quotes, cut off where it is long."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
