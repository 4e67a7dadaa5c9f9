"""Finding words in free text: tracklets, events, numbers, directions, yes and no."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.words import fold

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: n for n, word in enumerate(_NUMBERS)} | {"none": 0, "never": 0, "once": 1, "twice": 2}
_DIRECTIONS = {
    "left": r"left(?:wards?)?",
    "right": r"right(?:wards?)?",
    "up": r"up(?:wards?)?|top|rises?|rising",
    "down": r"down(?:wards?)?|bottom|falls?|falling",
}
_FUNCTION_WORDS = """
a an the it its this that these those there he she they them which who is are was were be been being has have had can
does do did doing of in on at by off to from with into against and then also both each other another one ones thing
object yes no not true false during over while clip video frame scene time times s wall walls edge side colour color
just exactly only about around as we see here first last up down
"""
_MOTION = re.compile(r"(?:mov|go|head|travel|drift|stay|stand|still|station|ris|fall)\w*")
_SYNONYMS = {"hit": ("collid", "collision", "bump", "strik", "struck")}


def find_tracklets(text: str, graph: STSG) -> tuple[str, ...]:
    """Normalise `text` for comparison: NFKC, case folded, runs of whitespace as one space.

    The longest names are matched first: "red digit 3", then the id, then an attribute together with a wrong or missing
    label ("red digit 5", when perception may have misread the digit), then a bare label or attribute. A word
    shared by several tracklets names them all.
    """
    finder = _Finder(fold(text))
    tracklets = graph.tracklets
    for t in sorted(tracklets, key=lambda t: -len(t.name)):
        finder.take(t.name, [t.id])
    for t in tracklets:
        finder.take(t.id, [t.id], plural=False)
    held = dict.fromkeys(word for t in tracklets for word in t.attributes)
    labels = dict.fromkeys([*(t.label for t in tracklets), *graph.vocabulary.labels])
    for attribute in held:
        ids = [t.id for t in tracklets if attribute in t.attributes]
        for label in labels:
            finder.take(f"{attribute} {label}", ids)
        finder.take(attribute, ids, plural=False)
    for label in dict.fromkeys(t.label for t in tracklets):
        finder.take(label, [t.id for t in tracklets if t.label == label])
    return finder.ids()


def absent_words(text: str, graph: STSG) -> tuple[str, ...]:
    """Return the labels and attributes of the vocabulary that `text` names and no tracklet has."""
    finder = _Finder(fold(text))
    for t in graph.tracklets:
        finder.take(t.name, [t.id])
        for attribute in t.attributes:
            for label in graph.vocabulary.labels:
                finder.take(f"{attribute} {label}", [t.id])
    has = {word for t in graph.tracklets for word in (t.label, *t.attributes)}
    known = dict.fromkeys((*graph.vocabulary.labels, *graph.vocabulary.attributes))
    return tuple(word for word in known if word not in has and finder.take(word, []))


def unknown_words(text: str, graph: STSG) -> tuple[str, ...]:
    """Return the words of `text` that are not in the graph's vocabulary, not verbs of its events and not grammar.

    An answer with such a word says something that the graph can neither confirm nor refute.
    """
    vocabulary = graph.vocabulary
    known = {*_FUNCTION_WORDS.split(), *_NUMBER_WORDS}
    phrases = [t.name for t in graph.tracklets]
    phrases += [*vocabulary.labels, *vocabulary.attributes, *vocabulary.predicates]
    known |= {word for phrase in phrases for word in fold(phrase).split()} | {t.id for t in graph.tracklets}
    left = (
        word for word in re.findall(r"[^\W_]+(?:['’]\w+)?", fold(text)) if word.removesuffix("s") not in known
    )
    return tuple(
        word
        for word in left
        if word not in known
        and not (word.isdecimal() and word.isascii())
        and not find_events(word, vocabulary.events)
        and not find_directions(word)
        and not _MOTION.fullmatch(word)
    )


def find_events(text: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the event kinds whose verb `text` uses in any form: "hit", "hitting", "collision" for "hits"."""
    folded = fold(text)
    found = []
    for kind in dict.fromkeys(kinds):
        stem = fold(kind).removesuffix("s")
        stems = (stem.removesuffix("e"), *_SYNONYMS.get(stem, ()))
        if any(re.search(rf"(?<!\w){re.escape(s)}\w*", folded) for s in stems):
            found.append(kind)
    return tuple(found)


def find_directions(text: str) -> frozenset[str]:
    """Return which of left, right, up, down `text` names; "left of" is a place, not a direction."""
    folded = re.sub(r"\b(left|right|top|bottom) of\b", " ", fold(text))
    return frozenset(
        d for d, pattern in _DIRECTIONS.items() if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", folded)
    )


def find_number(text: str) -> int | None:
    """Return the first whole number in `text`, as digits or as a word up to ten, or None."""
    return next(iter(find_numbers(text)), None)


def find_numbers(text: str) -> tuple[int, ...]:
    """Return all whole numbers in `text`, as digits or as words up to ten."""
    words = re.findall(r"\d+|[a-z]+", fold(text))
    digits = {word: int(word[:9]) for word in words if word.isdecimal() and word.isascii()}
    numbers = digits | _NUMBER_WORDS
    return tuple(numbers[word] for word in words if word in numbers)


def find_yes_no(text: str) -> bool | None:
    """Return True for a text that begins with yes or true, False for no or false, else None."""
    match = re.match(r"\W*(yes|true|no|not|false)\b", fold(text))
    return None if match is None else match[1] in ("yes", "true")


def match_candidate(text: str, candidates: Sequence[str]) -> int | None:
    """Return the index of the candidate that `text` begins with, else of the only one in it; None if unclear."""
    folded = fold(text).strip(" .,:;!?\"'`*")
    names = [fold(candidate).strip(" .,:;!?\"'`*") for candidate in candidates]
    begins = [i for i, name in enumerate(names) if name and re.match(rf"{re.escape(name)}(?!\w)", folded)]
    if begins:
        return max(begins, key=lambda i: len(names[i]))
    within = [i for i, n in enumerate(names) if n and re.search(rf"(?<!\w){re.escape(n)}(?!\w)", folded)]
    return within[0] if len(within) == 1 else None


class _Finder:
    """A search for phrases in a text; what was found is blanked, so that shorter phrases do not match it again."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found: dict[str, int] = {}

    def take(self, phrase: str, ids: Sequence[str], *, plural: bool = True) -> bool:
        end = "(?:s|es)?" if plural else ""
        pattern = re.compile(rf"(?<!\w){re.escape(fold(phrase))}{end}(?!\w)")
        matches = list(pattern.finditer(self.text)) if phrase.strip() else []
        for match in matches:
            for id in ids:
                self.found[id] = min(match.start(), self.found.get(id, match.start()))
        self.text = pattern.sub(lambda match: "\0" * len(match[0]), self.text) if matches else self.text
        return bool(matches)

    def ids(self) -> tuple[str, ...]:
        return tuple(sorted(self.found, key=lambda id: self.found[id]))
