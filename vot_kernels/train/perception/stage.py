"""Training of the perception model (nano encoder + STSG head) on DigitWorld."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.loss import dynamics_loss, match, perception_loss
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.loop import Report, Schedule, no_report, run_steps
from vot_kernels.train.optimization import parameter_groups
from vot_kernels.train.perception.batches import Batch, TrainingBatches, digitworld_config
from vot_kernels.train.perception.settings import PerceptionTraining

_DYNAMICS_BATCH = 24
_TRACK_NOISE_PX = 0.4  # largest standard deviation of the noise on true centres
_DOMAIN_STEPS = 40  # batches whose clips define the domain
_DOMAIN_HELD_OUT = 15


def train_perception(
    out: Path,
    settings: PerceptionTraining,
    *,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
    device: str = "cpu",
) -> VotPerceptionModel:
    """Train both stages, or resume from the newest checkpoint; the caller saves the result.

    Checkpoints of the first stage are in `out`, those of the second in `out/dynamics`. Steps are counted
    through both, also in `stop_at`. A run may be resumed on another `device`. See
    `vot_kernels.train.loop.run_steps` for the other options.

    Raises:
        ValueError: torch cannot use the device, or the checkpoint has other settings.
    """
    torch.manual_seed(settings.seed)
    config = digitworld_config(settings.attention)
    model = on_device(VotPerceptionModel(config).train(), device)
    processor = make_processor(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, undecayed=["queries"]),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    batches = TrainingBatches(settings.seed, settings.batch_size)
    step = run_steps(
        out,
        model,
        optimizer,
        Schedule(settings.steps, settings.learning_rate, settings.warmup, settings.clip),
        batches.loader,
        lambda step, batch: _loss(model, processor, batch),
        signature=asdict(settings),
        save_every=save_every,
        stop_at=stop_at,
        report=report,
    )
    if step == settings.steps:
        more = None if stop_at is None else max(0, stop_at - step)
        done = train_dynamics(out / "dynamics", model, settings, save_every, more, report)
        if done == settings.dynamics_steps:
            fit_domain(model, processor, batches, settings.steps)
    return model.eval()


def train_dynamics(
    out: Path,
    model: VotPerceptionModel,
    settings: PerceptionTraining,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
) -> int:
    """Train relations and events on true tracks with noise, which needs no pixels and is therefore cheap.

    Events are rare: a clip has two or three hits, and without this stage the model sees too few of them. All other
    parameters are frozen. The function returns the number of steps done.
    """
    dynamics = model.head.dynamics

    def losses(step: int, batch: Batch) -> dict[str, Tensor]:
        targets, frame = batch.targets, batch.clips.shape[2:4]
        generator = torch.Generator().manual_seed(_noise_seed(settings.seed, step))
        noise = torch.rand(len(targets.exists), 1, 1, 1, generator=generator) * _TRACK_NOISE_PX
        noise = noise * torch.randn(targets.centers.shape, generator=generator)
        centers = targets.centers + noise / torch.tensor([frame[1], frame[0]])
        targets = targets.to(model.device)
        return dynamics_loss(dynamics(centers.to(model.device), targets.sizes, frame), targets)

    return run_steps(
        out,
        model,
        torch.optim.AdamW(dynamics.parameters(), lr=settings.learning_rate, weight_decay=0.0),
        Schedule(settings.dynamics_steps, settings.learning_rate, settings.warmup, math.inf),
        TrainingBatches(settings.seed + 1, _DYNAMICS_BATCH, render=False).loader,
        losses,
        signature=asdict(settings),
        save_every=save_every,
        stop_at=stop_at,
        report=lambda step, terms: report(settings.steps + step, terms),
    )


def _noise_seed(seed: int, step: int) -> int:
    """Return a separate seed for every step, so that a resumed run draws the noise of an uninterrupted one."""
    return int(np.random.default_rng([seed, step]).integers(2**63))


def make_processor(model: VotPerceptionModel) -> VotImageProcessor:
    """Return the processor that belongs to a model."""
    encoder = model.config.encoder
    return VotImageProcessor(
        patch_size=encoder.patch_size,
        temporal_patch_size=encoder.temporal_patch_size,
        max_pixels=model.config.max_pixels,
    )


@torch.no_grad()
def fit_domain(
    model: VotPerceptionModel, processor: VotImageProcessor, batches: TrainingBatches, start: int
) -> None:
    """Learn the distribution of training clips from batches after `start`, which were not trained on."""
    model.eval()
    tokens = [
        model.mean_tokens(**processor(list(batch.clips), fps=batch.fps).to(model.device))
        for batch in batches.loader(start, start + _DOMAIN_STEPS + _DOMAIN_HELD_OUT)
    ]
    model.fit_domain(torch.cat(tokens[:_DOMAIN_STEPS]), torch.cat(tokens[_DOMAIN_STEPS:]))


def _loss(model: VotPerceptionModel, processor: VotImageProcessor, batch: Batch) -> dict[str, Tensor]:
    """Return the terms of the loss, whose sum is minimised."""
    inputs = processor(list(batch.clips), fps=batch.fps).to(model.device)
    targets = batch.targets.to(model.device)
    output = model(**inputs)
    (head,) = output.clips
    _, height, width = inputs["image_grid_thw"][0].tolist()
    terms = perception_loss(head, targets, match(head, targets), (height, width))
    return terms | {"balance": 0.01 * output.balance_loss}
