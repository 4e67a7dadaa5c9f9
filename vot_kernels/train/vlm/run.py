"""The frame of every stage of the video-language model: measure, train, measure again, and publish with a record."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import on_device
from vot_kernels.train.checkpoint import folder_fingerprint, publish_folder
from vot_kernels.train.config import identity
from vot_kernels.train.estimate import Work, estimate
from vot_kernels.train.loop import no_report
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.report import (
    check_eval_clips,
    command_line,
    finished,
    format_metrics,
    machine,
    reporting,
    resumed,
    write_record,
)
from vot_kernels.train.vlm.adapters import has_adapters, load_adapted
from vot_kernels.train.vlm.model import add_lora, count_parameters, save_half, train_only

Loader = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class VlmStage:
    """What makes a stage of the video-language model.

    Attributes:
        name: as the command line has it.
        train: `train(out, model, processor, settings, report=…, validate=…)` trains in place, or resumes. If the
            stage's parts include "lora", it gets the model with adapters.
        measure: `measure(model, processor, clips)` returns metrics of that many held-out clips.
        work: `work(model, processor, settings)` returns what a step computes, for an estimate.
        rows: what the rows of the table of metrics are, in the head of their column.
    """

    name: str
    train: Callable[..., Any]
    measure: Callable[[Any, Any, int], dict[str, float]]
    work: Callable[[Any, Any, Any], Work]
    rows: str = "weights"


@dataclass(frozen=True)
class Origin:
    """The checkpoints that a run begins with.

    Attributes:
        folders: of the checkpoints, by what the record calls them.
        words: how the command names them.
        data: what tells other data than DigitWorld from any other.
    """

    folders: Mapping[str, Path]
    words: Sequence[str]
    data: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what tells them from other checkpoints, folders of the same name among them."""
        names = {kind: folder.name for kind, folder in self.folders.items()}
        prints = {f"{kind}_fingerprint": folder_fingerprint(folder) for kind, folder in self.folders.items()}
        return names | prints | dict(self.data)


def run_stage(
    stage: VlmStage,
    out: Path,
    settings: Any,
    origin: Origin,
    load: Loader,
    eval_clips: int,
    device: str = "cpu",
    dry_run: bool = False,
    notes: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """Train, or resume, and write `out/model`; return a table of held-out metrics before and after.

    Adapters that the run begins with are trained on. `out/model` holds fp16 safetensors with adapters merged, the
    configurations, the processor and training.json: the command, the settings, the wall time and the metrics. A
    finished run is neither trained nor measured again. The first of several `ranks` measures and writes.

    Args:
        stage: what is trained and measured.
        out: folder of the checkpoints, the logs and the result.
        settings: a dataclass with `steps`, a seed, and `parts`, the parts that are trained.
        origin: the checkpoints that the run begins with.
        load: returns the model and its processor before the first step.
        eval_clips: held-out clips in the metrics.
        device: where the model is trained.
        dry_run: write nothing, and return what a run would take.
        notes: further entries of the record.
        ranks: the processes that train together; the stage's `train` then takes them.

    Raises:
        ValueError: `eval_clips` is below 1, or a checkpoint in `out` is of another run.
    """
    check_eval_clips(eval_clips)
    same = {"settings": identity(settings), **origin.record(), "eval_clips": eval_clips}
    record: Mapping[str, Any] | None = None if dry_run else finished(out / "model", same)
    if record is not None:
        return format_metrics(record["metrics"], stage.rows)
    model, processor = load()

    def measure(model: Any, clips: int) -> dict[str, float]:
        return stage.measure(model, processor, clips)

    on_device(model.eval(), device)
    adapters = "lora" in settings.parts
    if dry_run:
        trained: Any = _with_adapters(model, settings.seed, origin) if adapters else model
        learnt, what = train_only(trained, settings.parts).values(), ", ".join(settings.parts)
        return estimate(trained, learnt, what, settings.steps, stage.work(trained, processor, settings))
    metrics = {"before": measure(model, eval_clips)} if ranks.first else {}
    trained = _with_adapters(model, settings.seed, origin) if adapters else model
    resumption = resumed(out)
    start = time.perf_counter()
    together = {"ranks": ranks} if ranks.size > 1 else {}
    with reporting(out, settings.steps) if ranks.first else nullcontext(no_report) as report:
        stage.train(out, trained, processor, settings, report=report, validate=measure, **together)
    if not ranks.first:
        return ""
    seconds = time.perf_counter() - start
    if adapters:
        model = trained.merge_and_unload()
    metrics["after"] = measure(model.eval(), eval_clips)
    words = (*origin.words, "--eval-clips", str(eval_clips))
    record = {
        "command": command_line(f"vot train {stage.name}", settings, *words),
        **same,
        **(notes or {}),
        "trained": list(settings.parts),
        "training_seconds": round(seconds),
        **resumption,
        **machine(),
        "processes": ranks.size,
        "parameters": count_parameters(model),
        "metrics": metrics,
    }
    with publish_folder(out / "model") as draft:
        save_half(model, processor, draft)
        write_record(draft, record)
    return format_metrics(metrics, stage.rows)


def _with_adapters(model: Any, seed: int, origin: Origin) -> Any:
    """Return the model with the adapters that its folder holds, which are trained on, or else with new ones."""
    folder = origin.folders.get("checkpoint")
    if folder is None or not has_adapters(folder):
        return add_lora(model, seed)
    adapted, _ = load_adapted(folder)
    return adapted.to(next(model.parameters()).device)
