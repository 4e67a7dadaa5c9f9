"""`vot train encoder`: measure, train, measure again, and publish the encoder with how it was made."""

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder
from vot_kernels.train.checkpoint import publish_folder
from vot_kernels.train.encoder.metrics import encoder_metrics
from vot_kernels.train.encoder.stage import (
    EncoderTraining,
    build,
    load_teacher,
    make_processor,
    random_features,
    train_encoder,
)
from vot_kernels.train.perception.run import format_metrics

RANDOM_TEACHER = "random"


def run(out: Path, settings: EncoderTraining, teacher: Path | None, eval_clips: int = 200) -> str:
    """Train (or go on) a nano encoder and write `out/model`; returns a table of metrics before and after.

    `teacher` is a perception or encoder checkpoint; None is an untrained encoder ("random features"). Nothing
    is loaded where the settings switch distillation off.
    `out/model` holds safetensors, the configurations, and training.json: the command, the settings, what the
    teacher is, the wall time and the metrics on held-out clips of the random and of the trained weights.
    """
    config = VotEncoderConfig.preset("nano")
    loaded = teacher if settings.distillation else None
    guide = random_features(config, settings.seed) if loaded is None else load_teacher(loaded)
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("training", total=settings.steps)

        def report(step: int, terms: dict[str, float]) -> None:
            bar.update(task, completed=step, description=f"loss {terms['loss']:.2f}")

        model = train_encoder(out, settings, config, guide, report=report)
    seconds = time.perf_counter() - start
    metrics = {
        "random weights": encoder_metrics(build(settings, config, guide), guide, settings, eval_clips),
        "trained": encoder_metrics(model, guide, settings, eval_clips),
    }
    record = {
        "command": "vot train encoder " + shlex.join(_options(settings, teacher)),
        "settings": asdict(settings),
        "teacher": guide.name if settings.distillation else None,
        "teacher_fingerprint": guide.fingerprint if settings.distillation else None,
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        },
        "eval_clips": eval_clips,
        "metrics": metrics,
    }
    publish(model.encoder, out / "model", record)
    return f"Teacher: {record['teacher']}\n{format_metrics(metrics)}"


def publish(encoder: VotEncoder, folder: Path, record: dict) -> None:
    """Write weights, configuration, processor and `record`; a reader never sees half of them."""
    with publish_folder(folder) as draft:
        encoder.save_pretrained(draft)
        make_processor(encoder.config).save_pretrained(draft)
        (draft / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _options(settings: EncoderTraining, teacher: Path | None) -> list[str]:
    flags = ("steps", "batch_size", "learning_rate", "distillation", "contrastive", "seed")
    words = [word for name in flags for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    return ["--teacher", RANDOM_TEACHER if teacher is None else str(teacher), *words]
