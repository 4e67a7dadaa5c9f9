"""The grounding of step 5: whether the graph supports an answer. Only what the graph shows is judged."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vot_kernels.reasoning.claims import (
    MOVED,
    NEGATED,
    STILL,
    Fact,
    attribute_fact,
    displacement,
    event_fact,
    events_of,
    find_windows,
    judge_claim,
    judge_details,
    part_in_question,
    relation_fact,
    says_details,
    seconds,
    without_times,
    words_left,
)
from vot_kernels.reasoning.moments import judge_moment
from vot_kernels.reasoning.names import (
    absent_words,
    find_directions,
    find_events,
    find_number,
    find_numbers,
    find_tracklets,
    find_yes_no,
    fold,
)
from vot_kernels.reasoning.types import GroundingCheck, Task, Verdict
from vot_kernels.reasoning.what_if import KINDS, World, judge_what_if
from vot_kernels.scene_graph.graph import STSG, Event

OUT_OF_DOMAIN_CONFIDENCE = 0.1  # upper bound
UNSUPPORTED_CONFIDENCE = 0.5  # upper bound
_TIMED = re.compile(r"\b(before|after|while|during|until|since|at \d|second time|then)\b")
_HOW_MANY = re.compile(
    r"\bhow (?:many|much)(?: (?:different|other))?(?: times)?\b|\bhow often\b|\b(?:total )?number of\b"
)
_ASKING = re.compile(
    r"\b(?:what|where|whom|whose|how|or|ever|(?:any|some)(?:thing|one|body)?|ways?|directions?|numbers?|name|order"
    r"|whole|entire|start|end|beginning|happen(?:s|ed)?|occur(?:s|red)?|earlier|earliest|later|latest)\b"
)
"""Words of questions that say nothing of what is asked about."""


def check(
    task: Task, answer: str, candidates: Sequence[str], graph: STSG, world: World | None = None
) -> GroundingCheck:
    """Judge `answer` (one of `candidates`) against the whole graph of the clip.

    "supported" and "contradicted" mean that the graph, as perceived, says so. Causes, and what would or will happen,
    are judged where there is a `world` that simulates them; without one they are "uncheckable", as is every wording
    that is not understood. An answer is supported if all of it is: one wrong part contradicts it, and one unknown word
    leaves it open.
    """
    if not graph.tracklets:
        return GroundingCheck(answer, "uncheckable", "the graph shows nothing")
    part = part_in_question(task.question, graph)
    if task.kind in KINDS and world is not None and not absent_words(f"{task.question} {answer}", graph):
        true, reason = judge_what_if(task, answer, candidates, graph, world)
        return GroundingCheck(answer, _VERDICTS[true], reason)
    verdict, reason = _judge(task, answer, candidates, part)
    if verdict == "supported" and task.kind not in ("when", "open"):  # of these all words were judged
        verdict, reason = _judge_rest(task, answer, part, reason)
    return GroundingCheck(answer, verdict, reason)


def confidence(score: float, verdict: Verdict, commonsense: str, perception: float, in_domain: bool) -> float:
    """Return how sure the answer is, in [0, 1]; this is a heuristic, not a calibrated probability.

    It starts from the candidate's share `score` of the ranking. It moves halfway to 1 if the graph supports the
    answer, and is halved if the graph contradicts it, or if the graph cannot check it and the model finds it to
    contradict its own analysis. It is multiplied by `perception`, the mean box score of the tracklets it rests on. It
    is at most 0.5 for what the graph does not support, and at most 0.1 for a clip out of domain.
    """
    if verdict == "supported":
        score = (1 + score) / 2
    elif verdict == "contradicted" or commonsense == "contradicts":
        score /= 2
    value = min(1.0, max(0.0, score * perception))
    if verdict != "supported":
        value = min(value, UNSUPPORTED_CONFIDENCE)
    return value if in_domain else min(value, OUT_OF_DOMAIN_CONFIDENCE)


def perception_score(graph: STSG, ids: Sequence[str]) -> float:
    """Return the mean box score of the tracklets `ids`; of all tracklets for no ids; 0 without boxes."""
    tracklets = [t for t in graph.tracklets if t.id in ids or not ids]
    scores = [score for t in tracklets for _, score in t.boxes.values()]
    return sum(scores) / len(scores) if scores else 0.0


_Judgement = tuple[Verdict, str]
_VERDICTS: dict[bool | None, Verdict] = {True: "supported", False: "contradicted", None: "uncheckable"}


def _judge(task: Task, answer: str, candidates: Sequence[str], graph: STSG) -> _Judgement:
    absent = absent_words(answer, graph)
    if absent:
        return "contradicted", f"no tracklet is '{absent[0]}'"
    if task.kind in KINDS:
        return "uncheckable", f"the graph does not show the answer to a {task.kind} question"
    if _TIMED.search(without_times(task.question)):
        return "uncheckable", "the question is about a part of the clip that was not worked out"
    named = task.named
    if task.kind == "when":
        true, reason = judge_moment(task.question, answer, candidates, named, graph)
        return _VERDICTS[true], reason
    if (gap := _not_told(task, graph)) is not None:
        return "uncheckable", gap
    if task.kind == "count":
        return _judge_count(task.question, answer, named, graph)
    if task.kind == "yes/no":
        return _judge_yes_no(task.question, answer, named, graph)
    if task.kind == "attribute":
        if find_events(task.question, graph.vocabulary.events):
            return _judge_which(task, answer, candidates, graph)
        return _judge_attribute(answer, named, graph)
    if task.kind == "direction":
        return _judge_direction(task.question, answer, candidates, named, graph)
    if task.kind in ("which", "order"):
        return _judge_which(task, answer, candidates, graph)
    true, reason = judge_claim(answer, graph)
    return _VERDICTS[true], reason


def _not_told(task: Task, graph: STSG) -> str | None:
    """Return what a question says that the graph does not tell; None if it tells all, or the answer says all itself."""
    question, kind = task.question, task.kind
    events = find_events(question, graph.vocabulary.events)
    ascribes = attribute_fact(question, graph) is not None or (kind == "count" and not events)
    if (absent := absent_words(question, graph)) and not ascribes:
        return f"no tracklet is '{absent[0]}'"
    if kind == "open":
        return None
    rest = _ASKING.sub(" ", _HOW_MANY.sub(" ", fold(question)))
    if unknown := words_left(rest, graph):
        return f"the graph says nothing about '{unknown[0]}'"
    if says_details(rest) and not (events and kind in ("yes/no", "which", "order", "attribute")):
        return "the question says how often or where, which was not worked out"
    return None


def _judge_rest(task: Task, answer: str, graph: STSG, reason: str) -> _Judgement:
    """Judge what an answer says beyond what was asked: a claim of its own, and when, how often and where."""
    kinds = find_events(answer, graph.vocabulary.events)
    if kinds and find_tracklets(answer, graph) and task.kind not in ("open", "count"):
        claim = judge_claim(answer, graph)
        if claim[0] is False:
            return "contradicted", claim[1]
    asked = find_events(f"{task.question} {answer}", graph.vocabulary.events)
    if len(asked) == 1 and task.kind != "count":
        named = task.named if len(task.targets) <= 2 else ()
        ids = dict.fromkeys((*find_tracklets(answer, graph), *named))
        events = events_of(graph, asked[0], ids)
        details = judge_details(answer, events, graph)
        if details is not None and details[0] is not True:
            return _VERDICTS[details[0]], details[1]
    elif find_windows(answer, graph):
        return "uncheckable", "the answer names a time of something that was not worked out"
    if unknown := words_left(answer, graph):
        return "uncheckable", f"the graph says nothing about '{unknown[0]}'"
    return "supported", reason


def _judge_count(question: str, answer: str, named: Sequence[str], graph: STSG) -> _Judgement:
    said = find_number(answer)
    if said is None:
        return "uncheckable", "the answer names no number"
    if len(set(find_numbers(without_times(answer)))) > 1:
        return "uncheckable", "the answer names several numbers"
    kinds = find_events(question, graph.vocabulary.events)
    if len(kinds) > 1:
        return "uncheckable", "the question is about several kinds of events"
    if kinds:
        events = events_of(graph, kinds[0], named)
        if re.search(r"how many (?:times|\w*collisions|bounces|hits)|how often|number of", fold(question)):
            count, what = len(events), f"'{kinds[0]}' happens {len(events)} times"
        else:
            count = len({id for event in events for id in event.participants} - set(named))
            what = f"'{kinds[0]}' involves {count} tracklets"
    elif named and re.search(r"how many times|how often", fold(question)):
        return "uncheckable", "what is counted is not an event of the graph"
    else:
        count = len(named) if named or absent_words(question, graph) else len(graph.tracklets)
        what = f"the graph has {count} such tracklets"
    return ("supported" if said == count else "contradicted"), what


def _judge_yes_no(question: str, answer: str, named: Sequence[str], graph: STSG) -> _Judgement:
    said = find_yes_no(answer)
    if said is None:
        return "uncheckable", "the answer is neither yes nor no"
    if said and find_yes_no(re.sub(r"^\W*(?:yes|true)\b", "", fold(answer))) is False:
        return "uncheckable", "the answer is both yes and no"
    if NEGATED.search(fold(question)):
        return "uncheckable", "the question is a negation"
    if not named:
        return "uncheckable", "the question names no tracklet"
    fact = (
        attribute_fact(question, graph)
        or _event_fact(question, named, graph)
        or _relation_fact(question, named, graph)
    )
    if fact is None:
        return "uncheckable", "the question is not about one event or relation of the graph"
    true, reason = fact
    if true is None:
        return "uncheckable", reason
    return ("supported" if said == true else "contradicted"), reason


def _event_fact(question: str, named: Sequence[str], graph: STSG) -> Fact | None:
    kinds = find_events(question, graph.vocabulary.events)
    if len(kinds) != 1 or len(named) > 2:
        return None
    return event_fact(without_times(question), kinds[0], named, graph)


def _relation_fact(question: str, named: Sequence[str], graph: STSG) -> Fact | None:
    folded = fold(question)
    predicates = [p for p in graph.vocabulary.predicates if re.search(rf"\b{re.escape(fold(p))}\b", folded)]
    if len(predicates) != 1 or len(named) != 2:
        return None
    true, reason = relation_fact(predicates[0], named[0], named[1], graph)
    return None if true is None else (true, reason)


def _judge_attribute(answer: str, named: Sequence[str], graph: STSG) -> _Judgement:
    if len(named) != 1:
        return "uncheckable", "the question does not name one tracklet"
    tracklet, vocabulary = graph.tracklet(named[0]), graph.vocabulary
    has = {tracklet.label, *tracklet.attributes}
    folded = fold(answer)
    numbers = {label.split()[-1]: label for label in vocabulary.labels}
    said = [
        w
        for w in (*vocabulary.attributes, *vocabulary.labels)
        if re.search(rf"\b{re.escape(fold(w))}\b", folded)
    ]
    said = said or [numbers[folded]] if folded in numbers else said
    if not said:
        return "uncheckable", "the answer names nothing that a tracklet can be"
    return ("supported" if set(said) <= has else "contradicted"), f"it is {tracklet.name}"


def _judge_direction(
    question: str, answer: str, candidates: Sequence[str], named: Sequence[str], graph: STSG
) -> _Judgement:
    if len(named) != 1:
        return "uncheckable", "the question does not name one tracklet"
    moved = displacement(graph.tracklet(named[0]), question)
    if moved is None:
        return "uncheckable", "the target is seen in fewer than two frames"
    along = {"left": -moved[0], "right": moved[0], "up": -moved[1], "down": moved[1]}
    furthest = max(abs(moved[0]), abs(moved[1]))
    reason = f"it moves {moved[0]:+.2f} of the frame to the right and {moved[1]:+.2f} down"
    said = find_directions(answer)
    if not said:
        if STILL.search(fold(answer)):
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


def _judge_which(task: Task, answer: str, candidates: Sequence[str], graph: STSG) -> _Judgement:
    kinds = find_events(f"{task.question} {answer}", graph.vocabulary.events)
    if len(kinds) != 1:
        return "uncheckable", "the question is not about one kind of event"
    if not find_tracklets(answer, graph):
        return "uncheckable", "the answer names no tracklet"
    others = [c for c in candidates if fold(c) != fold(answer)]
    first, *rivals = (_meetings(task, kinds[0], candidate, graph) for candidate in (answer, *others))
    if first is None or None in rivals:
        return "uncheckable", "the graph does not tell what the question says of how often or where"
    known = [events for events in rivals if events]
    if not first:
        if not known:
            return "uncheckable", f"no candidate has a '{kinds[0]}' that fits the question"
        return "contradicted", f"no '{kinds[0]}' with {answer} fits the question"
    reason = f"'{kinds[0]}' with {answer} at {seconds(graph, first[0].t)}"
    if task.kind in ("which", "attribute"):
        return "supported", reason
    last = re.search(r"\blast\b", fold(task.question)) is not None
    mine, *theirs = (events[-1].t if last else events[0].t for events in (first, *known))
    if any(other > mine if last else other < mine for other in theirs):
        return "contradicted", f"{reason}, another candidate {'later' if last else 'earlier'}"
    return ("uncheckable" if mine in theirs else "supported"), reason


def _meetings(task: Task, kind: str, candidate: str, graph: STSG) -> list[Event] | None:
    """Return the events of `kind`, by time, in which the candidate meets those whom the question names.

    There are none if they do not happen as often or where the question says; None if the graph does not tell that.
    """
    mentioned, named = find_tracklets(candidate, graph), task.named
    if not mentioned or mentioned == named:
        return []  # the answer to "which does the red one hit?" is not the red one
    # A question that lists its candidates ("which hits first, the red or the blue one?") names no partner.
    partners = named if len(named) == 1 else ()
    events = events_of(graph, kind, [*mentioned, *partners])
    details = judge_details(without_times(task.question), events, graph) if events else None
    if details is None or details[0]:
        return events
    return [] if details[0] is False else None
