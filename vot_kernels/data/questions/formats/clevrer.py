"""CLEVRER (Yi et al. 2020): a JSON list of videos with their questions.

    [{"scene_index": 1, "video_filename": "video_00001.mp4", "questions": [
        {"question_id": 0, "question_type": "descriptive", "question": "…", "program": […], "answer": "2"},
        {"question_id": 1, "question_type": "predictive", "question": "…", "program": […],
         "choices": [{"choice_id": 0, "choice": "…", "program": […], "answer": "correct"}, …]}]}]

Of the choices of a predictive question one is correct, so that they are candidates. Of the others any number may be,
and they are judged one by one: each becomes a question of its own, with the candidates yes and no.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Given, read_json, text, value

_JUDGED = {"correct": "yes", "wrong": "no"}


def records(path: Path) -> list[tuple[str, tuple[Any, Any]]]:
    """Return the questions of the file, each with its video."""
    found: list[tuple[str, tuple[Any, Any]]] = []
    for n, scene in enumerate(read_json(path, list), 1):
        asked = scene.get("questions") if isinstance(scene, dict) else None
        if not isinstance(asked, list):
            found.append((f"video {n}", (scene, None)))
            continue
        found += [(f"video {n}, question {k}", (scene, question)) for k, question in enumerate(asked, 1)]
    return found


def questions(pair: tuple[Any, Any], given: Given) -> Iterator[dict[str, Any]]:
    """Yield a question, or one for each choice."""
    scene, question = pair
    if question is None:
        value(scene, "questions", list)
    name = text(scene, "video_filename")
    kind = text(question, "question_type")
    common = {
        "id": f"{text(scene, 'scene_index')}_{text(question, 'question_id')}",
        "video": given.video(name),
        "question": text(question, "question"),
    }
    if kind == "descriptive":
        yield common | {"answer": text(question, "answer")}
        return
    choices = [(text(choice, "choice"), _judged(choice)) for choice in value(question, "choices", list)]
    if kind == "predictive":
        right = [choice for choice, said in choices if said == "yes"]
        if len(right) != 1:
            raise ValueError(f"One choice of a predictive question must be correct, got {len(right)}.")
        yield common | {"answer": right[0], "candidates": [choice for choice, _ in choices]}
    elif kind in ("explanatory", "counterfactual"):
        for n, (choice, said) in enumerate(choices):
            yield common | {
                "id": f"{common['id']}_{n}",
                "question": f"{common['question']} Is this right: {choice}?",
                "answer": said,
                "candidates": ["yes", "no"],
            }
    else:
        raise ValueError(f'"question_type" must be one of CLEVRER\'s four, got {kind!r}.')


def _judged(choice: Any) -> str:
    said = text(choice, "answer")
    if said not in _JUDGED:
        raise ValueError(f'"answer" of a choice must be correct or wrong, got {said!r}.')
    return _JUDGED[said]
