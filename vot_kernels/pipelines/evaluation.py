"""Accuracy on held-out DigitWorld questions: each part alone, together, and the blind baselines."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vot_kernels.data.digitworld.baselines import BASELINES, accuracy_by_kind, baseline_answers
from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.question_sets import AskedEpisode, generate_questions
from vot_kernels.data.digitworld.questions import KINDS
from vot_kernels.data.digitworld.rules import answer_by_rules
from vot_kernels.files import append_json_lines, atomic_write, check_output, read_json_lines
from vot_kernels.models.perception.reading import Detection, detect
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.video_qa import load_language_model, load_perception
from vot_kernels.reasoning.llm import LanguageModel
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.types import Switches
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.watching.perception import domain_warning

SYSTEMS = {
    "vot": "language model + VoT",
    "vot_unverified": "the same, before verification",
    "direct": "language model direct",
    "rules": "rules on the seen STSG",
    "rules_truth": "rules on the true STSG",
}
LOOKED_AT = ("frames", "frame_size", "fps", "codec", "decoder")
_TRAIN_QUESTIONS = 1400
_CRF = 23


def evaluate_digitworld(
    out: str | os.PathLike[str],
    videos: int = 300,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    llm: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Answer one balanced question about each of `videos` held-out clips, which all pass through H.264.

    Each answer is at once appended to a file named like `out` with the suffix .rows.jsonl, from which an interrupted
    run is resumed. "Language model direct" reads the whole graph and takes the most likely candidate. "Before
    verification" shows what step 5 fixed and broke.

    Returns:
        The contents of `out`: settings (number, size and rate of the frames, codec and decoder, on all of which scores
        depend), accuracy per system and kind (and on the flip subset), and the counts of answers that verification
        fixed and broke.
    """
    target = Path(out)
    check_output(target, ".json")
    asked = generate_questions("test", videos, seed=seed)
    perception, processor = load_perception(checkpoint, device)
    model = load_language_model(llm, device)
    settings = {
        "videos": videos,
        "seed": seed,
        "checkpoint": perception.config.name_or_path,
        "llm": model.name,
        **_looked_at(asked),
    }
    rows_file = target.with_suffix(".rows.jsonl")
    rows = _read_rows(rows_file, settings)
    with append_json_lines(rows_file) as append:
        if not rows_file.stat().st_size:
            append({"settings": settings})
        for item in track(asked[len(rows) :], "Asking", done=len(rows)):
            frames = h264_roundtrip(item.episode.frames(), _CRF)
            (seen,) = detect(perception, processor, [frames], [item.episode.times], item.episode.name)
            rows.append(_answer(model, item, seen))
            append(rows[-1])
    result = {"settings": settings, **_summarise(asked, rows, seed)}
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def format_table(result: dict[str, Any]) -> str:
    """Format the accuracies as a plain table in per cent, one row per system, one column per kind, and the settings."""
    columns = [*KINDS, "flip", "all"]
    lines = [["system", *columns]]
    for name, accuracy in result["accuracy"].items():
        title = SYSTEMS.get(name, f"blind: {name.replace('_', ' ')}")
        lines.append([title, *(f"{100 * accuracy[c]:.0f}" if c in accuracy else "–" for c in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    fixed, broke = result["verification"]["fixed"], result["verification"]["broke"]
    names = [
        name for name in LOOKED_AT if name in result["settings"]
    ]  # results of an older version lack them
    looked = "; ".join(f"{name.replace('_', ' ')} {result['settings'][name]}" for name in names)
    notes = [f"Verification fixed {fixed} answers and broke {broke}."] + [f"Looked at: {looked}."] * bool(
        looked
    )
    return "\n".join([*rows, *notes])


def _looked_at(asked: Sequence[AskedEpisode]) -> dict[str, str]:
    """Describe what of the clips reaches the model. Other frames, or another decoder, give other scores."""
    import av

    scenes = [item.episode.scene for item in asked]
    return {
        "frames": _span(scene.num_frames for scene in scenes),
        "frame_size": _span(f"{scene.size[1]} × {scene.size[0]}" for scene in scenes),
        "fps": _span(f"{scene.fps:g}" for scene in scenes),
        "codec": f"H.264, crf {_CRF}, yuv420p",
        "decoder": f"PyAV {av.__version__}",
    }


def _span(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _answer(model: LanguageModel, item: AskedEpisode, seen: Detection) -> dict[str, Any]:
    question, warning = item.question, domain_warning(seen)
    vot = VideoOfThought(model).run(question.text, question.candidates, seen.stsg, domain_warning=warning)
    direct = VideoOfThought(model, Switches.all_off()).run(
        question.text, question.candidates, seen.stsg, domain_warning=warning
    )
    return {
        "episode": item.episode.name,
        "question": asdict(question),
        "answers": {
            "vot": vot.choice or "",
            "vot_unverified": vot.choice_before or "",
            "direct": direct.choice or "",
            "rules": answer_by_rules(question, seen.stsg),
            "rules_truth": answer_by_rules(question, item.episode.stsg),
        },
        "decided_by": vot.decided_by,
        "verification": vot.verification,
        "confidence": vot.confidence,
        "in_domain": seen.in_domain,
        "seconds": {"vot": vot.seconds, "direct": direct.seconds},
        "stsg": seen.stsg.to_dict(),
    }


def _summarise(asked: Sequence[AskedEpisode], rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    questions = [item.question for item in asked]
    answers: dict[str, list[str]] = {name: [row["answers"][name] for row in rows] for name in SYSTEMS}
    train = [item.question for item in generate_questions("train", _TRAIN_QUESTIONS, seed=seed)]
    graphs = [STSG.from_dict(row["stsg"]) for row in rows]
    blind = baseline_answers(train, questions, graphs, seed=seed)
    answers |= {name: blind[name] for name in BASELINES}
    right = {
        name: [given == q.answer for given, q in zip(answers[name], questions, strict=True)]
        for name in ("vot", "vot_unverified")
    }
    changes = list(zip(right["vot_unverified"], right["vot"], strict=True))
    return {
        "accuracy": {name: accuracy_by_kind(questions, given) for name, given in answers.items()},
        "verification": {"fixed": changes.count((False, True)), "broke": changes.count((True, False))},
        "seconds_per_question": {
            name: sum(row["seconds"][name] for row in rows) / len(rows) for name in ("vot", "direct")
        },
        "in_domain": sum(row["in_domain"] for row in rows) / len(rows),
    }


def _read_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier, interrupted run."""
    lines = read_json_lines(path)
    if lines and lines[0].get("settings") != settings:
        raise ValueError(
            f"{path} belongs to a run with other settings ({lines[0].get('settings')}); move it away."
        )
    return lines[1:]
