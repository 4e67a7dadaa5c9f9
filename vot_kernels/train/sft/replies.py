"""Replies to questions about any video: with the part of the scene graph that decides, where there is one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from vot_kernels.data.questions.question import VideoQuestion
from vot_kernels.reasoning.moments import FITS
from vot_kernels.reasoning.names import find_events, find_tracklets
from vot_kernels.reasoning.steps import kind_of
from vot_kernels.reasoning.types import Task
from vot_kernels.reasoning.verification import check
from vot_kernels.scene_graph.graph import STSG, Event, Relation, Tracklet
from vot_kernels.scene_graph.words import fold


def reply_to(question: VideoQuestion) -> str:
    """Return the reply that a model shall learn: thought and answer, or the scene graph if that is the answer.

    The thought is the part of the graph by which the verification of the reasoning steps finds the answer right, and
    why. Where there is no graph, or it does not tell, there is no thought.
    """
    if question.kind == "graph":
        return question.answer
    return f"<think>{thought(question)}</think><answer>{question.answer}</answer>"


def thought(question: VideoQuestion) -> str:
    """Return what of the question's graph decides it, and why; an empty text if nothing does."""
    found = evidence_of(question)
    return "" if found is None else f"{found.graph.to_text(every=1)}\n{found.reason}"


class Deciding(NamedTuple):
    """The part of a scene graph that decides a question, and why, as a sentence."""

    graph: STSG
    reason: str


def evidence_of(question: VideoQuestion) -> Deciding | None:
    """Return what of the question's graph decides it, None without a graph or if nothing in it does."""
    graph, asked = question.stsg, question.question
    if graph is None:
        return None
    kind = "when" if question.kind == "when" else kind_of(asked) or "open"
    named = find_tracklets(asked, graph)
    task = Task(asked, kind, "question", named, "question")
    judged = check(task, question.answer, question.candidates or (question.answer,), graph)
    if judged.verdict != "supported":
        return None
    part = _deciding(question, graph, moves=kind == "direction")
    return Deciding(part, f"{judged.reason[:1].upper()}{judged.reason[1:]}.")


def _deciding(question: VideoQuestion, graph: STSG, moves: bool) -> STSG:
    """Return what question and answer name of the graph, and the first and last box of each if motion decides."""
    text = f"{question.question} {question.answer}"
    named, kinds = find_tracklets(text, graph), find_events(text, graph.vocabulary.events)

    def decides(item: Event | Relation, ends: Sequence[str]) -> bool:
        if named and not set(named) & set(ends):
            return False
        if question.kind == "when" and question.interval is not None:
            return graph.interval(item).iou(question.interval) >= FITS
        if isinstance(item, Event):
            return item.kind in kinds
        return set(ends) <= set(named) and fold(item.predicate) in fold(text)

    events = tuple(e for e in graph.events if decides(e, e.participants))
    relations = tuple(r for r in graph.relations if decides(r, (r.subject, r.object)))
    ids = {*named, *(id for e in events for id in e.participants)}
    ids |= {id for r in relations for id in (r.subject, r.object)}
    tracklets = (t.between(0, -1) if not moves else _ends(t) for t in graph.tracklets if t.id in ids)
    return replace(graph, tracklets=tuple(tracklets), relations=relations, events=events)


def _ends(tracklet: Tracklet) -> Tracklet:
    """Return a tracklet with its first and its last box alone."""
    frames = {*tracklet.frames[:1], *tracklet.frames[-1:]}
    return replace(tracklet, boxes={k: tracklet.boxes[k] for k in frames})
