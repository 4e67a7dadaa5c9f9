"""The grounding of answers about what the clip does not show: without something, afterwards, and why.

A `World` continues the motion that was seen. This module finds what a question asks it to continue, and compares the
outcome with an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from vot_kernels.reasoning.claims import NEGATED, events_of, find_windows, seconds, words_left
from vot_kernels.reasoning.names import find_events, find_tracklets, find_yes_no
from vot_kernels.reasoning.types import Task
from vot_kernels.scene_graph.graph import STSG, Event
from vot_kernels.scene_graph.words import fold

Outcome = tuple[bool | None, str]
"""Whether an answer is true, None if that cannot be told, and why."""

KINDS = ("cause", "counterfactual", "prediction")
"""The kinds of questions that need a world."""

_CLAUSE = re.compile(r"\b(?:if|without|had)\b(?:.*?,|.*?(?=\bwould\b)|.*$)")
_GONE = re.compile(r"\bwithout\b|n't\b|\bnot\b|\bgone\b|\babsent\b|\bmissing\b|\bremov\w+|\btaken away\b")
_NEXT = re.compile(r"\bnext\b|\bafter (?:the|this) (?:clip|video) (?:ends|is over)\b")
_TURN = re.compile(r"\bchanges? (?:its |of )?direction\b|\bturns?\b|\bdeflect\w*")


class World(Protocol):
    """Knows how things move, and so what would have happened and what will.

    Attributes:
        event: the kind of event that it predicts, such as "hits".
    """

    event: str

    def meets_without(self, one: str, other: str, removed: str, graph: STSG) -> bool | None:
        """Return whether two tracklets would meet in the clip without a third one; None if that cannot be told."""
        ...

    def next_met(self, id: str, graph: STSG) -> str | None:
        """Return the tracklet that `id` meets first after the clip; None if that cannot be told."""
        ...


def judge_what_if(task: Task, answer: str, candidates: Sequence[str], graph: STSG, world: World) -> Outcome:
    """Judge an answer to a question of one of `KINDS` by what `world` makes of the clip."""
    if find_events(task.question, graph.vocabulary.events) not in ((), (world.event,)):
        return None, f"the question is not about '{world.event}' alone"
    if find_windows(answer, graph) or words_left(answer, graph):
        return None, "the answer says more than a simulation tells"
    match task.kind:
        case "counterfactual":
            return _without(task.question, answer, graph, world)
        case "prediction":
            return _afterwards(task.question, answer, graph, world)
    return _cause(task.question, answer, candidates, graph, world)


def _without(question: str, answer: str, graph: STSG, world: World) -> Outcome:
    """Judge "yes" or "no" to whether two would meet without a third."""
    asked = fold(question)
    clause = _CLAUSE.search(asked)
    if clause is None or not _GONE.search(clause[0]):
        return None, "the question does not take something away"
    rest = f"{asked[: clause.start()]} {asked[clause.end() :]}"
    removed, pair, said = find_tracklets(clause[0], graph), find_tracklets(rest, graph), find_yes_no(answer)
    if len(removed) != 1 or len(pair) != 2 or removed[0] in pair or said is None or NEGATED.search(rest):
        return None, "the question is not whether two would meet without a third"
    true = world.meets_without(pair[0], pair[1], removed[0], graph)
    if true is None:
        return None, f"what happens without {_name(removed[0], graph)} cannot be told"
    who = f"{_name(pair[0], graph)} {'meets' if true else 'misses'} {_name(pair[1], graph)}"
    return said == true, f"simulated without {_name(removed[0], graph)}, {who}"


def _afterwards(question: str, answer: str, graph: STSG, world: World) -> Outcome:
    """Judge whom one meets next, or whether two meet each other next."""
    named, said, met = find_tracklets(question, graph), find_yes_no(answer), find_tracklets(answer, graph)
    if not _NEXT.search(fold(question)) or not named or NEGATED.search(fold(question)):
        return None, "the question is not about what happens next"
    if len(named) == 2 and said is not None and not met:
        met, expected = named[1:], said
    elif len(named) == 1 and len(met) == 1:
        expected = True
    else:
        return None, "the question is not about whom one meets next"
    true = world.next_met(named[0], graph)
    if true is None:
        return None, f"whom {_name(named[0], graph)} meets next cannot be told"
    return (true == met[0]) == expected, f"continued, {_name(named[0], graph)} meets {_name(true, graph)}"


def _cause(question: str, answer: str, candidates: Sequence[str], graph: STSG, world: World) -> Outcome:
    """Judge who caused a turn or a meeting."""
    named, said = find_tracklets(question, graph), find_tracklets(answer, graph)
    if len(said) != 1 or said[0] in named:
        return None, "the answer does not name one cause"
    if len(named) == 1 and _TURN.search(fold(question)):
        return _cause_of_turn(question, named[0], said[0], graph, world)
    if len(named) == 2 and find_events(question, graph.vocabulary.events):
        offered = [find_tracklets(candidate, graph) for candidate in candidates]
        return _cause_of_meeting(named, said[0], [ids[0] for ids in offered if len(ids) == 1], graph, world)
    return None, "the question is not about the cause of a turn or a meeting"


def _cause_of_turn(question: str, turned: str, said: str, graph: STSG, world: World) -> Outcome:
    """Judge who met `turned` at the time that the question names, or at its only meeting."""
    times, meetings = find_windows(question, graph), events_of(graph, world.event, [turned])
    if times:
        middle = (times[0].start_s + times[0].end_s) / 2
        meetings = sorted(meetings, key=lambda e: abs(graph.frame_times_s[e.t] - middle))[:1]
    if len(meetings) != 1:
        return (
            None,
            f"{_name(turned, graph)} is met {len(meetings)} times, and the question does not say when",
        )
    return said in meetings[0].participants, _told(meetings[0], graph)


def _cause_of_meeting(
    pair: Sequence[str], said: str, offered: Sequence[str], graph: STSG, world: World
) -> Outcome:
    """Judge without whom two would not have met; of several, the one that acted on them last before."""
    meetings = events_of(graph, world.event, pair)
    if not meetings:
        return None, "the two do not meet"
    outcomes = {id: world.meets_without(pair[0], pair[1], id, graph) for id in {*offered, said} - {*pair}}
    if None in outcomes.values():
        return None, "what happens without one of the candidates cannot be told"
    needed = [id for id, meets in outcomes.items() if not meets]
    reason = ", ".join(sorted(_name(id, graph) for id in needed)) or "none of them"
    if len(needed) != 1:
        acted = [e for e in graph.events if e.kind == world.event and e.t <= meetings[0].t]
        acted = [
            e for e in acted if {*e.participants} & {*pair} and {*e.participants} & {*(needed or outcomes)}
        ]
        if not acted:
            return None, f"without {reason} the two would not meet"
        last = max(acted, key=lambda event: event.t)
        return said in last.participants, f"of {reason}, the last to act: {_told(last, graph)}"
    return said == needed[0], f"simulated without {reason}, the two do not meet"


def _name(id: str, graph: STSG) -> str:
    return graph.tracklet(id).name


def _told(event: Event, graph: STSG) -> str:
    who = " and ".join(_name(id, graph) for id in event.participants)
    return f"'{event.kind}' with {who} at {seconds(graph, event.t)}"
