"""`vot train projector`: measure, train, measure again, and publish the model with a record of the run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT, on_device
from vot_kernels.train.checkpoint import folder_fingerprint, publish_folder
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.projector.stage import projector_metrics, train_projector
from vot_kernels.train.report import (
    check_eval_clips,
    command_line,
    finished,
    format_metrics,
    machine,
    progress_bar,
    write_record,
)
from vot_kernels.train.vlm.model import build_model, count_parameters, save_half

OPTIONS = ("language_model", "steps", "batch_size", "learning_rate", "seed")
"""The settings that the command line has options for."""


def run(
    out: Path,
    settings: ProjectorTraining,
    perception: Path,
    language_model: Path | None = None,
    eval_clips: int = 64,
    device: str = "cpu",
) -> str:
    """Train, or resume, and write `out/model`; returns a table of held-out metrics before and after.

    `out/model` holds fp16 safetensors, the configurations, the processor and training.json: the command, the settings,
    the wall time and the metrics. A finished run is neither trained nor measured again.

    Args:
        perception: folder of the perception checkpoint whose encoder is used.
        language_model: folder of SmolLM2, where the settings ask for it.
    """
    check_eval_clips(eval_clips)
    same = {
        "settings": asdict(settings),
        "perception": perception.name,
        "perception_fingerprint": folder_fingerprint(perception),
        "eval_clips": eval_clips,
    }
    record = finished(out / "model", same)
    if record is not None:
        return format_metrics(record["metrics"], "nats per token")
    model, processor = build_model(settings.language_model, perception, settings.seed, language_model)
    on_device(model.eval(), device)
    metrics: dict[str, Any] = {"before": projector_metrics(model, processor, eval_clips)}
    start = time.perf_counter()
    with progress_bar(settings.steps) as report:
        train_projector(out, model, processor, settings, report=report)
    seconds = time.perf_counter() - start
    metrics["after"] = projector_metrics(model, processor, eval_clips)
    words = [] if perception.resolve() == BUNDLED_CHECKPOINT.resolve() else ["--checkpoint", str(perception)]
    words += ["--eval-clips", str(eval_clips)]
    record = {
        "command": command_line("vot train projector", settings, OPTIONS, *words),
        **same,
        "trained": list(settings.parts),
        "training_seconds": round(seconds),
        **machine(),
        "parameters": count_parameters(model),
        "metrics": metrics,
    }
    with publish_folder(out / "model") as draft:
        save_half(model, processor, draft)
        write_record(draft, record)
    return format_metrics(metrics, "nats per token")
