"""`vot train sft`: measure, train, measure again, and publish the model with a record of the run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import on_device
from vot_kernels.train.checkpoint import folder_fingerprint, publish_folder
from vot_kernels.train.report import (
    check_eval_clips,
    command_line,
    finished,
    format_metrics,
    machine,
    progress_bar,
    write_record,
)
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.sft.stage import sft_metrics, train_sft
from vot_kernels.train.vlm.model import add_lora, count_parameters, load_vlm, save_half

OPTIONS = ("text", "steps", "batch_size", "learning_rate", "seed")
"""The settings that the command line has options for, in addition to the checkpoint."""


def run(out: Path, checkpoint: Path, settings: SftTraining, eval_clips: int = 56, device: str = "cpu") -> str:
    """Train, or resume, and write `out/model`; returns a table of held-out metrics before and after.

    `out/model` is as that of the projector stage; adapters are merged into the weights. A finished run is neither
    trained nor measured again.

    Args:
        checkpoint: the model of the projector stage.
    """
    check_eval_clips(eval_clips)
    same = {
        "settings": asdict(settings),
        "checkpoint": checkpoint.name,
        "checkpoint_fingerprint": folder_fingerprint(checkpoint),
        "eval_clips": eval_clips,
    }
    record = finished(out / "model", same)
    if record is not None:
        return format_metrics(record["metrics"], "weights")
    model, processor = load_vlm(checkpoint)
    on_device(model, device)
    metrics: dict[str, Any] = {"before": sft_metrics(model, processor, eval_clips)}
    trained: Any = add_lora(model, settings.seed) if settings.text == "lora" else model
    start = time.perf_counter()
    with progress_bar(settings.steps) as report:
        train_sft(out, trained, processor, settings, report=report)
    seconds = time.perf_counter() - start
    if settings.text == "lora":
        model = trained.merge_and_unload()
    metrics["after"] = sft_metrics(model, processor, eval_clips)
    words = (str(checkpoint), "--eval-clips", str(eval_clips))
    record = {
        "command": command_line("vot train sft", settings, OPTIONS, *words),
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
    return format_metrics(metrics, "weights")
