"""Accuracy on held-out DigitWorld questions: each part alone, together, and the blind baselines."""

import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.baselines import BASELINES, accuracy_by_kind, baseline_answers
from vot_kernels.data.digitworld.physics import Physics
from vot_kernels.data.digitworld.question_sets import AskedEpisode, generate_questions
from vot_kernels.data.digitworld.questions import KINDS, Question
from vot_kernels.data.digitworld.rules import answer_by_rules
from vot_kernels.data.digitworld.scene import SPLITS
from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.files import atomic_write, check_output
from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.perception.reading import Detection
from vot_kernels.pipelines.asking import aligned, answer_rows, looked_at, looked_note, named
from vot_kernels.pipelines.calibration import MIN_QUESTIONS, answered, calibration_errors
from vot_kernels.pipelines.localisation import evaluate_localisation, format_localisation
from vot_kernels.pipelines.video_qa import load_language_model, load_perception
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModel, as_language_model
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.steps import Recorder, define_task
from vot_kernels.reasoning.types import Switches
from vot_kernels.reasoning.verification import check
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.train.rewards.agreement import event_iou, track_iou, triplets_found
from vot_kernels.train.rewards.reading import read
from vot_kernels.train.vlm.answers import Asked, replies
from vot_kernels.train.vlm.conversations import Clip
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.watching.perception import domain_warning

SYSTEMS = {
    "vlm_verified": "our VLM, verified",
    "vlm": "our VLM",
    "vlm_truth": "our VLM with the true STSG",
    "vot": "language model + VoT",
    "vot_unverified": "the same, before verification",
    "direct": "language model direct",
    "rules": "rules on the seen STSG",
    "rules_truth": "rules on the true STSG",
}
GROUPS = ("vlm", "llm", "rules", "blind")
"""The systems by what they need: a video-language model, a language model, the rules, nothing of the clip."""
_TRAIN_QUESTIONS = 1400


def evaluate_digitworld(
    out: str | os.PathLike[str],
    videos: int = 300,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    llm: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    *,
    vlm: str | os.PathLike[str] | None = None,
    only: Collection[str] = GROUPS,
    when: int = 0,
    split: str = "test",
) -> dict[str, Any]:
    """Answer one balanced question about each of `videos` held-out clips, which all pass through H.264.

    Each answer is at once appended to a file named like `out` with the suffix .rows.jsonl, from which an interrupted
    run is resumed. "Language model direct" reads the whole graph and takes the most likely candidate. "Before
    verification" shows what step 5 fixed and broke. "Our VLM" reads frames, the tokens of the seen graph and its events
    as text, and writes its thought and answer; what is no candidate counts as wrong. "Verified" is its answer after
    step 5, and "with the true STSG" what it answers where perception made no error.

    Args:
        vlm: folder of a video-language checkpoint, as the stage sft makes it; None leaves it out.
        only: the `GROUPS` that answer; the language model takes most of the time, then the blind baselines.
        when: so many more clips get a question of when; their table is "localisation", see `evaluate_localisation`.
        split: of DigitWorld, where the clips of choice come from: one of `SPLITS` but "train".

    Returns:
        The contents of `out`: settings (who answers, each model with a fingerprint of its weights; number, size and
        rate of the frames, codec and decoder, on all of which scores depend), accuracy per system and kind (and on the
        flip subset), the counts of answers that verification fixed and broke, and how far the seen graphs agree with
        the true ones (see `vot_kernels.train.rewards.agreement`).
    """
    target = Path(out)
    check_output(target, ".json")
    check_groups(only, vlm)
    check_localisers(only, when)
    check_split(split)
    if min(videos, when) < 0 or videos + when == 0:
        raise ValueError(f"There must be videos to ask about, got {videos} of choice and {when} of when.")
    perception, processor = load_perception(checkpoint, device)
    model = load_language_model(llm, device) if "llm" in only else None
    reader = _Reader(Path(vlm), device) if vlm is not None and "vlm" in only else None
    answering = {
        "checkpoint": named(perception.config.name_or_path or "", perception),
        **({} if model is None else {"llm": _name(model, llm)}),
        **({} if set(GROUPS) <= {*only} else {"only": [group for group in GROUPS if group in only]}),
    }
    result: dict[str, Any] = {}
    if videos:
        asked = generate_questions(split, videos, seed=seed)
        settings = {
            "videos": videos,
            "seed": seed,
            **({} if split == "test" else {"split": split}),
            **answering,
            **({} if reader is None else {"vlm": reader.name}),
            **looked_at(asked),
        }

        def answer(item: AskedEpisode, frames: np.ndarray, seen: Detection) -> dict[str, Any]:
            return _answer(model, reader, "rules" in only, item, frames, seen)

        rows = answer_rows(perception, processor, asked, settings, target.with_suffix(".rows.jsonl"), answer)
        result = {"settings": settings, **_summarise(asked, rows, seed, "blind" in only)}
    if when:
        rows_file = target.with_suffix(".when.jsonl")
        result["localisation"] = evaluate_localisation(
            perception, processor, model, when, seed, rows_file, only, answering=answering
        )
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def check_groups(only: Collection[str], vlm: str | os.PathLike[str] | None) -> None:
    """Refuse groups that do not exist, none at all, or the video-language model alone without its folder.

    Raises:
        ValueError: says which.
    """
    unknown = [group for group in only if group not in GROUPS]
    if unknown or not only:
        raise ValueError(f"only must be some of {', '.join(GROUPS)}, got {', '.join(only) or 'none'}.")
    if vlm is None and set(only) == {"vlm"}:
        raise ValueError("The video-language model answers alone, but its folder is not given.")


def check_localisers(only: Collection[str], when: int) -> None:
    """Refuse questions of when that nobody of `only` answers: the video-language model does not.

    Raises:
        ValueError: there are some.
    """
    answering = [group for group in GROUPS if group != "vlm"]
    if when and not {*answering} & {*only}:
        raise ValueError(
            f"The video-language model does not answer questions of when: ask none, or let one of "
            f"{', '.join(answering)} answer, too."
        )


def check_split(split: str) -> None:
    """Refuse clips that a model has learnt from, and splits that do not exist.

    Raises:
        ValueError: says which splits there are.
    """
    held_out = [name for name in SPLITS if name != "train"]
    if split not in held_out:
        raise ValueError(f"split must be one of {', '.join(held_out)}, got {split!r}.")


def format_table(result: dict[str, Any]) -> str:
    """Format the accuracies as plain tables in per cent, one row per system, one column per kind, and the settings."""
    parts = [_choice_table(result)] if "accuracy" in result else []
    if "localisation" in result:
        parts.append(format_localisation(result["localisation"]))
    return "\n\n".join(parts)


def _choice_table(result: dict[str, Any]) -> str:
    columns = [*KINDS, "flip", "all"]
    lines = [["system", *columns]]
    for name, accuracy in result["accuracy"].items():
        title = SYSTEMS.get(name, f"blind: {name.replace('_', ' ')}")
        lines.append([title, *(f"{100 * accuracy[c]:.0f}" if c in accuracy else "–" for c in columns)])
    notes = looked_note(result["settings"])
    if "scene_graph" in result:
        found = {name: f"{100 * value:.1f}" for name, value in result["scene_graph"].items()}
        notes.insert(
            0,
            f"Seen graphs have {found['triplet_recall']} per cent of the true triplets; IoU with the true ones is "
            f"{found['track_iou']} per cent of tracks and {found['event_iou']} of events.",
        )
    if "vlm_format" in result:
        whole, valid = (f"{100 * result[name]:.0f}" for name in ("vlm_format", "vlm_parse_valid"))
        notes.insert(
            0,
            f"Of our VLM's replies {whole} per cent are a thought and an answer, and {valid} per cent state a graph "
            "without a fault.",
        )
    if "verification" in result:
        fixed, broke = result["verification"]["fixed"], result["verification"]["broke"]
        notes.insert(0, f"Verification fixed {fixed} answers and broke {broke}.")
    if "calibration" in result:
        raw, calibrated = (100 * result["calibration"][name] for name in ("raw", "calibrated"))
        notes.insert(1, f"Expected calibration error: {raw:.1f} per cent raw, {calibrated:.1f} calibrated.")
    return "\n".join([*aligned(lines), *notes])


def _name(model: LanguageModel, folder: str | os.PathLike[str] | None) -> str:
    """Return the name of a language model; one from a folder can have other weights under the same name."""
    if folder is None or not isinstance(model, HFLanguageModel):
        return model.name
    return named(model.name, model.model)


class _Reader:
    """A video-language model that answers from frames and a graph of them."""

    def __init__(self, folder: Path, device: str) -> None:
        model, self.processor = load_vlm(folder)
        self.model = on_device(model, device)
        self.name = named(folder.name, model)

    def answer(
        self, item: AskedEpisode, frames: np.ndarray, graphs: Sequence[STSG]
    ) -> tuple[list[str], list[str], float]:
        """Return the reply with each graph, the answer in it, or "" if it has none, and the seconds of one reply."""
        start = time.perf_counter()
        clip, question = Clip(frames, item.episode.times), item.question
        asked = [Asked(clip, graph, question.text, question.candidates) for graph in graphs]
        told = list(replies(self.model, self.processor, asked))
        read = [read_reply(reply) for reply in told]
        seconds = (time.perf_counter() - start) / len(graphs)
        return told, [pair[1] if pair else "" for pair in read], seconds


def _answer(
    model: LanguageModel | None,
    reader: _Reader | None,
    rules: bool,
    item: AskedEpisode,
    frames: np.ndarray,
    seen: Detection,
) -> dict[str, Any]:
    question = item.question
    answers: dict[str, str] = {}
    if rules:
        answers["rules"] = answer_by_rules(question, seen.stsg)
        answers["rules_truth"] = answer_by_rules(question, item.episode.stsg)
    row: dict[str, Any] = {"episode": item.episode.name, "question": asdict(question), "answers": answers}
    seconds: dict[str, float] = {}
    if model is not None:
        row |= _think(model, item, seen, answers, seconds)
    if reader is not None:
        told, read, seconds["vlm"] = reader.answer(item, frames, [seen.stsg, item.episode.stsg])
        answers["vlm"], answers["vlm_truth"] = read
        answers["vlm_verified"] = _verified(question, read[0], seen)
        row["reply"] = told[0]
    return {**row, "in_domain": seen.in_domain, "seconds": seconds, "stsg": seen.stsg.to_dict()}


def _verified(question: Question, answer: str, seen: Detection) -> str:
    """Return the answer, or where the seen graph contradicts it the first candidate that it does not contradict.

    An answer that is no candidate counts as contradicted; if all are, the answer stays.
    """
    silent = Recorder(as_language_model(lambda prompt: ""))
    task = define_task(silent, question.text, seen.stsg)
    others = [candidate for candidate in question.candidates if candidate != answer]
    for text in ([answer] if answer in question.candidates else []) + others:
        if check(task, text, question.candidates, seen.stsg, Physics()).verdict != "contradicted":
            return text
    return answer


def _think(
    model: LanguageModel,
    item: AskedEpisode,
    seen: Detection,
    answers: dict[str, str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Answer with the language model, with and without the five steps; return what verification did."""
    question, warning = item.question, domain_warning(seen)
    vot = VideoOfThought(model, world=Physics()).run(
        question.text, question.candidates, seen.stsg, domain_warning=warning
    )
    direct = VideoOfThought(model, Switches.all_off()).run(
        question.text, question.candidates, seen.stsg, domain_warning=warning
    )
    answers |= {
        "vot": vot.choice or "",
        "vot_unverified": vot.choice_before or "",
        "direct": direct.choice or "",
    }
    seconds |= {"vot": vot.seconds, "direct": direct.seconds}
    return {
        "decided_by": vot.decided_by,
        "verification": vot.verification,
        "confidence": vot.confidence,
    }


def _summarise(
    asked: Sequence[AskedEpisode], rows: Sequence[dict[str, Any]], seed: int, blind: bool
) -> dict[str, Any]:
    questions = [item.question for item in asked]
    systems = [name for name in SYSTEMS if name in rows[0]["answers"]]
    answers: dict[str, list[str]] = {name: [row["answers"][name] for row in rows] for name in systems}
    if blind:
        train = [item.question for item in generate_questions("train", _TRAIN_QUESTIONS, seed=seed)]
        graphs = [STSG.from_dict(row["stsg"]) for row in rows]
        guesses = baseline_answers(train, questions, graphs, seed=seed)
        answers |= {name: guesses[name] for name in BASELINES}
    result: dict[str, Any] = {
        "accuracy": {name: accuracy_by_kind(questions, given) for name, given in answers.items()}
    }
    if "vot" in answers:
        result["verification"] = _verification(questions, answers)
        confidences, right = answered(rows)
        if len(right) >= 2 * MIN_QUESTIONS:
            result["calibration"] = calibration_errors(confidences, right)
    if "vlm" in answers:
        result["vlm_format"] = sum(read_reply(row["reply"]) is not None for row in rows) / len(rows)
        result["vlm_parse_valid"] = sum(_states_a_graph(row) for row in rows) / len(rows)
    return {
        **result,
        "scene_graph": _agreement(asked, rows),
        "seconds_per_question": {
            name: sum(row["seconds"][name] for row in rows) / len(rows) for name in rows[0]["seconds"]
        },
        "in_domain": sum(row["in_domain"] for row in rows) / len(rows),
    }


def _states_a_graph(row: dict[str, Any]) -> bool:
    """Whether the reply states tracks that exist in a graph of this world, all of it in the text form."""
    seen = STSG.from_dict(row["stsg"])
    stated = read(row["reply"], seen.vocabulary, seen.frame_times_s)
    return stated is not None and not stated.issues and bool(stated.graph.tracklets)


def _agreement(asked: Sequence[AskedEpisode], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the recall of triplets over all clips, and the means over clips of the IoU of tracks and events."""
    pairs = [(STSG.from_dict(row["stsg"]), item.episode.stsg) for row, item in zip(rows, asked, strict=True)]
    found, total = (sum(counts) for counts in zip(*(triplets_found(*pair) for pair in pairs), strict=True))
    return {
        "triplet_recall": found / max(1, total),
        "track_iou": sum(track_iou(*pair) for pair in pairs) / len(pairs),
        "event_iou": sum(event_iou(*pair) for pair in pairs) / len(pairs),
    }


def _verification(questions: Sequence[Question], answers: dict[str, list[str]]) -> dict[str, int]:
    """Count the answers that verification fixed and broke."""
    right = {
        name: [given == q.answer for given, q in zip(answers[name], questions, strict=True)]
        for name in ("vot", "vot_unverified")
    }
    changes = list(zip(right["vot_unverified"], right["vot"], strict=True))
    return {"fixed": changes.count((False, True)), "broke": changes.count((True, False))}
