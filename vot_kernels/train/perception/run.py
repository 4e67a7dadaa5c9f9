"""`vot train perception`: train, measure, and publish the result with a record of the run."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from vot_kernels.models.checkpoint import load_checkpoint, on_device
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.checkpoint import publish_folder
from vot_kernels.train.config import identity
from vot_kernels.train.estimate import estimate
from vot_kernels.train.loop import no_report
from vot_kernels.train.perception.metrics import perception_metrics
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.perception.stage import (
    make_processor,
    new_model,
    perception_works,
    train_perception,
)
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

SPLITS = ("test", "held_out_pairs", "five_objects", "long", "resolution")


def run(
    out: Path,
    settings: PerceptionTraining,
    eval_clips: int = 200,
    device: str = "cpu",
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> str:
    """Train, or resume, measure on the held-out splits, and write `out/model`; returns a table of metrics.

    `out/model` holds fp16 safetensors, the configurations, and training.json: the command, the settings, the
    wall time, and the metrics of the new weights on one split, and of the weights as published on all. A finished run
    is neither trained nor measured again. Of several `ranks` the first measures and writes. With `dry_run` nothing is
    written, and what a run would take is returned.
    """
    check_eval_clips(eval_clips)
    same = {"settings": identity(settings), "eval_clips_per_split": eval_clips}
    if dry_run:
        return _estimates(new_model(settings, device), settings)
    record = finished(out / "model", same)
    if record is not None:
        return format_metrics(record["metrics"])

    def measure(model: VotPerceptionModel, clips: int, split: str = "val") -> dict[str, float]:
        return perception_metrics(model, make_processor(model), split, clips)

    before = measure(new_model(settings, device).eval(), eval_clips, SPLITS[0]) if ranks.first else {}
    resumption = resumed(out)
    start = time.perf_counter()
    steps = settings.steps + settings.dynamics_steps + settings.name_steps
    with reporting(out, steps) if ranks.first else nullcontext(no_report) as report:
        model = train_perception(out, settings, report=report, device=device, validate=measure, ranks=ranks)
    if not ranks.first:
        return ""
    seconds = time.perf_counter() - start

    def describe(published: VotPerceptionModel) -> dict[str, Any]:
        on_device(published, device)
        return {
            "command": command_line("vot train perception", settings),
            **same,
            "training_seconds": round(seconds),
            **resumption,
            **machine(),
            "processes": ranks.size,
            "parameters": published.num_parameters_by_part,
            "metrics": {
                f"{SPLITS[0]}, before": before,
                **{split: measure(published, eval_clips, split) for split in SPLITS},
            },
        }

    return format_metrics(publish(model, out / "model", describe)["metrics"])


def _estimates(model: VotPerceptionModel, settings: PerceptionTraining) -> str:
    """Return what a run would take, stage by stage."""
    return "\n\n".join(
        f"{name}\n{estimate(model, parameters, name, steps, work)}"
        for name, (parameters, steps, work) in perception_works(model, settings).items()
    )


def publish(
    model: VotPerceptionModel, folder: Path, describe: Callable[[VotPerceptionModel], dict[str, Any]]
) -> dict[str, Any]:
    """Write fp16 weights, configuration, processor and training.json; a reader sees all of them or none.

    `describe` gets the model as loaded from the folder, and returns the contents of training.json,
    which is returned.
    """
    domain = {
        name: buffer.cpu().clone() for name, buffer in model.named_buffers() if name.startswith("domain_")
    }
    half = VotPerceptionModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    for name, buffer in domain.items():  # a precision matrix does not survive fp16
        setattr(half, name, torch.nn.Buffer(buffer))
    with publish_folder(folder) as draft:
        half.save_pretrained(draft)
        make_processor(model).save_pretrained(draft)
        record = describe(load_checkpoint(VotPerceptionModel, draft))
        write_record(draft, record)
    return record
