"""Video-of-Thought traces from ground truth: the part of the graph that decides a question, a thought, the answer.

<think>The red digit is o1, the blue digit is o2.
<stsg>
o1=red digit 3
o2=blue digit 7
o1 hits o2 @6
</stsg>
The red digit hits the blue digit at 0.8 s.</think><answer>yes</answer>

First it says which tracks the question and its candidates mention. The graph begins with them, then come events, then
who else takes part in these. So each word follows from the prompt and the words before in one step: who writes it never
has to guess ahead.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vot_kernels.data.digitworld.questions import Question
from vot_kernels.scene_graph.graph import STSG, Event
from vot_kernels.scene_graph.text import grid_cell

_REPLY = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_NAME = re.compile(r"the (\w+) digit")
_TIME = re.compile(r"at ([\d.]+) s")


def write_trace(question: Question, stsg: STSG, *, short: bool = False) -> str:
    """Return the reply to a question whose answer is known, from the true graph of its clip.

    Args:
        question: the question.
        stsg: the true graph.
        short: conclude from the evidence at once, without comparing sides of boxes, times, or hits before others.
    """
    seen = evidence(question, stsg, short=short)
    thought = _sentence((_conclusion if short else _thought)(question, seen, stsg))
    who = _who(question, stsg)
    return f"<think>{who}{evidence_text(seen, question)}\n{thought}</think><answer>{question.answer}</answer>"


def read_reply(reply: str) -> tuple[str, str] | None:
    """Return thought and answer of a reply; None if it is not `<think>…</think><answer>…</answer>` as a whole."""
    match = _REPLY.fullmatch(reply)
    return (match[1].strip(), match[2].strip()) if match else None


def ask(text: str, candidates: Sequence[str] | None = None) -> str:
    """Return a question as the model reads it."""
    return f"Question: {text}" + (f"\nAnswers: {' | '.join(candidates)}" if candidates else "")


def summary_text(stsg: STSG) -> str:
    """Return the tracklets and events of a graph as text, without boxes and relations."""
    return stsg.to_text(boxes=False, relations=False)


def evidence_text(seen: STSG, question: Question) -> str:
    """Return what `evidence` returned as text: what the question mentions, events, then who else takes part in them.

    Each of its boxes is written.
    """
    start, *lines, end = seen.to_text(every=1, relations=False).split("\n")
    named, tracks = len(_mentioned(question, seen)), len(seen.tracklets)
    return "\n".join([start, *lines[:named], *lines[tracks:], *lines[named:tracks], end])


def evidence(question: Question, stsg: STSG, *, short: bool = False) -> STSG:
    """Return what of the graph decides the question: a few tracklets, their events, and boxes where motion decides.

    short: of several hits of which one is the nearest to a time, return that one alone.
    """
    events = _events(question, stsg)
    if short and question.kind == "causal" and question.cell == "turn":
        events = [_nearest(question, events, stsg)]
    frames = _frames(question, stsg)
    taking_part = [id for event in events for id in event.participants]
    ids = dict.fromkeys([*_mentioned(question, stsg), *taking_part])
    tracks = [stsg.tracklet(id) for id in ids]
    tracklets = tuple(replace(t, boxes={k: box for k, box in t.boxes.items() if k in frames}) for t in tracks)
    return replace(stsg, tracklets=tracklets, relations=(), events=tuple(events))


def _mentioned(question: Question, stsg: STSG) -> list[str]:
    """Return the tracks that a question, and then its candidates, name."""
    return list(dict.fromkeys([*question.objects, *_tracks(" ".join(question.candidates), stsg)]))


def _who(question: Question, stsg: STSG) -> str:
    """Return which tracks those are that are mentioned, in a line; "" if none is."""
    names = [f"{_named(id, stsg)} is {id}" for id in _mentioned(question, stsg)]
    return f"{_sentence(', '.join(names))}\n" if names else ""


def _events(question: Question, stsg: STSG) -> list[Event]:
    """Return the events that decide the question, by time."""
    hits = [event for event in stsg.events if event.kind == "hits"]
    objects = set(question.objects)
    match question.kind:
        case "did_hit":
            return [hit for hit in hits if objects == set(hit.participants)]
        case "count" if question.cell.startswith("all hits"):
            return hits
        case "count" if question.cell.startswith("bounces"):
            return [e for e in stsg.events if e.kind == "bounces" and objects <= set(e.participants)]
        case "which_first" if not objects:
            pairs = [set(_tracks(candidate, stsg)) for candidate in question.candidates]
            return [hit for hit in hits if set(hit.participants) in pairs]
        case "causal" if question.cell != "turn":
            time = _asked_time(question.text)
            return [hit for hit in hits if stsg.frame_times_s[hit.t] <= time + 0.1]
        case "count" | "which_first" | "causal":
            return _of(hits, objects)
        case "counterfactual":
            removed, *pair = question.objects
            return [hit for hit in hits if removed in hit.participants or set(pair) == set(hit.participants)]
    return []


def _frames(question: Question, stsg: STSG) -> set[int]:
    """Return the frames whose boxes decide the question."""
    last, quarter = stsg.num_frames - 1, -(-stsg.num_frames // 4)
    match question.kind, question.cell.split(":")[0]:
        case "motion", "start":
            return {0, quarter - 1}
        case ("motion", "end") | ("next", _):
            return {last - quarter + 1, last}
        case "motion", _:
            return {0, last}
    return set()


def _thought(question: Question, seen: STSG, stsg: STSG) -> str:
    """Return why the answer is right, in one sentence: what the graph says, compared, then what follows from it."""
    conclusion = _conclusion(question, seen, stsg)
    match question.kind:
        case "motion":
            return f"{_moved(question, seen)}, so {conclusion}"
        case "count":
            moments = [f"{_told(event, seen)} ({n})" for n, event in enumerate(seen.events, 1)]
            return f"{', '.join(moments) or 'it never happens'}: {question.answer}"
        case "causal" if question.cell == "turn":
            nearest = _nearest(question, seen.events, seen)
            return f"nearest to {_asked_time(question.text):.1f} s, {_told(nearest, seen)}"
        case "causal":
            return f"{_facts(question.answer, question.objects, seen)}; {conclusion}"
        case "counterfactual":
            return f"{_facts(_named(question.objects[0], stsg), question.objects[1:], seen)}; {conclusion}"
    return conclusion


def _conclusion(question: Question, seen: STSG, stsg: STSG) -> str:
    """Return what follows from the evidence."""
    names = [_named(id, stsg) for id in question.objects]
    moments = [_told(event, seen) for event in seen.events]
    match question.kind:
        case "motion":
            part = question.text.removesuffix("?").split(" move ")[1]
            return f"{names[0]} moves {question.answer} {part}"
        case "did_hit":
            told = ", and ".join(moments) or f"{names[0]} never hits {names[1]}"
            half = re.search(r"in the (first|second) half", question.text)
            middle = (stsg.frame_times_s[0] + stsg.frame_times_s[-1]) / 2
            return told + (f"; the {half[1]} half {_span(half[1], middle)}" if half and moments else "")
        case "count":
            return f"{', '.join(moments) or 'it never happens'}: {question.answer}"
        case "which_first":
            return ", then ".join(moments)
        case "causal" if question.cell == "turn":
            return moments[0]
        case "causal":
            return f"without {question.answer}, {names[0]} would not hit {names[1]}"
        case "counterfactual":
            would = "would" if question.answer == "yes" else "would not"
            return f"without {names[0]}, {names[1]} {would} hit {names[2]}"
    return f"{names[0]} moves towards {question.answer}"


def _moved(question: Question, seen: STSG) -> str:
    """Return from where to where a side of the box goes, across which the answer is one of two directions."""
    boxes = [box for box, _ in seen.tracklet(question.objects[0]).boxes.values()]
    side, edge = ("left edge", 0) if question.answer in ("left", "right") else ("top", 1)
    start, end = (grid_cell(boxes[n][edge]) for n in (0, -1))
    return f"its {side} is at {start}, then {end}"


def _facts(actor: str, pair: Sequence[str], seen: STSG) -> str:
    """Return whether two hit each other, and the first hits that others gave to either until then."""
    together = [hit for hit in seen.events if set(hit.participants) == set(pair)]
    end = together[0].t if together else seen.num_frames
    others = [hit for hit in _of(seen.events, set(pair)) if hit not in together and hit.t <= end]
    first = {frozenset(hit.participants): _told(hit, seen) for hit in reversed(others)}
    told = _told(together[0], seen) if together else " never hits ".join(_named(id, seen) for id in pair)
    until = "before that" if together else "meanwhile"
    return f"{told}; {until}, {', then '.join(reversed(first.values())) or f'{actor} hits neither'}"


def _nearest(question: Question, events: Sequence[Event], stsg: STSG) -> Event:
    """Return the event that is nearest to the time in the question."""
    time = _asked_time(question.text)
    return min(events, key=lambda event: abs(stsg.frame_times_s[event.t] - time))


def _of(events: Iterable[Event], objects: set[str]) -> list[Event]:
    return [event for event in events if objects & set(event.participants)]


def _tracks(text: str, stsg: STSG) -> list[str]:
    """Return the tracks that a text names by their colour."""
    colours = _NAME.findall(text)
    return [t.id for colour in colours for t in stsg.tracklets if colour in t.attributes]


def _named(id: str, stsg: STSG) -> str:
    return f"the {stsg.tracklet(id).attributes[0]} digit"


def _told(event: Event, stsg: STSG) -> str:
    actor, *others = (_named(id, stsg) for id in event.participants)
    return f"{' '.join([actor, event.kind, *others])} at {stsg.frame_times_s[event.t]:.1f} s"


def _span(half: str, middle: float) -> str:
    return f"ends at {middle:.1f} s" if half == "first" else f"begins at {middle:.1f} s"


def _asked_time(text: str) -> float:
    match = _TIME.search(text)
    return float(match[1]) if match else 0.0


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
