"""Claims in words, such as "the red digit hits the blue digit twice, at the left wall, after 1 s".

The graph is compared with each part of a claim: who, what, when, how often and where. One wrong part makes a claim
false; a part that the graph does not show, or words that were not understood, leave it open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vot_kernels.reasoning.names import (
    absent_words,
    find_directions,
    find_events,
    find_number,
    find_tracklets,
    fold,
    unknown_words,
)
from vot_kernels.scene_graph.graph import STSG, Event, Tracklet
from vot_kernels.scene_graph.interval import Interval

MOVED = 0.04  # fractions of the frame; a shorter displacement has no direction
STILL = re.compile(r"\b(not mov\w*|still|stationary|stays?|does not|doesn't)\b")
NEGATED = re.compile(r"\b(not|never|no|without|neither|nor)\b|n't\b")
_HALVES = (
    (re.compile(r"\b(?:in |during |at )?(?:the )?first half(?: of the (?:clip|video))?\b"), 0.0, 0.5),
    (re.compile(r"\b(?:in |during |at )?(?:the )?second half(?: of the (?:clip|video))?\b"), 0.5, 1.0),
)
"""Wordings for a half of a clip: the shares of its duration where it begins and ends."""
_N, _S = r"(\d+(?:\.\d+)?)", r"\s*(?:seconds?|secs?|s)\b"
_RANGE = re.compile(
    rf"\b(?:(?:between|from|at|in|during)\s+)?{_N}(?:{_S})?\s*(?:-|–|and|to|until)\s*{_N}{_S}"
)
_BOUND = re.compile(rf"\b(before|by|until|after|since)\s+{_N}{_S}")
_MOMENT = re.compile(rf"(?:\b(?:at|around|about|near)\s+)*{_N}{_S}(?:\s+(?:in|into the (?:clip|video))\b)?")
_OFTEN = re.compile(r"\b(?:(?:exactly|only)\s+)?(?:once|twice|thrice|\w+ times|one time)\b")
_FRAME = r"(?:frame|clip|video|picture|image|screen)"
_SIDE = r"(?:(?:top|bottom|upper|lower)[ -]?)?(?:left|right)|top|bottom|upper|lower|middle|cent(?:er|re)"
_PLACE = re.compile(
    rf"\b(?:in|on|at|near|off|against|from) the ({_SIDE})(?: hand)?"
    rf"(?: (half|side|part|corner|edge|border|wall))?(?: of the {_FRAME})?(?! of)\b"
)
_SIDES = {
    "left": "left",
    "right": "right",
    "top": "top",
    "upper": "top",
    "bottom": "bottom",
    "lower": "bottom",
}
_NEAR_HALF = 0.05  # fractions of the frame about its middle that belong to neither half
MOVES = r"\b(?:mov|go(?:es|ing)?\b|head|travel|drift|slid|rises?|rising|falls?|falling)\w*"
_CLAUSES = re.compile(r"[.;!?](?:\s+|$)|,?\s+(?:and then|then|and|while|whereas|but)\s+|,\s+")


def find_windows(text: str, graph: STSG, *, slack: bool = True) -> tuple[Interval, ...]:
    """Return the times that `text` names: ranges; halves; moments, with a tolerance of a frame or the given digits.

    Without `slack` a range ends just where it says, rather than with the same tolerance.
    """
    windows, rest = [], fold(text)
    times = graph.frame_times_s
    for wording, begin, end in _HALVES:
        if len(times) > 1 and wording.search(rest):
            length = times[-1] - times[0]
            # The middle belongs to the later half, and the last frame to the second.
            last = times[0] + end * length
            windows.append(
                Interval(times[0] + begin * length, last if end == 1 else math.nextafter(last, -math.inf))
            )
        rest = wording.sub(" ", rest)
    for match in _RANGE.finditer(rest):
        margin = max(_tolerance(match[1], graph), _tolerance(match[2], graph)) if slack else 0.0
        first, last = sorted((float(match[1]), float(match[2])))
        windows.append(Interval(first - margin, last + margin))
    rest = _RANGE.sub(" ", rest)
    for match in _BOUND.finditer(rest):
        at, margin = float(match[2]), _frame_length(graph) / 2
        early = match[1] in ("before", "by", "until")
        windows.append(Interval(-math.inf, at + margin) if early else Interval(at - margin, math.inf))
    for match in _MOMENT.finditer(_BOUND.sub(" ", rest)):
        margin = _tolerance(match[1], graph)
        windows.append(Interval(float(match[1]) - margin, float(match[1]) + margin))
    return tuple(windows)


def stated_interval(text: str, graph: STSG) -> Interval | None:
    """Return the part of the clip that `text` names, None if it names none; of several, the part common to all."""
    if not graph.frame_times_s:
        return None
    found: Interval | None = Interval(graph.frame_times_s[0], graph.frame_times_s[-1])
    windows = find_windows(text, graph, slack=False)
    for window in windows:
        found = found.shared(window) if found else None
    return found if windows else None


def without_times(text: str) -> str:
    """Return `text`, folded, without the times that `find_windows` finds."""
    rest = fold(text)
    for wording in (*(half[0] for half in _HALVES), _RANGE, _BOUND, _MOMENT):
        rest = wording.sub(" ", rest)
    return rest


def _tolerance(digits: str, graph: STSG) -> float:
    """Return a frame's length or half a unit of the last digit given, plus the rounding error of the times."""
    return max(_frame_length(graph), 0.5 * 10.0 ** -len(digits.partition(".")[2])) + 1e-6


def _frame_length(graph: STSG) -> float:
    times = graph.frame_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def part_in_question(question: str, graph: STSG) -> STSG:
    """Return the graph of the times that the question names, or the whole graph."""
    for window in find_windows(question, graph):
        inside = [k for k, at in enumerate(graph.frame_times_s) if at in window]
        if not inside:
            return replace(graph, events=())
        graph = graph.subgraph(None, inside[0], inside[-1])
    return graph


def events_of(graph: STSG, kind: str, ids: Iterable[str]) -> list[Event]:
    """Return the events of `kind` in which all of `ids` take part, by time."""
    found = [e for e in graph.events if e.kind == kind and set(ids) <= set(e.participants)]
    return sorted(found, key=lambda event: event.t)


def seconds(graph: STSG, frame: int) -> str:
    return f"{graph.frame_times_s[frame]:.2f} s"


Fact = tuple[bool | None, str]
"""Whether something is true (None: the graph does not tell), and why."""


def judge_claim(text: str, graph: STSG) -> Fact:
    """Judge whether everything that `text` claims is true; every clause must be."""
    facts: list[Fact] = []
    subject: tuple[str, ...] = ()
    for clause in _clauses(text, graph):
        fact, subject = _judge_clause(clause, subject, graph)
        facts.append(fact)
    wrong = next((fact for fact in facts if fact[0] is False), None)
    open_ = next((fact for fact in facts if fact[0] is None), None)
    return wrong or open_ or (facts[0] if facts else (None, "nothing is claimed"))


def _clauses(text: str, graph: STSG) -> list[str]:
    """Split `text` into parts with a verb each; a part without one joins the part before it."""
    clauses: list[str] = []
    for piece in filter(None, (part.strip() for part in _CLAUSES.split(fold(text)))):
        if clauses and not (_has_verb(piece, graph) and _has_verb(clauses[-1], graph)):
            clauses[-1] += f" and {piece}"
        else:
            clauses.append(piece)
    return clauses


def _has_verb(text: str, graph: STSG) -> bool:
    return bool(
        find_events(text, graph.vocabulary.events)
        or _predicates(text, graph)
        or re.search(MOVES, text)
        or re.search(r"\b(?:is|are|was|were|stays?)\b", text)
    )


def _judge_clause(clause: str, subject: tuple[str, ...], graph: STSG) -> tuple[Fact, tuple[str, ...]]:
    """Return the fact, and the tracklet that the clause is about, which the next clause may leave out."""
    mentioned = find_tracklets(clause, graph)
    kinds = find_events(clause, graph.vocabulary.events)
    verb = re.search(rf"(?<!\w){re.escape(fold(kinds[0])[:3])}|{MOVES}" if kinds else MOVES, clause)
    if verb and not find_tracklets(clause[: verb.start()], graph):
        mentioned = tuple(dict.fromkeys((*subject, *mentioned)))
    about = mentioned[:1] or subject
    if NEGATED.search(clause):
        return (None, "it is a negation"), about
    if absent := absent_words(clause, graph):
        return (False, f"no tracklet is '{absent[0]}'"), about
    fact = _fact(clause, kinds, mentioned, graph)
    if fact[0] and (unknown := unknown_words(_plain(clause), graph)):
        fact = None, f"the graph says nothing about '{unknown[0]}'"
    return fact, about


def _fact(clause: str, kinds: Sequence[str], mentioned: Sequence[str], graph: STSG) -> Fact:
    if len(kinds) > 1 or not mentioned or len(mentioned) > 2:
        return None, "it claims no single event"
    if kinds:
        return event_fact(clause, kinds[0], mentioned, graph)
    return _state(clause, mentioned, part_in_question(clause, graph))


def event_fact(text: str, kind: str, mentioned: Sequence[str], graph: STSG) -> Fact:
    """Judge whether `kind` happens with all of `mentioned` when, as often, where and in the turn that `text` says."""
    events = events_of(graph, kind, mentioned)
    who = " and ".join(graph.tracklet(id).name for id in mentioned)
    if not events:
        return False, f"no '{kind}' with {who}"
    told = True, f"'{kind}' with {who} at {seconds(graph, events[0].t)}"
    details = judge_details(text, events, graph)
    order = _judge_turn(text, kind, mentioned, graph)
    return next((f for v in (False, None) for f in (details, order) if f and f[0] is v), told)


def _state(clause: str, mentioned: Sequence[str], graph: STSG) -> Fact:
    """Judge a claim about a relation, a motion or an attribute."""
    predicates = _predicates(clause, graph)
    if len(mentioned) == 2 and len(predicates) == 1:
        return relation_fact(predicates[0], mentioned[0], mentioned[1], graph)
    if len(mentioned) == 1 and (re.search(MOVES, clause) or STILL.search(clause)):
        return _motion_fact(clause, graph.tracklet(mentioned[0]))
    return attribute_fact(clause, graph) or (None, "it claims no single event")


def _predicates(text: str, graph: STSG) -> list[str]:
    """Return the relations between two tracklets that `text` names."""
    unary = {r.predicate for r in graph.relations if r.subject == r.object}
    words = (p for p in graph.vocabulary.predicates if p not in unary and not re.match(MOVES, p))
    return [word for word in words if _holds_word(word, text)]


def _holds_word(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(fold(word))}(?!\w)", fold(text)) is not None


def relation_fact(predicate: str, subject: str, other: str, graph: STSG) -> Fact:
    """Judge a relation that always or never holds where both are seen; one that comes and goes decides nothing.

    The graph of a long video keeps every frame of a relation, but few boxes, so that it can come and go between them.
    """
    first, second = graph.tracklet(subject), graph.tracklet(other)
    together = [k for k in first.frames if k in second.boxes]
    relations = [r for r in graph.relations if r.predicate == predicate]
    holds = [r for r in relations if (r.subject, r.object) == (subject, other)]
    frames = sum(any(r.t0 <= k <= r.t1 for r in holds) for k in together)
    always, never = frames == len(together), not holds
    if len(holds) > 1 and not {k for r in holds for k in (r.t0, r.t1)} <= {*together}:
        always = False
    # A graph without any relation of this kind may have been made without looking for it.
    if not together or not relations or not (always or never):
        return None, "the relation does not hold always or never"
    return always, f"{first.name} is {'always' if always else 'never'} {predicate} {second.name}"


def attribute_fact(text: str, graph: STSG) -> Fact | None:
    """Judge a text that ascribes something to one tracklet ("is the digit 8 white?"); None for other texts."""
    folded = fold(text).rstrip(" .?!")
    for word in (*graph.vocabulary.attributes, *graph.vocabulary.labels):
        match = re.fullmatch(
            rf"(?:is|was|are|were)?(.+?)(?:(?<!\w)(?:is|was|are|were))?(?<!\bthe)\s+(?:a )?{re.escape(fold(word))}",
            folded,
        )
        if match is None or not re.search(r"\b(?:is|was|are|were)\b", folded):
            continue
        named = find_tracklets(match[1], graph)
        if len(named) == 1:
            tracklet = graph.tracklet(named[0])
            return word in (tracklet.label, *tracklet.attributes), f"it is {tracklet.name}"
    return None


def _motion_fact(clause: str, tracklet: Tracklet) -> Fact:
    moved = displacement(tracklet, clause)
    said = find_directions(clause)
    if moved is None:
        return None, f"{tracklet.name} is seen in fewer than two frames"
    along = {"left": -moved[0], "right": moved[0], "up": -moved[1], "down": moved[1]}
    reason = f"it moves {moved[0]:+.2f} of the frame to the right and {moved[1]:+.2f} down"
    if not said:
        moves = max(along.values()) >= MOVED
        return (not moves if STILL.search(clause) else moves), reason
    if any(along[direction] <= -MOVED for direction in said) or max(along.values()) < MOVED:
        return False, reason
    return (True if all(along[direction] >= MOVED for direction in said) else None), reason


def displacement(tracklet: Tracklet, text: str) -> tuple[float, float] | None:
    """Return the displacement of the tracklet's centre over the clip, or its first or last quarter if `text` says."""
    frames = list(tracklet.frames)
    if len(frames) < 2:
        return None
    quarter = (frames[-1] - frames[0]) / 4  # of the time, as the boxes of a long video are not evenly spread
    if re.search(r"\b(start|beginning|initially|at first)\b", fold(text)):
        frames = [k for k in frames if k <= max(frames[0] + quarter, frames[1])]
    elif re.search(r"\b(end|finally|at last)\b", fold(text)):
        frames = [k for k in frames if k >= min(frames[-1] - quarter, frames[-2])]
    (x0, y0), (x1, y1) = tracklet.boxes[frames[0]][0].center, tracklet.boxes[frames[-1]][0].center
    return x1 - x0, y1 - y0


def _judge_turn(clause: str, kind: str, mentioned: Sequence[str], graph: STSG) -> Fact | None:
    """Judge "first" or "last" among all events of this kind in which the first named tracklet takes part."""
    turn = re.search(r"\b(first|last)\b", without_times(clause))
    if turn is None:
        return None
    turns = events_of(graph, kind, mentioned[:1])
    chosen = turns[0] if turn[1] == "first" else turns[-1]
    at = [event for event in turns if event.t == chosen.t]
    right = any(set(mentioned) <= set(event.participants) for event in at)
    return (
        right if len(at) == 1 or not right else None
    ), f"the {turn[1]} '{kind}' is at {seconds(graph, chosen.t)}"


def says_details(text: str) -> bool:
    """Whether `text` says how often or where something happens."""
    rest = without_times(text)
    return bool(_OFTEN.search(rest) or _PLACE.search(rest))


def judge_details(text: str, events: Sequence[Event], graph: STSG) -> Fact | None:
    """Judge when, how often and where `text` says that `events` happen; None if it says none of these."""
    facts: list[Fact] = []
    for window in find_windows(text, graph):
        inside = [e for e in events if graph.frame_times_s[e.t] in window]
        at = ", ".join(seconds(graph, event.t) for event in events) or "never"
        facts.append((bool(inside), f"the graph says when: {at}"))
        events = inside
    rest = without_times(text)
    if often := _OFTEN.search(rest):
        said = 3 if "thrice" in often[0] else find_number(often[0])
        facts.append(
            (None if said is None else said == len(events), f"the graph says how often: {len(events)}")
        )
    for match in _PLACE.finditer(rest):
        sides = {name for word, name in _SIDES.items() if word in match[1]} or {"middle"}
        wall = match[2] in ("wall", "edge", "border")
        found = [_is_at(event, sides, wall, graph) for event in events]
        where = "the graph says where: elsewhere" if True not in found else "the graph says where"
        facts.append((True if True in found else None if None in found or not found else False, where))
    return next((fact for value in (False, None, True) for fact in facts if fact[0] is value), None)


def _is_at(event: Event, sides: set[str], wall: bool, graph: STSG) -> bool | None:
    boxes = [box for id in event.participants if (box := graph.tracklet(id).box(event.t)) is not None]
    if not boxes:
        return None
    x = sum(box.center[0] for box in boxes) / len(boxes) - 0.5
    y = sum(box.center[1] for box in boxes) / len(boxes) - 0.5
    if wall:
        gaps = {"left": boxes[0].x1, "right": 1 - boxes[0].x2, "top": boxes[0].y1, "bottom": 1 - boxes[0].y2}
        nearest = min(gaps, key=lambda side: gaps[side])
        return nearest in sides or (
            False if all(gaps.get(side, 1.0) > 3 * _NEAR_HALF for side in sides) else None
        )
    if sides == {"middle"}:
        away = max(abs(x), abs(y))
        return away < 0.2 or (False if away > 0.3 else None)
    inwards = {"left": -x, "right": x, "top": -y, "bottom": y}
    if any(inwards[side] < -_NEAR_HALF for side in sides):
        return False
    return True if all(inwards[side] > _NEAR_HALF for side in sides) else None


def _plain(clause: str) -> str:
    """Return the clause without the times, counts and places in it."""
    return _PLACE.sub(" ", _OFTEN.sub(" ", without_times(clause)))


def words_left(answer: str, graph: STSG) -> tuple[str, ...]:
    """Return the words of an answer that match nothing in the graph."""
    return unknown_words(_plain(answer), graph)
