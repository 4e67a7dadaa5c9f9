"""Temporal localisation on held-out DigitWorld clips: questions of when, and how well the intervals fit."""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.localisation import (
    INTERVAL_BASELINES,
    baseline_intervals,
    interval_by_rules,
    localisation_scores,
)
from vot_kernels.data.digitworld.question_sets import AskedEpisode, generate_questions
from vot_kernels.data.digitworld.questions import MOMENT_FORMS, TIMED_KINDS
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import Detection
from vot_kernels.pipelines.asking import Row, aligned, answer_rows, looked_at, looked_note
from vot_kernels.reasoning.llm import LanguageModel
from vot_kernels.reasoning.moments import answer_interval
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.types import Answer, Switches
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.watching.perception import domain_warning

LOCALISERS = {
    "vot": "language model + VoT",
    "vot_unverified": "the same, before verification",
    "direct": "language model direct",
    "rules": "rules on the seen STSG",
    "rules_truth": "rules on the true STSG",
}
_TRAIN_QUESTIONS = 480


def evaluate_localisation(
    perception: VotPerceptionModel,
    processor: VotImageProcessor,
    model: LanguageModel | None,
    videos: int,
    seed: int,
    rows_file: str | os.PathLike[str],
    only: Collection[str] = ("rules", "blind"),
    *,
    answering: Row,
) -> dict[str, Any]:
    """Ask one balanced question of when about each of `videos` held-out clips, resumed from `rows_file`.

    The forms of the question, and the thirds of the clip in which the answer lies, are equally frequent. The language
    model chooses among the moments of the graph, and verification checks its choice. The baselines are blind: the
    whole clip, its middle third, the mean interval of training questions of the same form, and the rules on frames
    in random order.

    Args:
        model: the language model; None leaves it out.
        only: what else answers, "rules" and "blind".
        answering: settings that say who answers; rows of others are not resumed.

    Returns:
        "settings", and "scores": mean temporal IoU and R@0.5 per system and form, no answer counting as 0.
    """
    asked = generate_questions("test", videos, kinds=TIMED_KINDS, seed=seed)
    settings = {"videos": videos, "seed": seed, **answering, **looked_at(asked)}

    def answer(item: AskedEpisode, frames: np.ndarray, seen: Detection) -> Row:
        return _answer(model, "rules" in only, item, seen)

    rows = answer_rows(perception, processor, asked, settings, rows_file, answer)
    questions = [item.question for item in asked]
    systems = [name for name in LOCALISERS if name in rows[0]["answers"]]
    answers = {name: [_interval(row["answers"][name]) for row in rows] for name in systems}
    if "blind" in only:
        train = generate_questions("train", _TRAIN_QUESTIONS, kinds=TIMED_KINDS, seed=seed)
        graphs = [STSG.from_dict(row["stsg"]) for row in rows]
        blind = baseline_intervals([item.question for item in train], questions, graphs, seed=seed)
        answers |= {name: list(blind[name]) for name in INTERVAL_BASELINES}
    return {
        "settings": settings,
        "scores": {name: localisation_scores(questions, given) for name, given in answers.items()},
        "seconds_per_question": sum(row["seconds"] for row in rows) / len(rows),
    }


def format_localisation(result: dict[str, Any]) -> str:
    """Format the scores as a plain table in per cent: mIoU and R@0.5 per form of question."""
    columns = [*MOMENT_FORMS, "all"]
    lines = [["when: mIoU / R@0.5", *columns]]
    for name, scores in result["scores"].items():
        cells = [_cell(scores[column]) if column in scores else "–" for column in columns]
        lines.append([localiser_title(name), *cells])
    return "\n".join([*aligned(lines), *looked_note(result["settings"])])


def localiser_title(name: str) -> str:
    return LOCALISERS.get(name, f"blind: {name.replace('_', ' ')}")


def _cell(scores: dict[str, float]) -> str:
    return f"{100 * scores['miou']:.0f} / {100 * scores['r50']:.0f}"


def _answer(model: LanguageModel | None, rules: bool, item: AskedEpisode, seen: Detection) -> Row:
    text = item.question.text
    row: Row = {"episode": item.episode.name, "question": asdict(item.question), "seconds": 0.0}
    answers: Row = {}
    if model is not None:
        row |= _think(model, text, seen, answers)
    if rules:
        answers["rules"] = _ends(interval_by_rules(text, seen.stsg))
        answers["rules_truth"] = _ends(interval_by_rules(text, item.episode.stsg))
    return {**row, "answers": answers, "stsg": seen.stsg.to_dict()}


def _think(model: LanguageModel, text: str, seen: Detection, answers: Row) -> Row:
    """Answer with the language model, with and without the five steps; return what verification did."""
    warning = domain_warning(seen)
    vot = VideoOfThought(model).run(text, None, seen.stsg, domain_warning=warning)
    direct = VideoOfThought(model, Switches.all_off()).run(text, None, seen.stsg, domain_warning=warning)
    answers |= {
        "vot": _ends(vot.interval),
        "vot_unverified": _ends(_before(vot, seen.stsg)),
        "direct": _ends(direct.interval),
    }
    return {
        "decided_by": vot.decided_by,
        "verification": vot.verification,
        "confidence": vot.confidence,
        "seconds": vot.seconds,
    }


def _before(answer: Answer, stsg: STSG) -> Interval | None:
    choice = answer.choice_before
    return None if choice is None else answer_interval(answer.question, choice, (), stsg)


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.start_s, interval.end_s]


def _interval(ends: Sequence[float] | None) -> Interval | None:
    return None if ends is None else Interval(*ends)
