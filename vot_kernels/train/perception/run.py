"""The command `vot train perception`: train, measure, and publish the result with how it was made."""

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.checkpoint import publish_folder
from vot_kernels.train.perception.metrics import perception_metrics
from vot_kernels.train.perception.stage import PerceptionTraining, make_processor, train_perception

SPLITS = ("test", "held_out_pairs", "five_objects", "long", "resolution")


def run(out: Path, settings: PerceptionTraining, eval_clips: int = 200) -> str:
    """Train (or go on), measure on the held-out splits, and write `out/model`; returns a table of metrics.

    `out/model` holds fp16 safetensors, the configurations, and training.json: the command, the settings, the
    wall time and the metrics of the weights as published.
    """
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("training", total=settings.steps + settings.dynamics_steps)

        def report(step: int, terms: dict[str, float]) -> None:
            bar.update(task, completed=step, description=f"loss {terms['loss']:.2f}")

        model = train_perception(out, settings, report=report)
    seconds = time.perf_counter() - start
    folder = publish(model, out / "model")
    published = VotPerceptionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = make_processor(published)
    metrics = {split: perception_metrics(published, processor, split, eval_clips) for split in SPLITS}
    record = {
        "command": "vot train perception " + shlex.join(_options(settings)),
        "settings": asdict(settings),
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": published.num_parameters_by_part,
        "eval_clips_per_split": eval_clips,
        "metrics": metrics,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return format_metrics(metrics)


def publish(model: VotPerceptionModel, folder: Path) -> Path:
    """Write fp16 weights, configuration and processor; a reader never sees half of them."""
    domain = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("domain_")}
    half = VotPerceptionModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    for name, buffer in domain.items():  # a precision matrix does not survive fp16
        setattr(half, name, torch.nn.Buffer(buffer))
    with publish_folder(folder) as draft:
        half.save_pretrained(draft)
        make_processor(model).save_pretrained(draft)
    return folder


def format_metrics(metrics: dict[str, dict[str, float]]) -> str:
    """A plain table: one row a split, one column a metric."""
    names = list(next(iter(metrics.values())))
    rows = [
        ["split", *names],
        *([split, *(f"{values[n]:.3f}" for n in names)] for split, values in metrics.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _options(settings: PerceptionTraining) -> list[str]:
    flags = ("steps", "batch_size", "learning_rate", "seed")
    return [word for name in flags for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
