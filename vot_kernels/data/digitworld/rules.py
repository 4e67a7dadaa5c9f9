"""Answers from a scene graph alone: parse the question, look at tracks and events, simulate where needed."""

import re
from collections.abc import Callable, Sequence

from vot_kernels.data.digitworld.physics import hit_without, next_partner
from vot_kernels.data.digitworld.questions import Question
from vot_kernels.data.digitworld.tracks import Tracks
from vot_kernels.scene_graph.graph import STSG

_NAME = r"(the \w+ digit)"


def answer_by_rules(question: Question, stsg: STSG) -> str:
    """Return one of `question.candidates`, from the graph alone; the first if the graph says nothing."""
    return answer_text_by_rules(question.text, question.candidates, stsg)


def answer_text_by_rules(text: str, candidates: Sequence[str], stsg: STSG) -> str:
    """As `answer_by_rules`, but from the wording. ValueError for wordings that DigitWorld does not use."""
    if not candidates:
        raise ValueError("candidates must hold at least one answer, got none.")
    for pattern, rule in _RULES:
        if match := re.fullmatch(pattern, text.strip(), flags=re.IGNORECASE):
            answer = _apply(rule, match.groups(), candidates, stsg)
            return answer if answer is not None and answer in candidates else candidates[0]
    raise ValueError(f"The rules know only DigitWorld's wordings, not {text!r}.")


def _apply(rule: "_Rule", parts: tuple[str | None, ...], candidates: Sequence[str], stsg: STSG) -> str | None:
    """Return the rule's answer; None if an object that the question names was not found or nothing was tracked."""
    tracks = Tracks(stsg)
    if not tracks.tracklets or tracks.num_frames == 0:
        return None
    arguments: list[int | str | None] = []
    for part in parts:
        track = tracks.named(part) if part and re.fullmatch(_NAME, part, flags=re.IGNORECASE) else part
        if part and track is None:
            return None
        arguments.append(track)
    return rule(tracks, candidates, *arguments)


_Rule = Callable[..., str | None]


def _motion(tracks: Tracks, candidates: Sequence[str], body: int, part: str) -> str | None:
    quarter = -(-tracks.num_frames // 4)
    path = tracks.centers[body]
    if part.endswith("start of the clip"):
        path = path[:quarter]
    elif part.endswith("end of the clip"):
        path = path[-quarter:]
    x, y = (path[-1] - path[0]).tolist()
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _did_hit(tracks: Tracks, candidates: Sequence[str], a: int, b: int, half: str | None) -> str | None:
    middle = (tracks.times[0] + tracks.times[-1]) / 2
    moments = tracks.times[tracks.hits_of(a, b)]
    if half:
        moments = moments[(moments < middle) == (half == "first")]
    return "yes" if len(moments) else "no"


def _did_hit_between(
    tracks: Tracks, candidates: Sequence[str], a: int, b: int, begin: str, end: str
) -> str | None:
    moments = tracks.times[tracks.hits_of(a, b)]
    return "yes" if ((float(begin) <= moments) & (moments <= float(end))).any() else "no"


def _count_all(tracks: Tracks, candidates: Sequence[str]) -> str | None:
    return _nearest_number(len(tracks.hits), candidates)


def _count_hits(tracks: Tracks, candidates: Sequence[str], body: int) -> str | None:
    return _nearest_number(len(tracks.hits_of(body)), candidates)


def _count_bounces(tracks: Tracks, candidates: Sequence[str], body: int) -> str | None:
    return _nearest_number(sum(track == body for _, track in tracks.bounces), candidates)


def _nearest_number(count: int, candidates: Sequence[str]) -> str | None:
    numbers = [candidate for candidate in candidates if candidate.isdigit()]
    return min(numbers, key=lambda number: abs(int(number) - count), default=None)


def _first_partner(tracks: Tracks, candidates: Sequence[str], body: int) -> str | None:
    others = _named(tracks, candidates)
    return next((others[other] for _, other in tracks.partners(body) if other in others), None)


def _first_event(tracks: Tracks, candidates: Sequence[str]) -> str | None:
    moments = {}
    for candidate in candidates:
        match = re.fullmatch(rf"{_NAME} hits {_NAME}", candidate, flags=re.IGNORECASE)
        pair = [tracks.named(name) for name in match.groups()] if match else [None]
        frames = tracks.hits_of(*[n for n in pair if n is not None]) if None not in pair else []
        if frames:
            moments[candidate] = frames[0]
    return min(moments, key=lambda candidate: moments[candidate], default=None)


def _cause_of_turn(tracks: Tracks, candidates: Sequence[str], body: int, time: str) -> str | None:
    others = _named(tracks, candidates)
    hits = [
        (abs(tracks.times[t] - float(time)), other) for t, other in tracks.partners(body) if other in others
    ]
    return others[min(hits)[1]] if hits else None


def _needed(tracks: Tracks, candidates: Sequence[str], a: int, b: int, time: str) -> str | None:
    """Return who, if removed, prevents the hit; if the simulation finds several or none, who acted last before it."""
    others = _named(tracks, candidates)
    needed = [n for n in others if not hit_without(tracks, a, b, n)]
    if len(needed) == 1:
        return others[needed[0]]
    before = [
        (t, other)
        for body in (a, b)
        for t, other in tracks.partners(body)
        if other in (needed or others) and tracks.times[t] <= float(time)
    ]
    if before:
        return others[max(before)[1]]
    return others[needed[0]] if needed else None


def _counterfactual(tracks: Tracks, candidates: Sequence[str], removed: int, a: int, b: int) -> str | None:
    return "yes" if hit_without(tracks, a, b, removed) else "no"


def _next(tracks: Tracks, candidates: Sequence[str], body: int) -> str | None:
    others = {n: name for n, name in _named(tracks, candidates).items() if n != body}
    return others[next_partner(tracks, body, [*others])] if others else None


def _named(tracks: Tracks, candidates: Sequence[str]) -> dict[int, str]:
    """Map each track to the candidate that names it."""
    found = {tracks.named(candidate): candidate for candidate in candidates}
    return {n: candidate for n, candidate in found.items() if n is not None}


_RULES: tuple[tuple[str, _Rule], ...] = (
    (
        rf"Which way does {_NAME} move (over the whole clip|at the start of the clip|at the end of the clip)\?",
        _motion,
    ),
    (rf"Does {_NAME} hit {_NAME}(?: in the (first|second) half of the clip)?\?", _did_hit),
    (rf"Does {_NAME} hit {_NAME} between ([\d.]+) and ([\d.]+) s\?", _did_hit_between),
    (rf"Which digit does {_NAME} hit at ([\d.]+) s\?", _cause_of_turn),
    (r"How many times do two digits hit each other\?", _count_all),
    (rf"How many times does {_NAME} hit another digit\?", _count_hits),
    (rf"How many times does {_NAME} bounce off a wall\?", _count_bounces),
    (rf"Which digit does {_NAME} hit first\?", _first_partner),
    (r"Which of these happens first\?", _first_event),
    (rf"Which digit causes {_NAME} to change direction at ([\d.]+) s\?", _cause_of_turn),
    (rf"Which other digit causes {_NAME} to hit {_NAME} at ([\d.]+) s\?", _needed),
    (rf"If {_NAME} were not there, would {_NAME} hit {_NAME}\?", _counterfactual),
    (rf"After the clip ends, which digit will {_NAME} hit next\?", _next),
)
