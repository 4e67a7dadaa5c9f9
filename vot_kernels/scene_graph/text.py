"""The compact text form of a scene graph: what a language model reads, and what it writes back.

    <stsg>
    o1=red digit 3: 0:68,22,80,34 4:75,37,87,49      tracklet: id=name, then frame:x1,y1,x2,y2
    o2=blue digit 7: 0:10,22,22,34 4:15,22,27,34
    o1 right of o2 @0-7                              relation: frames, both inclusive
    o1 moves left @0-5                               unary relation
    o1 hits o2 @6                                    event: frame
    </stsg>

Coordinates are integers on a 0–99 grid: cell g is the fraction g/99, so a coordinate moves by at most 1/198.
Scores and frame times are not part of the text.

The parser never raises and takes time linear in the text: it cuts lines into tokens with regular expressions
that cannot backtrack over more than a few characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

GRID = 99
MAX_FRAMES = 100_000
"""Frames a text may speak of where the caller does not give the frame times."""

ISSUE_KINDS: Mapping[str, str] = {
    "no block": "there is no <stsg> block; the whole text was read",
    "several blocks": "there is more than one block; the last closed one was read",
    "unclosed": "the closing tag is missing",
    "markup": "a list mark or markdown decoration was taken off a line, or a code fence skipped",
    "unreadable": "a line that is no tracklet, relation or event; dropped",
    "stray text": "text among a tracklet's boxes; ignored",
    "malformed box": "not exactly four coordinates; the box is dropped",
    "truncated": "the last item of an unclosed block is incomplete; dropped",
    "swapped corners": "x1 > x2 or y1 > y2; put in order",
    "not an integer": "a fraction where a whole number belongs; rounded to the grid",
    "out of range": "a coordinate or interval beyond its range; clamped",
    "frame out of range": "a box or event in a frame the video does not have; dropped",
    "duplicate id": "a second tracklet of the same id; dropped",
    "duplicate frame": "a second box in the same frame; dropped",
    "no boxes": "a tracklet announces boxes, none of which could be read; kept without",
    "unknown label": "a label outside the vocabulary; kept",
    "unknown predicate": "a predicate or event outside the vocabulary; dropped",
    "unknown participant": "a relation or event about a track that does not exist; dropped",
    "malformed time": "no frame or interval after @; dropped",
    "time form": "an interval for an event, or one frame for a relation; its first frame is taken",
    "swapped interval": "t0 > t1; put in order",
}
"""Every kind of issue and what the parser did about it."""

_TAG = re.compile(r"<[ \t]{0,4}(/?)[ \t]{0,4}stsg[ \t]{0,4}>", re.IGNORECASE)
_ID = re.compile(r"[oO][0-9]{1,9}")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_TOKEN = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)|:|[^\W\d_]+")
_LEAD = re.compile(r"(?:\d{1,3}[.)](?=\s)|[-*•`>#+\s])*")  # list marks and quotes before a line
_TRAIL = "*` \t"
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
_FULL_WIDTH = str.maketrans("：，＝＠", ":,=@")
_STRUCTURE = frozenset("=:@<>：，＝＠")  # what a printed word may not hold
_HUGE = 10**9


class ParseIssue(NamedTuple):
    """One problem of a text: the line (from 1), a kind from `ISSUE_KINDS`, a sentence."""

    line: int
    kind: str
    message: str


def to_text(
    stsg: STSG, *, every: int = 4, boxes: bool = True, relations: bool = True, events: bool = True
) -> str:
    """Print the text form.

    Args:
        stsg: the graph. Its words must not contain any of ``=:@<>`` or line breaks, which could not be read back.
        every: print the boxes of the frames divisible by `every`, and each tracklet's first and last.
        boxes, relations, events: which parts to print; without boxes a tracklet is its id and name.

    Raises:
        ValueError: `every` < 1, or a word that cannot be printed.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 (print every frame), got {every}.")
    lines = [_tracklet_line(t, every, boxes) for t in stsg.tracklets]
    if relations:
        lines += [_relation_line(r) for r in stsg.relations]
    if events:
        lines += [_event_line(e) for e in stsg.events]
    return "\n".join(("<stsg>", *lines, "</stsg>"))


def _tracklet_line(tracklet: Tracklet, every: int, boxes: bool) -> str:
    head = f"{_word(tracklet.id)}={_word(tracklet.name)}"
    frames = tracklet.frames
    if not boxes or not frames:
        return head
    shown = [k for k in frames if k % every == 0 or k in (frames[0], frames[-1])]
    return f"{head}: " + " ".join(f"{k}:{','.join(map(grid_cell, tracklet.boxes[k][0]))}" for k in shown)


def _relation_line(relation: Relation) -> str:
    words = [relation.subject, relation.predicate]
    if relation.object != relation.subject:
        words.append(relation.object)
    return f"{' '.join(map(_word, words))} @{relation.t0}-{relation.t1}"


def _event_line(event: Event) -> str:
    words = (*event.participants[:1], event.kind, *event.participants[1:])
    return f"{' '.join(map(_word, words))} @{event.t}"


def grid_cell(coordinate: float) -> str:
    """Return a fraction as its grid cell; a coordinate outside the frame is clamped to its edge."""
    if math.isnan(coordinate):
        raise ValueError("A box coordinate is NaN, which the text form cannot print.")
    return str(math.floor(min(max(coordinate, 0.0), 1.0) * GRID + 0.5))


def _word(word: str) -> str:
    if not _is_printable(word):
        raise ValueError(
            f"A word of the text form must be single-spaced and contain none of = : @ < >, got {word!r}."
        )
    return word


def printable(words: str) -> str:
    """Return `words` as the text form can hold them: without its marks, single-spaced; "object" if nothing is left."""
    return " ".join("".join(" " if c in _STRUCTURE else c for c in words).split()) or "object"


def _is_printable(word: str) -> bool:
    return bool(word) and word == " ".join(word.split()) and _STRUCTURE.isdisjoint(word)


def from_text(
    text: str | bytes, vocabulary: Vocabulary | None = None, frame_times_s: Sequence[float] | None = None
) -> tuple[STSG, list[ParseIssue]]:
    """Read the text form, however a language model wrote it. Never raises on any text.

    Args:
        text: the text; bytes are decoded as UTF-8 with replacement.
        vocabulary: the closed words. None accepts every word: a name becomes the label, `@7` marks an event,
            `@0-7` a relation, and the graph's vocabulary is what occurred.
        frame_times_s: the video's frame times. None makes the frame numbers themselves the times.

    Returns:
        The graph (source "text", all scores 1) and the issues by line; no issues means a clean text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise TypeError(f"text must be str or bytes, got {type(text).__name__}.")
    text = text.translate(_FULL_WIDTH).replace("\r\n", "\n").replace("\r", "\n")
    parser = _Parser(vocabulary, None if frame_times_s is None else len(frame_times_s))
    parser.read(text)
    return parser.graph(frame_times_s), sorted(parser.issues, key=lambda issue: issue.line)


class _Block(NamedTuple):
    start: int
    end: int
    closed: bool


def _blocks(text: str) -> list[_Block]:
    """Return the spans between tags. An opening tag inside an open block starts a new one."""
    blocks: list[_Block] = []
    start = None
    for tag in _TAG.finditer(text):
        if start is not None:
            blocks.append(_Block(start, tag.start(), bool(tag[1])))
        start = None if tag[1] else tag.end()
    if start is not None:
        blocks.append(_Block(start, len(text), False))
    return blocks


def outside_blocks(text: str) -> str:
    """Return what a text says besides its blocks; nothing follows a block without a closing tag."""
    kept, start, inside = [], 0, False
    for tag in _TAG.finditer(text):
        if not inside:
            kept.append(text[start : tag.start()])
        start, inside = tag.end(), not tag[1]
    return "".join(kept if inside else [*kept, text[start:]]).strip()


@dataclass
class _Parser:
    vocabulary: Vocabulary | None
    num_frames: int | None
    issues: list[ParseIssue] = field(default_factory=list)
    tracklets: dict[str, Tracklet] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frame_limit = MAX_FRAMES if self.num_frames is None else self.num_frames
        words = self.vocabulary or Vocabulary()
        self.labels, self.attributes = _canonical(words.labels), _canonical(words.attributes)
        self.predicates, self.kinds = _canonical(words.predicates), _canonical(words.events)
        self.longest_label = max((len(a.split()) for a in self.labels), default=0)
        self.longest_attribute = max((len(a.split()) for a in self.attributes), default=0)

    def flag(self, line: int, kind: str, message: str) -> None:
        self.issues.append(ParseIssue(line, kind, message))

    # --- text → lines ---------------------------------------------------------------------------------------

    def read(self, text: str) -> None:
        blocks = _blocks(text)
        if not blocks:
            self.flag(1, "no block", "There is no <stsg> block.")
            self.read_lines(text.split("\n"), first=1, tagged=False, closed=False)
            return
        block = next((b for b in reversed(blocks) if b.closed and _says_something(text, b)), blocks[-1])
        first = text.count("\n", 0, block.start) + 1
        if len(blocks) > 1:
            self.flag(
                first, "several blocks", f"There are {len(blocks)} blocks; the one in line {first} was read."
            )
        lines = text[block.start : block.end].split("\n")
        if not block.closed:
            self.flag(first + len(lines) - 1, "unclosed", "The closing </stsg> is missing.")
        self.read_lines(lines, first, tagged=True, closed=block.closed)

    def read_lines(self, lines: list[str], first: int, tagged: bool, closed: bool) -> None:
        """Read tracklets before relations and events, which may name a track that comes later."""
        facts: list[tuple[int, str, bool]] = []
        for number, raw in enumerate(lines, first):
            line = raw.strip()
            if not line:
                continue
            if line.startswith("```"):
                if tagged:
                    self.flag(number, "markup", "A code fence stands inside the block.")
                continue
            last = not closed and number == first + len(lines) - 1
            bare = _LEAD.sub("", line, count=1).rstrip(_TRAIL)
            is_tracklet = "=" in re.split("[:@]", bare, maxsplit=1)[0]
            if not is_tracklet and "@" not in bare:
                if tagged:
                    self.flag(number, *_leftover(line, last))
                continue
            if bare != line:
                self.flag(number, "markup", f"The line is decorated: {_clip(line)}")
            if is_tracklet:
                self.read_tracklet(number, bare, last)
            else:
                facts.append((number, bare, last))
        for number, bare, last in facts:
            self.read_fact(number, bare, last)

    # --- tracklets ------------------------------------------------------------------------------------------

    def read_tracklet(self, line: int, text: str, last: bool) -> None:
        head, colon, tail = text.partition(":")
        id, _, name = head.partition("=")
        id, words = id.strip(_TRAIL), name.strip(_TRAIL).split()
        if len(id.split()) != 1 or not (_is_printable(id) and _is_printable(" ".join(words))):
            self.flag(line, "unreadable", f"A tracklet reads id=name: boxes, not {_clip(text)}")
            return
        id = id.lower() if _ID.fullmatch(id) else id
        if id in self.tracklets:
            self.flag(line, "duplicate id", f"The track {_clip(id)} is defined twice; the first one is kept.")
            return
        attributes, label = self.split_name(words)
        if self.vocabulary is not None and label not in self.vocabulary.labels:
            self.flag(line, "unknown label", f"The label {_clip(label)} is not in the vocabulary.")
        boxes = self.read_boxes(line, tail, last)
        if colon and not boxes:
            self.flag(line, "no boxes", f"The track {_clip(id)} has no readable box.")
        self.tracklets[id] = Tracklet(id, label, attributes, boxes)

    def split_name(self, words: list[str]) -> tuple[tuple[str, ...], str]:
        """Split off leading known attributes; the rest is the label. A whole name that is a label is the label."""
        attributes: list[str] = []
        start = 0
        while start < len(words) - 1 and not self.is_label(words, start):
            for size in range(min(self.longest_attribute, len(words) - 1 - start), 0, -1):
                attribute = self.attributes.get(_key(words[start : start + size]))
                if attribute is not None:
                    attributes.append(attribute)
                    start += size
                    break
            else:
                break
        label = " ".join(words[start:])
        return tuple(attributes), self.labels.get(_key(words[start:]), label)

    def is_label(self, words: list[str], start: int) -> bool:
        return len(words) - start <= self.longest_label and _key(words[start:]) in self.labels

    def read_boxes(self, line: int, text: str, last: bool) -> dict[int, tuple[Box, float]]:
        boxes: dict[int, tuple[Box, float]] = {}
        stray, items = _box_items(text)
        if stray:
            self.flag(line, "stray text", f"{_clip(stray)} stands among the boxes.")
        for n, (frame_text, values) in enumerate(items):
            final = last and n == len(items) - 1
            box = self.read_box(line, values, final)
            if box is None:
                continue
            frame = self.whole(line, frame_text)
            if not 0 <= frame < self.frame_limit:
                self.flag(
                    line,
                    "frame out of range",
                    f"There is no frame {frame}; frames are 0 to {self.frame_limit - 1}.",
                )
            elif frame in boxes:
                self.flag(line, "duplicate frame", f"Frame {frame} has two boxes; the first one is kept.")
            else:
                boxes[frame] = (box, 1.0)
        return boxes

    def read_box(self, line: int, values: list[str], final: bool) -> Box | None:
        if len(values) != 4:
            kind = "truncated" if final and len(values) < 4 else "malformed box"
            self.flag(line, kind, f"A box has 4 coordinates, not {len(values)}.")
            return None
        if any("." in v for v in values) and all(0 <= float(v[:20]) <= 1 for v in values):
            # These are fractions of the frame: as grid cells, all within 0 and 1, they would make an empty box.
            self.flag(line, "not an integer", f"The box {_clip(','.join(values))} is in fractions.")
            cells = [math.floor(float(v[:20]) * GRID + 0.5) for v in values]
        else:
            cells = [self.whole(line, v) for v in values]
        if any(not 0 <= c <= GRID for c in cells):
            self.flag(line, "out of range", f"The box {_clip(','.join(values))} leaves the grid 0 to {GRID}.")
            cells = [min(max(c, 0), GRID) for c in cells]
        x1, y1, x2, y2 = cells
        if x1 > x2 or y1 > y2:
            if final:  # more likely the last number was cut short: 87,4 of 87,49
                self.flag(line, "truncated", "The last box of the unclosed block ends early.")
                return None
            self.flag(line, "swapped corners", f"The box {_clip(','.join(values))} has its corners swapped.")
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        return Box(x1 / GRID, y1 / GRID, x2 / GRID, y2 / GRID)

    def whole(self, line: int, number: str) -> int:
        """Return a number's text as an int, rounded if it has a fraction, clamped to ±10⁹ if it is huge."""
        digits, point, fraction = number.partition(".")
        if len(digits) > 10:
            value = -_HUGE if digits.startswith("-") else _HUGE
        else:
            value = 0 if digits in ("", "-") else int(digits)
        if point:
            self.flag(line, "not an integer", f"{_clip(number)} was rounded to a whole number.")
            if fraction and int(fraction[0]) >= 5:
                value += -1 if digits.startswith("-") else 1
        return max(-_HUGE, min(value, _HUGE))

    # --- relations and events -------------------------------------------------------------------------------

    def read_fact(self, line: int, text: str, last: bool) -> None:
        left, _, right = text.rpartition("@")
        right = right.strip()
        times = [self.whole(line, t) for t in _NUMBER.findall(right)]
        if len(times) not in (1, 2) or right[-1] in _DASHES:
            self.flag(line, "truncated" if last else "malformed time", f"No frame is given in {_clip(text)}")
            return
        subject, words, others = self.split_fact(left.split())
        phrase = " ".join(words)
        if not _is_printable(phrase):
            self.flag(line, "unreadable", f"Neither a relation nor an event: {_clip(text)}")
            return
        named = [i for i in (subject, *others) if i is not None]
        missing = [i for i in named if i not in self.tracklets]
        if missing:
            self.flag(line, "unknown participant", f"There is no track {_clip(missing[0])}.")
            return
        predicate, kind = self.meaning(phrase, len(times))
        if kind is not None and not (predicate is not None and len(times) == 2):
            self.add_event(line, kind, times, tuple(named))
        elif predicate is None:
            self.flag(line, "unknown predicate", f"{_clip(phrase)} is not in the vocabulary.")
        elif subject is None or len(others) > 1:
            self.flag(line, "unreadable", f"A relation has a subject and at most one object: {_clip(text)}")
        elif last and len(times) == 1:
            self.flag(line, "truncated", f"The interval is incomplete: {_clip(text)}")
        else:
            self.add_relation(line, subject, predicate, others[0] if others else subject, times)

    def split_fact(self, words: list[str]) -> tuple[str | None, list[str], list[str]]:
        """Split words into (first track id, phrase, last track ids); an id is a known one or has the form of one."""
        ids = [self.as_id(word) for word in words]
        end = len(words)
        while end > 1 and ids[end - 1] is not None:
            end -= 1
        start = 0 if not words or ids[0] is None else 1
        return (ids[0] if start else None), words[start:end], [i for i in ids[end:] if i is not None]

    def as_id(self, word: str) -> str | None:
        word = word.strip(_TRAIL + ",;.")
        if word in self.tracklets:
            return word
        return word.lower() if _ID.fullmatch(word) else None

    def meaning(self, phrase: str, num_times: int) -> tuple[str | None, str | None]:
        """Return the phrase as (predicate, event kind), each None if it is not one."""
        if self.vocabulary is None:
            return (phrase, None) if num_times == 2 else (None, phrase)
        key = _key(phrase.split())
        return self.predicates.get(key), self.kinds.get(key)

    def add_relation(self, line: int, subject: str, predicate: str, object: str, times: list[int]) -> None:
        t0, t1 = times[0], times[-1]
        if len(times) == 1:
            self.flag(line, "time form", f"A relation has an interval; frame {t0} alone is taken.")
        if t0 > t1:
            self.flag(line, "swapped interval", f"The interval {t0}-{t1} is backwards.")
            t0, t1 = t1, t0
        if t0 >= self.frame_limit:
            self.flag(
                line,
                "frame out of range",
                f"The interval {t0}-{t1} lies beyond frame {self.frame_limit - 1}.",
            )
            return
        if t1 >= self.frame_limit:
            self.flag(
                line, "out of range", f"The interval {t0}-{t1} ends beyond frame {self.frame_limit - 1}."
            )
            t1 = self.frame_limit - 1
        self.relations.append(Relation(subject, predicate, object, t0, t1))

    def add_event(self, line: int, kind: str, times: list[int], participants: tuple[str, ...]) -> None:
        t = times[0]
        if len(times) > 1:
            self.flag(
                line,
                "time form",
                f"An event has one frame, not {times[0]}-{times[1]}; the first is kept.",
            )
        if t >= self.frame_limit:
            self.flag(
                line, "frame out of range", f"There is no frame {t}; frames are 0 to {self.frame_limit - 1}."
            )
            return
        self.events.append(Event(kind, t, participants))

    # --- result ---------------------------------------------------------------------------------------------

    def graph(self, frame_times_s: Sequence[float] | None) -> STSG:
        tracklets = tuple(self.tracklets.values())
        if frame_times_s is None:
            ends = [t.frames[-1] for t in tracklets if t.boxes]
            ends += [r.t1 for r in self.relations] + [e.t for e in self.events]
            frame_times_s = range(max(ends, default=-1) + 1)
        vocabulary = self.vocabulary or Vocabulary(
            labels=tuple(dict.fromkeys(t.label for t in tracklets)),
            predicates=tuple(dict.fromkeys(r.predicate for r in self.relations)),
            events=tuple(dict.fromkeys(e.kind for e in self.events)),
        )
        return STSG(
            tuple(frame_times_s), tracklets, tuple(self.relations), tuple(self.events), vocabulary, "text"
        )


def _box_items(text: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return the boxes' text as (first stray word or number, [(frame, coordinates)])."""
    tokens = _TOKEN.findall(text)
    items: list[tuple[str, list[str]]] = []
    stray = ""
    for token, following in zip_longest(tokens, tokens[1:], fillvalue=""):
        if token == ":":
            continue
        if not token[-1].isdecimal():
            stray = stray or token
        elif following == ":":
            items.append((token, []))
        elif items:
            items[-1][1].append(token)
        else:
            stray = stray or token
    return stray, items


def _says_something(text: str, block: _Block) -> bool:
    return any(text.find(mark, block.start, block.end) >= 0 for mark in "=@")


def _leftover(line: str, last: bool) -> tuple[str, str]:
    if last:
        return "truncated", f"The last line of the unclosed block is incomplete: {_clip(line)}"
    return "unreadable", f"Not a tracklet, relation or event: {_clip(line)}"


def _canonical(words: Sequence[str]) -> dict[str, str]:
    return {_key(word.split()): word for word in words}


def _key(words: Sequence[str]) -> str:
    """Normalise a phrase for lookup: case and underscores do not matter."""
    return " ".join(words).replace("_", " ").casefold()


def _clip(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
