"""The prompts of the language model. They are short, because a small model on a CPU reads 600 tokens a second.

The prompts of steps 3 to 5 begin with the same `context`, so a model that keeps its cache reads it once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from vot_kernels.scene_graph.graph import STSG, Event

GraphStyle = Literal["sentences", "stsg", "both"]
MAX_PROPOSAL = 160  # characters
GRAPH_STYLES = ("sentences", "stsg", "both")
MAX_LINES = 48  # lines of one graph, so that a crowded scene fits a small model's context


def graph_text(graph: STSG, style: GraphStyle = "sentences", max_lines: int = MAX_LINES) -> str:
    """Return the graph as the model reads it: sentences with names and seconds, the STSG text form, or both."""
    parts = []
    if style in ("stsg", "both"):
        every = max(
            4, graph.num_frames // 16
        )  # a long video has about as many boxes in the text as a short one
        parts.append(_shortened(graph.to_text(every=every).splitlines(), max_lines))
    if style in ("sentences", "both"):
        parts.append(_shortened(list(_sentences(graph)), max_lines))
    return "\n".join(parts)


def context(graph_text: str, question: str) -> str:
    """Return the beginning that the prompts about one question share."""
    if not graph_text:
        return f"Question: {question}\n"
    return f"What happens in the video:\n{graph_text}\n\nQuestion: {question}\n"


def task_prompt(names: Sequence[str], question: str) -> str:
    listed = ", ".join(names[:MAX_LINES])
    return (
        f"Objects: {listed}\nQuestion: {question}\n"
        "Which of these objects is the question about? Reply with their names only."
    )


def kind_prompt(question: str, kinds: Sequence[str]) -> str:
    return f"Question: {question}\nWhich kind of question is this? Reply with one of: {', '.join(kinds)}."


def analysis_prompt(context: str) -> str:
    return f"{context}Before answering, say in one sentence what the objects in question do and why."


def propose_prompt(context: str) -> str:
    return f"{context}Answer in a few words."


def answer_prompt(context: str) -> str:
    return f"{context}Answer with the shortest possible answer."


def blind_prompt(question: str) -> str:
    """Return the prompt for the likelihood's prior: the question without the video."""
    return answer_prompt(context("", question))


def rating_prompt(context: str, analysis: str, candidate: str) -> str:
    thought = f"Thought: {analysis}\n" if analysis else ""
    request = "How likely is it right? Rate it from 1 to 10. Reply with the number."
    return f"{context}{thought}Proposed answer: {candidate}\n{request}"


def contradiction_prompt(context: str, analysis: str, answer: str) -> str:
    request = "Does the answer contradict the thought? Reply yes or no."
    return f"{context}Thought: {analysis}\nAnswer: {answer}\n{request}"


def parse_rating(text: str) -> int | None:
    """Return the first number from 1 to 10 in the model's words ("8/10" is 8), or None.

    The scale repeated ("from 1 to 10") and the number of a list's first item ("1. The …") are not ratings.
    """
    text = re.sub(r"\b1\s*(?:to|-|–)\s*10\b|^\s*1[.)]\s", " ", text)
    for number in re.findall(r"(?<![\d.])\d+(?!\d|\.\d)", text):
        if number.isascii() and 1 <= int(number[:9]) <= 10:
            return int(number)
    return None


def without_cut(text: str) -> str:
    """Return the model's words up to the last complete sentence, line or item if the token limit cut them off."""
    if not getattr(text, "cut", False):
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[。！？\n;]", text)]
    return text[: ends[-1]] if ends else ""


def parse_sentences(text: str, limit: int = 2) -> str:
    """Return the first whole sentences of the model's words, on one line; empty for text without a letter."""
    line = " ".join(without_cut(text).split())
    if not any(character.isalpha() for character in line):
        return ""
    return " ".join(re.split(r"(?<=[.!?])\s+", line)[:limit])


def parse_proposals(text: str, limit: int = 3) -> tuple[str, ...]:
    """Return short answers from the model's words: one per line or list item, without bullets and quotes.

    Items that the token limit cut off or that are longer than `MAX_PROPOSAL` characters are dropped.
    """
    proposals = []
    for line in re.split(r"[\n;]", without_cut(text)):
        item = re.sub(r"^\s*(?:[-*•]|\d+[.)]|answer\s*:)\s*", "", line, flags=re.IGNORECASE)
        item = item.strip(" \t.\"'`*")
        if len(item) <= MAX_PROPOSAL and any(character.isalnum() for character in item):
            proposals.append(item)
    return tuple(dict.fromkeys(proposals))[:limit]


def event_words(event: Event, graph: STSG) -> str:
    """Return an event in words, "red digit 3 hits blue digit 7", by its id where a participant has no tracklet."""
    names = {t.id: t.name for t in graph.tracklets}
    who = [names.get(id, id) for id in event.participants]
    return " ".join([*who[:1], event.kind, *who[1:]])


def _sentences(graph: STSG) -> Iterator[str]:
    """Yield who there is, how each moves, what happened and which relations hold, in this order of importance."""
    names = {t.id: t.name for t in graph.tracklets}
    yield "Objects: " + (", ".join(names.values()) or "none") + "."
    for event in sorted(graph.events, key=lambda event: event.t):
        yield f"{event_words(event, graph)} at {_at(graph, event.t)}."
    motions = [r for r in graph.relations if r.subject == r.object]
    others = [r for r in graph.relations if r.subject != r.object]
    for r in [*sorted(motions, key=lambda r: (r.subject, r.t0)), *sorted(others, key=lambda r: r.t0 - r.t1)]:
        object = "" if r.object == r.subject else f" {names.get(r.object, r.object)}"
        span = f"from {_at(graph, r.t0)} to {_at(graph, r.t1)}"
        yield f"{names.get(r.subject, r.subject)} {r.predicate}{object} {span}."


def _at(graph: STSG, frame: int) -> str:
    return f"{graph.frame_times_s[frame]:.1f} s" if 0 <= frame < graph.num_frames else f"frame {frame}"


def _shortened(lines: list[str], limit: int) -> str:
    if len(lines) > limit:
        lines = [*lines[:limit], f"({len(lines) - limit} more lines left out)"]
    return "\n".join(lines)
