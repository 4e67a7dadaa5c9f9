"""`vot train encoder`: measure, train, measure again, and publish the encoder with a record of the run."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder
from vot_kernels.train.checkpoint import publish_folder
from vot_kernels.train.config import identity
from vot_kernels.train.encoder.metrics import encoder_metrics
from vot_kernels.train.encoder.settings import RANDOM_TEACHER, EncoderTraining
from vot_kernels.train.encoder.stage import (
    EncoderPretraining,
    build,
    encoder_work,
    load_teacher,
    make_processor,
    random_features,
    train_encoder,
    trainable_parts,
)
from vot_kernels.train.estimate import estimate
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


def run(
    out: Path,
    settings: EncoderTraining,
    teacher: Path | None,
    eval_clips: int = 200,
    device: str = "cpu",
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> str:
    """Train a nano encoder, or resume, and write `out/model`; returns a table of metrics before and after.

    `teacher` is a perception or encoder checkpoint; None is an untrained encoder ("random features"). No
    checkpoint is loaded if the settings turn distillation off.
    `out/model` holds safetensors, the configurations, and training.json: the command, the settings, the
    teacher, the wall time, and the metrics of the random and of the trained weights on held-out clips.
    A finished run is neither trained nor measured again. Of several `ranks` the first measures and writes. With
    `dry_run` nothing is written, and what a run would take is returned.
    """
    check_eval_clips(eval_clips)
    config = VotEncoderConfig.preset("nano")
    loaded = teacher if settings.distillation else None
    guide = random_features(config, settings.seed) if loaded is None else load_teacher(loaded)
    same = {
        "settings": identity(settings),
        "teacher": guide.name if settings.distillation else None,
        "teacher_fingerprint": guide.fingerprint if settings.distillation else None,
        "eval_clips": eval_clips,
    }
    record = None if dry_run else finished(out / "model", same)
    if record is not None:
        return _table(record)
    on_device(guide.encoder, device)
    if dry_run:
        new = build(settings, config, guide)
        work = encoder_work(new, settings, guide)
        return estimate(new, new.parameters(), ", ".join(trainable_parts(settings)), settings.steps, work)

    def measure(model: EncoderPretraining, clips: int) -> dict[str, float]:
        return encoder_metrics(model, guide, settings, clips)

    resumption = resumed(out)
    start = time.perf_counter()
    with reporting(out, settings.steps) if ranks.first else nullcontext(no_report) as report:
        model = train_encoder(out, settings, config, guide, report=report, validate=measure, ranks=ranks)
    if not ranks.first:
        return ""
    seconds = time.perf_counter() - start
    metrics = {
        "random weights": measure(build(settings, config, guide), eval_clips),
        "trained": measure(model, eval_clips),
    }
    teacher_words = ("--teacher", RANDOM_TEACHER if teacher is None else str(teacher))
    record = {
        "command": command_line("vot train encoder", settings, *teacher_words),
        **same,
        "training_seconds": round(seconds),
        **resumption,
        **machine(),
        "processes": ranks.size,
        "parameters": {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        },
        "metrics": metrics,
    }
    publish(model.encoder, out / "model", record)
    return _table(record)


def _table(record: dict[str, Any]) -> str:
    """Format the output of the command."""
    return f"Teacher: {record['teacher']}\n{format_metrics(record['metrics'], 'weights')}"


def publish(encoder: VotEncoder, folder: Path, record: dict) -> None:
    """Write weights, configuration, processor and `record`; a reader sees all of them or none."""
    with publish_folder(folder) as draft:
        encoder.save_pretrained(draft)
        make_processor(encoder.config).save_pretrained(draft)
        write_record(draft, record)
