"""`vot train linearize`: a perception checkpoint with exact attention becomes one with hybrid attention."""

import copy
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vot_kernels.models.checkpoint import load_checkpoint, on_device
from vot_kernels.models.encoder.cost import encoder_cost
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.checkpoint import fingerprint
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.linearize.stage import linearize
from vot_kernels.train.loop import no_report
from vot_kernels.train.perception.batches import Batch, TrainingBatches
from vot_kernels.train.perception.metrics import perception_metrics
from vot_kernels.train.perception.run import publish
from vot_kernels.train.perception.stage import make_processor
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.report import (
    check_eval_clips,
    command_line,
    finished,
    format_metrics,
    machine,
    reporting,
    resumed,
)

_BATCH, _SEED = 12, 1
_GRID = (16, 8, 8)  # patches of a DigitWorld clip


def convert(teacher: VotPerceptionModel, window: int) -> VotPerceptionModel:
    """Return a copy of the model whose encoder has hybrid attention in every layer, with the teacher's weights.

    Raises:
        ValueError: the encoder's attention is not exact.
    """
    if teacher.config.encoder.attention != "softmax":
        raise ValueError(
            f'The encoder must have "softmax" attention, got {teacher.config.encoder.attention!r}.'
        )
    config = copy.deepcopy(teacher.config)
    config.encoder.attention, config.encoder.window, config.encoder.full_attention_every = "hybrid", window, 0
    student = VotPerceptionModel(config)
    student.load_state_dict(teacher.state_dict() | _betas(student))
    return student


def run(
    out: Path,
    checkpoint: Path,
    settings: Linearization,
    window: int = 1,
    eval_clips: int = 200,
    device: str = "cpu",
    ranks: Ranks = ALONE,
) -> str:
    """Convert and distil, or resume, and write `out/model`; returns tables of metrics and of errors per layer.

    `out/model` is a perception checkpoint; its training.json has the command, the settings, held-out metrics of the
    teacher, of the student as converted and as trained, the errors of each layer, and counted operations.
    A finished run is neither trained nor measured again. Of several `ranks` the first measures and writes.
    """
    check_eval_clips(eval_clips)
    teacher = load_checkpoint(VotPerceptionModel, checkpoint).requires_grad_(False)
    known = {"window": window, "teacher_fingerprint": fingerprint(teacher)}
    same = {"settings": asdict(settings), **known, "eval_clips": eval_clips}
    finished_before = finished(out / "model", same)
    if finished_before is not None:
        return _tables(finished_before)
    student = on_device(convert(teacher, window).eval(), device)
    on_device(teacher.eval(), device)
    processor = make_processor(teacher)
    names = [f"encoder.{n}" for n, _ in student.encoder.named_modules() if n.endswith(".attention")]
    data = TrainingBatches(_SEED, _BATCH, ranks=ranks)

    def batches(start: int, stop: int) -> Iterable[Batch]:
        return (data[step] for step in range(start, stop))

    def outputs(model: Any, batch: Batch) -> tuple[Tensor, ...]:
        found = model.encoder(**processor(list(batch.clips), fps=batch.fps).to(model.device))
        return found.last_hidden_state, found.pooler_output

    def measure(model: VotPerceptionModel) -> dict[str, float]:
        return perception_metrics(model.eval(), processor, "test", eval_clips)

    metrics = {"softmax": measure(teacher), "converted": measure(student)} if ranks.first else {}
    resumption = resumed(out)
    start = time.perf_counter()
    steps = settings.layer_steps + settings.steps
    with reporting(out, steps) if ranks.first else nullcontext(no_report) as report:
        errors = linearize(
            out, teacher, student, names, batches, outputs, settings, known=known, report=report, ranks=ranks
        )
    if not ranks.first:
        return ""
    seconds = time.perf_counter() - start
    cost = encoder_cost(student.config.encoder, _GRID)

    def describe(published: VotPerceptionModel) -> dict[str, Any]:
        return {
            "command": command_line(
                "vot train linearize", settings, str(checkpoint), "--window", str(window)
            ),
            **same,
            "training_seconds": round(seconds),
            **resumption,
            **machine(),
            "processes": ranks.size,
            "metrics": metrics | {"distilled": measure(on_device(published, device))},
            "layer_errors": errors,
            "attention_flops": {
                "softmax": cost.dense_attention_flops,
                "hybrid": cost.attention_flops,
                "grid_thw": list(_GRID),
            },
        }

    return _tables(publish(student, out / "model", describe))


def _tables(record: dict[str, Any]) -> str:
    """Format the output of the command."""
    flops = record["attention_flops"]
    saved, grid = 1 - flops["hybrid"] / flops["softmax"], " x ".join(map(str, flops["grid_thw"]))
    words = f"Attention takes {saved:.0%} fewer operations on a clip of {grid} patches."
    tables = (
        format_metrics(record["metrics"], "model"),
        format_metrics(record["layer_errors"], "relative error"),
    )
    return "\n\n".join((*tables, words))


def _betas(student: VotPerceptionModel) -> dict[str, Tensor]:
    """Return the weights that exact attention does not have, as they were initialised."""
    return {name: value for name, value in student.state_dict().items() if name.endswith(".attention.beta")}
