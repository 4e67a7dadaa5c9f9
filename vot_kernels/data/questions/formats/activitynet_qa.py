"""ActivityNet-QA (Yu et al. 2019): questions and answers in two JSON files, such as val_q.json and val_a.json.

    [{"video_name": "abc", "question": "…", "question_id": "abc_1"}]
    [{"answer": "…", "type": 3, "question_id": "abc_1"}]

The videos of ActivityNet are called v_abc.mp4.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Given, read_json, text, value

_QUESTIONS, _ANSWERS = "_q.json", "_a.json"


def records(path: Path) -> list[tuple[str, tuple[Any, Any]]]:
    """Return pairs of a question and an answer; one of them is None where its partner is missing."""
    if not path.name.endswith(_QUESTIONS):
        raise ValueError(f"The questions of ActivityNet-QA are in a file *{_QUESTIONS}, got '{path}'.")
    asked = read_json(path, list)
    answers: dict[str, Any] = {}
    alone: list[tuple[str, tuple[Any, Any]]] = []
    for n, answer in enumerate(
        read_json(path.with_name(path.name.removesuffix(_QUESTIONS) + _ANSWERS), list), 1
    ):
        id = answer.get("question_id") if isinstance(answer, dict) else None
        if isinstance(id, str) and id not in answers:
            answers[id] = answer
        else:
            alone.append((f"answer {n}", (None, answer)))
    pairs = []
    for n, question in enumerate(asked, 1):
        id = question.get("question_id") if isinstance(question, dict) else None
        pairs.append((f"question {n}", (question, answers.pop(id, None) if isinstance(id, str) else None)))
    alone += [(f"answer {id!r}", (None, answer)) for id, answer in answers.items()]
    return pairs + alone


def questions(pair: tuple[Any, Any], given: Given) -> Iterator[dict[str, Any]]:
    """Yield the question of a pair."""
    question, answer = pair
    if question is None:
        id = text(answer, "question_id")
        raise ValueError(f"No question, or another answer, has the id {id!r}.")
    id, name = text(question, "question_id"), text(question, "video_name")
    if answer is None:
        raise ValueError(f"No answer has the id {id!r}, or an earlier question has it.")
    said = value(question, "question", str).strip()
    yield {
        "id": id,
        "video": given.video(name, f"v_{name}"),
        "question": said if said.endswith("?") else f"{said}?",
        "answer": text(answer, "answer"),
    }
