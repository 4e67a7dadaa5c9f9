"""When something happens: the moments of a graph, those that a question asks for, and how an answer fits them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vot_kernels.reasoning.claims import (
    MOVES,
    Fact,
    events_of,
    find_windows,
    part_in_question,
    says_details,
    stated_interval,
    without_times,
    words_left,
)
from vot_kernels.reasoning.names import (
    absent_words,
    find_directions,
    find_events,
    find_tracklets,
    fold,
    unknown_words,
)
from vot_kernels.scene_graph.graph import STSG, Event, Relation
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.relations import INVERSES
from vot_kernels.scene_graph.summary import evenly

FITS = 0.5  # temporal IoU from which an answer is right without a comparison, as in R@0.5
_VERB = r"(?:do|does|did|is|are|was|were|will|has|have|had|can|could)\b"
WHEN = (
    rf"\bwhen (?:exactly )?{_VERB}"
    r"|\b(?:at|in|during|around|from|until) (?:what|which) (?:time|moment|second|seconds|interval)\b"
    # Points and parts may also be of a wall or of a room.
    rf"|\b(?:at|in|during|from|until) (?:what|which) (?:point|part)(?: in time| of the (?:clip|video|film))? {_VERB}"
    r"|^what time\b|\bhow (?:long|many seconds) into\b"
)
_TIME_WORDS = re.compile(
    r"\b(?:when|what|which|how|long|many|into|times?|moments?|seconds?|points?|parts?)\b"
)
_WALL = re.compile(r"\b(?:walls?|edges?|borders?)\b")


def asks_when(question: str) -> bool:
    """Whether the answer to `question` is an interval of time."""
    return re.search(WHEN, fold(question)) is not None


def moments_of(graph: STSG) -> list[Interval]:
    """Return when each event happens and each relation holds, by time, without repetition."""
    found = {*map(graph.interval, graph.events), *map(graph.interval, graph.relations)}
    return sorted(found, key=lambda i: (i.start_s, i.end_s))


def asked_moments(question: str, named: Sequence[str], graph: STSG) -> list[Interval] | None:
    """Return the moments of what `question` asks for, by time; None if it is not one event or relation of the graph.

    named: ids of the tracklets that it names, in its order. "first" and "last" choose among several moments.
    """
    words = without_times(question)
    if len(named) > 2 or unknown_words(_TIME_WORDS.sub(" ", words), graph):
        return None
    kinds, predicates = _events_asked(words, graph), _predicates_asked(words, graph)
    if len(kinds) + len(predicates) != 1 or says_details(words):
        return None
    if absent_words(words, graph):
        return []  # nobody of that name ever does it
    part = part_in_question(question, graph)
    if kinds:
        found = [part.interval(event) for event in events_of(part, kinds[0], named)]
    else:
        found = [part.interval(relation) for relation in _relations_of(part, predicates[0], named)]
    turn = re.search(r"\b(first|last)\b", words)
    if turn is None:
        return found
    return found[:1] if turn[1] == "first" else found[-1:]


def importance_of(
    question: str, named: Sequence[str], graph: STSG
) -> Callable[[Event | Relation], tuple[float, int]]:
    """Return how much an event or relation matters to `question`, greater for what matters more.

    That is first how near it lies to the times that the question names; then come events of the kind that it asks for
    with all that it names, other events, the relations that it names, and all others.
    """
    windows = find_windows(question, graph)
    kinds, asked = find_events(question, graph.vocabulary.events), fold(question)

    def importance(item: Event | Relation) -> tuple[float, int]:
        when = graph.interval(item)
        apart = max((max(w.start_s - when.end_s, when.start_s - w.end_s, 0.0) for w in windows), default=0.0)
        if isinstance(item, Event):
            return -apart, 3 if item.kind in kinds and set(named) <= set(item.participants) else 2
        return -apart, int(re.search(rf"\b{re.escape(fold(item.predicate))}\b", asked) is not None)

    return importance


def moments_to_look_at(question: str, graph: STSG, most: int) -> list[Interval]:
    """Return when to look for the answer to `question`: at least one and at most `most` moments, by time.

    Those that it asks for, if it is a question of when; else those of the most important events and relations of what
    it names, in the times that it names; else how long that is seen, or all of these times.
    """
    named = find_tracklets(question, graph)
    if moments := asked_moments(question, named, graph):
        return list(evenly(moments, most))
    part = part_in_question(question, graph)
    things: tuple[Event | Relation, ...] = (*part.events, *part.relations)
    items = [item for item in things if not named or set(named) & _who(item)]
    if not items:
        whole = Interval(graph.frame_times_s[0], graph.frame_times_s[-1])
        seen = [part.tracklet(id).frames for id in named]
        times = graph.frame_times_s
        spans = [Interval(times[frames[0]], times[frames[-1]]) for frames in seen if frames]
        return spans[:most] or [stated_interval(question, graph) or whole]
    importance = importance_of(question, named, graph)
    best = max(map(importance, items))
    found = {graph.interval(item) for item in items if importance(item) == best}
    return list(evenly(sorted(found, key=lambda i: (i.start_s, i.end_s)), most))


def _who(item: Event | Relation) -> set[str]:
    return set(item.participants) if isinstance(item, Event) else {item.subject, item.object}


def proposed_moments(question: str, named: Sequence[str], graph: STSG) -> tuple[str, ...]:
    """Return every moment of `graph` in words as candidates, those that `question` asks for first."""
    asked = asked_moments(question, named, graph) or []
    return tuple(map(str, dict.fromkeys((*asked, *moments_of(part_in_question(question, graph))))))


def answer_interval(question: str, choice: str, named: Sequence[str], graph: STSG) -> Interval | None:
    """Return the interval that an answer stands for: its own words, else the first moment that the graph shows."""
    exact = next((moment for moment in moments_of(graph) if str(moment) == choice), None)
    stated = exact or stated_interval(choice, graph)
    asked = asked_moments(question, named, graph) if stated is None else None
    return asked[0] if asked else stated


def judge_moment(
    question: str, answer: str, candidates: Sequence[str], named: Sequence[str], graph: STSG
) -> Fact:
    """Judge an answer to a question of when by its temporal IoU with the moments that the graph shows.

    It is wrong without time in common, and if another candidate fits better; it is right if it fits best, or by half.
    """
    asked = asked_moments(question, named, graph)
    if asked is None:
        return None, "the question is not about one event or relation of the graph"
    stated = stated_interval(answer, graph)
    if stated is None:
        return None, "the answer names no time"
    if unknown := words_left(answer, graph):
        return None, f"the graph says nothing about '{unknown[0]}'"
    if not asked:
        return False, "the graph never shows it"
    fits = [_fit(candidate, asked, graph) for candidate in candidates]
    mine, best = _fit(answer, asked, graph), max(fits)
    reason = f"the graph shows it at {' and '.join(map(str, asked[:3]))}"
    if mine == 0 or mine < best:
        return False, reason
    return (True if mine >= FITS or fits.count(best) < len(fits) else None), reason


def _fit(answer: str, asked: Sequence[Interval], graph: STSG) -> float:
    stated = stated_interval(answer, graph)
    return 0.0 if stated is None else max(stated.iou(moment) for moment in asked)


def _events_asked(words: str, graph: STSG) -> tuple[str, ...]:
    kinds = find_events(words, graph.vocabulary.events)
    # What hits a wall bounces off it: an event of one participant, where the graph has both kinds.
    if kinds == ("hits",) and _WALL.search(words) and "bounces" in graph.vocabulary.events:
        return ("bounces",)
    return kinds


def _predicates_asked(words: str, graph: STSG) -> tuple[str, ...]:
    """Return the predicates that `words` use in any form: "moving to the left" for "moves left"."""
    own = graph.vocabulary.predicates
    inverse = (INVERSES[predicate] for predicate in own if predicate in INVERSES)
    directions = find_directions(words) if re.search(MOVES, words) else frozenset()
    motions = {f"moves {direction}" for direction in directions}
    return tuple(p for p in dict.fromkeys((*own, *inverse)) if p in motions or re.search(_pattern(p), words))


def _pattern(predicate: str) -> str:
    stems = [re.escape(word.removesuffix("s").removesuffix("e")) for word in fold(predicate).split()]
    return r"(?<!\w)" + r"\w*\W+(?:(?:to|the|towards?)\W+){0,2}".join(stems) + r"\w*"


def _relations_of(graph: STSG, predicate: str, named: Sequence[str]) -> list[Relation]:
    """Return the relations `predicate` in which `named` are subject and object in this order, by time.

    Where the graph has none, those that say the same the other way round.
    """
    found = [r for r in graph.relations if r.predicate == predicate and _between(r, named)]
    if not found and predicate in INVERSES:
        back = named[::-1]
        found = [r for r in graph.relations if r.predicate == INVERSES[predicate] and _between(r, back)]
    return sorted(found, key=lambda relation: (relation.t0, relation.t1))


def _between(relation: Relation, named: Sequence[str]) -> bool:
    ends = (relation.subject, relation.object)
    return ends == tuple(named) if len(named) == 2 else set(named) <= {relation.subject}
