"""The frame of every stage of the video-language model: measure, train, measure again, and publish with a record."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
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
from vot_kernels.train.vlm.model import add_lora, count_parameters, save_half

Loader = Callable[[], tuple[VotForConditionalGeneration, VotProcessor]]


@dataclass(frozen=True)
class VlmStage:
    """What makes a stage of the video-language model.

    Attributes:
        name: as the command line has it.
        train: `train(out, model, processor, settings, report=…)` trains in place, or resumes. If the stage's parts
            include "lora", it gets the model with adapters.
        measure: `measure(model, processor, clips)` returns metrics of that many held-out clips.
        rows: what the rows of the table of metrics are, in the head of their column.
    """

    name: str
    train: Callable[..., Any]
    measure: Callable[[Any, VotProcessor, int], dict[str, float]]
    rows: str = "weights"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run begins with.

    Attributes:
        kind: what the record calls it.
        folder: of the checkpoint.
        words: how the command names it.
    """

    kind: str
    folder: Path
    words: Sequence[str]

    def record(self) -> dict[str, str]:
        """Return what tells it from other checkpoints, folders of the same name among them."""
        return {self.kind: self.folder.name, f"{self.kind}_fingerprint": folder_fingerprint(self.folder)}


def run_stage(
    stage: VlmStage,
    out: Path,
    settings: Any,
    options: Sequence[str],
    origin: Origin,
    load: Loader,
    eval_clips: int,
    device: str = "cpu",
) -> str:
    """Train, or resume, and write `out/model`; return a table of held-out metrics before and after.

    `out/model` holds fp16 safetensors with adapters merged, the configurations, the processor and training.json: the
    command, the settings, the wall time and the metrics. A finished run is neither trained nor measured again.

    Args:
        stage: what is trained and measured.
        out: folder of the checkpoints and the result.
        settings: a dataclass with `parts`, the parts that are trained, and a seed.
        options: the settings that the command line has options for.
        origin: the checkpoint that the run begins with.
        load: returns the model and its processor before the first step.
        eval_clips: held-out clips in the metrics.
        device: where the model is trained.

    Raises:
        ValueError: `eval_clips` is below 1, or a checkpoint in `out` is of another run.
    """
    check_eval_clips(eval_clips)
    same = {"settings": asdict(settings), **origin.record(), "eval_clips": eval_clips}
    record: Mapping[str, Any] | None = finished(out / "model", same)
    if record is not None:
        return format_metrics(record["metrics"], stage.rows)
    model, processor = load()
    on_device(model.eval(), device)
    metrics = {"before": stage.measure(model, processor, eval_clips)}
    adapters = "lora" in settings.parts
    trained: Any = add_lora(model, settings.seed) if adapters else model
    start = time.perf_counter()
    with progress_bar(settings.steps) as report:
        stage.train(out, trained, processor, settings, report=report)
    seconds = time.perf_counter() - start
    if adapters:
        model = trained.merge_and_unload()
    metrics["after"] = stage.measure(model, processor, eval_clips)
    words = (*origin.words, "--eval-clips", str(eval_clips))
    record = {
        "command": command_line(f"vot train {stage.name}", settings, options, *words),
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
    return format_metrics(metrics, stage.rows)
