"""Step 5's grounding: does the graph bear out an answer? Only what can be read off the graph is judged."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vot_kernels.reasoning.names import (
    absent_words,
    find_directions,
    find_events,
    find_number,
    find_tracklets,
    find_yes_no,
    fold,
)
from vot_kernels.reasoning.types import GroundingCheck, Task, Verdict
from vot_kernels.scene_graph.graph import STSG, Event

MOVED = 0.04  # fractions of the frame; below, a displacement says nothing about direction
OUT_OF_DOMAIN_CONFIDENCE = 0.1  # upper bound
_STILL = re.compile(r"\b(not mov\w*|still|stationary|stays?|does not|doesn't)\b")
_TIMED = re.compile(r"\b(before|after|while|during|until|since|at \d|second time|then)\b")
_PARTS = (
    (re.compile(r"\bfirst half of the (clip|video)\b"), 0.0, 0.5),
    (re.compile(r"\bsecond half of the (clip|video)\b"), 0.5, 1.0),
)
"""Wordings for a half of a clip: the shares of its duration where it begins and ends."""
_NEGATED = re.compile(r"\b(not|never|no|without)\b|n't\b")


def check(task: Task, answer: str, candidates: Sequence[str], graph: STSG) -> GroundingCheck:
    """Judge `answer` (one of `candidates`) against the whole graph of the clip.

    "supported" and "contradicted" mean that the graph, as perceived, says so; everything about causes, about
    what would or will happen, and every wording not understood is "uncheckable".
    """
    verdict, reason = _judge(task, answer, candidates, part_in_question(task.question, graph))
    return GroundingCheck(answer, verdict, reason)


def part_in_question(question: str, graph: STSG) -> STSG:
    """The graph of the half of the clip that the question names, or the whole graph."""
    times = graph.frame_times_s
    for wording, begin, end in _PARTS:
        if times and wording.search(fold(question)):
            at = [times[0] + share * (times[-1] - times[0]) for share in (begin, end)]
            # The middle belongs to the later part, the last frame to the last.
            inside = [k for k, t in enumerate(times) if at[0] <= t and (t < at[1] or end == 1.0)]
            return graph.subgraph(None, inside[0], inside[-1]) if inside else graph
    return graph


def confidence(score: float, verdict: Verdict, commonsense: str, perception: float, in_domain: bool) -> float:
    """How sure the answer is, in [0, 1]; a heuristic, not a calibrated probability.

    The candidate's share `score` of the ranking; halfway to 1 if the graph supports it; halved if the graph
    contradicts it or the model sees it contradict its own analysis of something the graph cannot check; times
    `perception`, the mean box score of the tracklets it rests on; at most 0.1 for a clip out of domain.
    """
    if verdict == "supported":
        score = (1 + score) / 2
    elif verdict == "contradicted" or commonsense == "contradicts":
        score /= 2
    value = min(1.0, max(0.0, score * perception))
    return value if in_domain else min(value, OUT_OF_DOMAIN_CONFIDENCE)


def perception_score(graph: STSG, ids: Sequence[str]) -> float:
    """Mean box score of the tracklets `ids`; of all tracklets for no ids; 0 without boxes."""
    tracklets = [t for t in graph.tracklets if t.id in ids or not ids]
    scores = [score for t in tracklets for _, score in t.boxes.values()]
    return sum(scores) / len(scores) if scores else 0.0


_Judgement = tuple[Verdict, str]


def _judge(task: Task, answer: str, candidates: Sequence[str], graph: STSG) -> _Judgement:
    absent = absent_words(answer, graph)
    if absent:
        return "contradicted", f"no tracklet is '{absent[0]}'"
    if task.kind in ("cause", "counterfactual", "prediction"):
        return "uncheckable", f"the graph does not show the answer to a {task.kind} question"
    if _TIMED.search(fold(task.question)):
        return "uncheckable", "the question is about a part of the clip that was not worked out"
    named = task.targets if task.targets_by in ("question", "both") else ()
    if task.kind == "count":
        return _judge_count(task.question, answer, named, graph)
    if task.kind == "yes/no":
        return _judge_yes_no(task.question, answer, named, graph)
    if task.kind == "direction":
        return _judge_direction(task.question, answer, candidates, named, graph)
    if task.kind in ("which", "order"):
        return _judge_which(task, answer, candidates, named, graph)
    return _judge_claim(answer, graph)


def _judge_count(question: str, answer: str, named: Sequence[str], graph: STSG) -> _Judgement:
    said = find_number(answer)
    if said is None:
        return "uncheckable", "the answer names no number"
    kinds = find_events(question, graph.vocabulary.events)
    if len(kinds) > 1:
        return "uncheckable", "the question is about several kinds of events"
    if kinds:
        events = _events(graph, kinds[0], named)
        if re.search(r"how many (?:times|\w*collisions|bounces|hits)|how often|number of", fold(question)):
            count, what = len(events), f"'{kinds[0]}' happens {len(events)} times"
        else:
            count = len({id for event in events for id in event.participants} - set(named))
            what = f"'{kinds[0]}' involves {count} tracklets"
    elif named and re.search(r"how many times|how often", fold(question)):
        return "uncheckable", "what is counted is not an event of the graph"
    else:
        count = len(named) or len(graph.tracklets)
        what = f"the graph has {count} such tracklets"
    return ("supported" if said == count else "contradicted"), what


def _judge_yes_no(question: str, answer: str, named: Sequence[str], graph: STSG) -> _Judgement:
    said = find_yes_no(answer)
    if said is None:
        return "uncheckable", "the answer is neither yes nor no"
    if _NEGATED.search(fold(question)):
        return "uncheckable", "the question is a negation"
    if not named:
        return "uncheckable", "the question names no tracklet"
    fact = _event_fact(question, named, graph) or _relation_fact(question, named, graph)
    if fact is None:
        return "uncheckable", "the question is not about one event or relation of the graph"
    true, reason = fact
    return ("supported" if said == true else "contradicted"), reason


def _event_fact(question: str, named: Sequence[str], graph: STSG) -> tuple[bool, str] | None:
    kinds = find_events(question, graph.vocabulary.events)
    if len(kinds) != 1 or len(named) > 2:
        return None
    events = _events(graph, kinds[0], named)
    who = " and ".join(graph.tracklet(id).name for id in named)
    if events:
        return True, f"'{kinds[0]}' with {who} at {_seconds(graph, events[0].t)}"
    return False, f"no '{kinds[0]}' with {who}"


def _relation_fact(question: str, named: Sequence[str], graph: STSG) -> tuple[bool, str] | None:
    """A relation that holds always or never where both are seen; one that comes and goes settles nothing."""
    folded = fold(question)
    predicates = [p for p in graph.vocabulary.predicates if re.search(rf"\b{re.escape(fold(p))}\b", folded)]
    if len(predicates) != 1 or len(named) != 2:
        return None
    subject, other = (graph.tracklet(id) for id in named)
    together = [k for k in subject.frames if k in other.boxes]
    relations = [r for r in graph.relations if r.predicate == predicates[0]]
    holds = [r for r in relations if (r.subject, r.object) == (subject.id, other.id)]
    frames = sum(any(r.t0 <= k <= r.t1 for r in holds) for k in together)
    # Without one relation of this kind in the graph, its absence may just mean that nobody looked for it.
    if not together or not relations or 0 < frames < len(together):
        return None
    always = frames == len(together)
    return always, f"{subject.name} is {'always' if always else 'never'} {predicates[0]} {other.name}"


def _judge_direction(
    question: str, answer: str, candidates: Sequence[str], named: Sequence[str], graph: STSG
) -> _Judgement:
    if len(named) != 1:
        return "uncheckable", "the question does not name one tracklet"
    moved = _displacement(graph, named[0], question)
    if moved is None:
        return "uncheckable", "the target is seen in fewer than two frames"
    along = {"left": -moved[0], "right": moved[0], "up": -moved[1], "down": moved[1]}
    furthest = max(abs(moved[0]), abs(moved[1]))
    reason = f"it moves {moved[0]:+.2f} of the frame to the right and {moved[1]:+.2f} down"
    said = find_directions(answer)
    if not said:
        if _STILL.search(fold(answer)):
            return ("supported" if furthest < MOVED else "contradicted"), reason
        return "uncheckable", "the answer names no direction"
    if any(along[direction] <= -MOVED for direction in said) or furthest < MOVED:
        return "contradicted", reason
    asked = find_directions(question)
    main = max(asked or along, key=lambda direction: along[direction])
    if main in said and all(along[direction] >= MOVED for direction in said):
        return "supported", reason
    if len(said) == 1:
        less = along[main] - along[next(iter(said))]
        offered = any(find_directions(candidate) == {main} for candidate in candidates)
        if less >= MOVED and (offered or 2 * less >= along[main]):
            return "contradicted", reason
    return "uncheckable", reason


def _displacement(graph: STSG, id: str, question: str) -> tuple[float, float] | None:
    """How far the tracklet's centre comes over the clip, or over its first or last quarter if asked."""
    tracklet = graph.tracklet(id)
    frames = list(tracklet.frames)
    quarter = max(2, -(-len(frames) // 4))
    if re.search(r"\b(start|beginning|initially|at first)\b", fold(question)):
        frames = frames[:quarter]
    elif re.search(r"\b(end|finally|at last)\b", fold(question)):
        frames = frames[-quarter:]
    if len(frames) < 2:
        return None
    (x0, y0), (x1, y1) = tracklet.boxes[frames[0]][0].center, tracklet.boxes[frames[-1]][0].center
    return x1 - x0, y1 - y0


def _judge_which(
    task: Task, answer: str, candidates: Sequence[str], named: Sequence[str], graph: STSG
) -> _Judgement:
    kinds = find_events(f"{task.question} {answer}", graph.vocabulary.events)
    if len(kinds) != 1:
        return "uncheckable", "the question is not about one kind of event"
    first = _moment(graph, kinds[0], named, answer)
    others = [_moment(graph, kinds[0], named, c) for c in candidates if fold(c) != fold(answer)]
    known = [moment for moment in others if moment is not None]
    if not find_tracklets(answer, graph):
        return "uncheckable", "the answer names no tracklet"
    if first is None:
        if not known:
            return "uncheckable", f"no candidate has a '{kinds[0]}' that fits the question"
        return "contradicted", f"no '{kinds[0]}' with {answer} fits the question"
    reason = f"'{kinds[0]}' with {answer} at {_seconds(graph, first[0])}"
    if task.kind == "which":
        return "supported", reason
    last = re.search(r"\blast\b", fold(task.question)) is not None
    rivals = [moment[1] if last else moment[0] for moment in known]
    mine = first[1] if last else first[0]
    if any(rival > mine if last else rival < mine for rival in rivals):
        return "contradicted", f"{reason}, another candidate {'later' if last else 'earlier'}"
    return ("uncheckable" if mine in rivals else "supported"), reason


def _moment(graph: STSG, kind: str, named: Sequence[str], candidate: str) -> tuple[int, int] | None:
    """First and last frame of a `kind` in which the candidate takes part, with whom the question names."""
    mentioned = find_tracklets(candidate, graph)
    if not mentioned or list(mentioned) == list(named):
        return None  # "which does the red one hit?" is not answered by the red one
    # A question that lists its candidates ("which hits first, the red or the blue one?") names no partner.
    partners = named if len(named) == 1 else ()
    events = _events(graph, kind, [*mentioned, *partners])
    return (events[0].t, events[-1].t) if events else None


def _judge_claim(answer: str, graph: STSG) -> _Judgement:
    """An answer that is itself a claim: "the red digit hits the blue digit"."""
    kinds, mentioned = find_events(answer, graph.vocabulary.events), find_tracklets(answer, graph)
    if len(kinds) != 1 or not mentioned or len(mentioned) > 2 or _NEGATED.search(fold(answer)):
        return "uncheckable", "the answer claims no single event"
    true, reason = _event_fact(answer, mentioned, graph) or (False, "")
    return ("supported" if true else "contradicted"), reason


def _events(graph: STSG, kind: str, ids: Sequence[str]) -> list[Event]:
    """Events of `kind` in which all of `ids` take part, by time."""
    found = [e for e in graph.events if e.kind == kind and set(ids) <= set(e.participants)]
    return sorted(found, key=lambda event: event.t)


def _seconds(graph: STSG, frame: int) -> str:
    return f"{graph.frame_times_s[frame]:.2f} s"
