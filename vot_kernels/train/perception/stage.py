"""Training the perception model (nano encoder + STSG head) on DigitWorld."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.loss import dynamics_loss, match, perception_loss
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.checkpoint import load_state, save_state
from vot_kernels.train.optimization import cosine_schedule, parameter_groups, update
from vot_kernels.train.perception.batches import Batch, TrainingBatches, digitworld_config

_DYNAMICS_BATCH = 24
_TRACK_NOISE_PX = 0.4  # largest standard deviation of the noise on true centres
_DOMAIN_STEPS = 40  # batches whose clips define the domain
_DOMAIN_HELD_OUT = 15


@dataclass(frozen=True)
class PerceptionTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    steps: optimiser steps; batch_size: clips a step; learning_rate: peak, after `warmup` steps, decaying to 0
    along a half cosine; dynamics_steps: further steps of relations and events alone; weight_decay: AdamW's;
    clip: largest gradient norm; seed: of weights and data.
    """

    steps: int = 420
    batch_size: int = 12
    learning_rate: float = 2e-3
    dynamics_steps: int = 800
    warmup: int = 50
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 0


def train_perception(
    out: Path,
    settings: PerceptionTraining,
    *,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Callable[[int, dict[str, float]], None] = lambda step, terms: None,
) -> VotPerceptionModel:
    """Train, or go on from the newest checkpoint under `out`; the result is saved by the caller.

    Interrupted with Ctrl-C, it saves a checkpoint first. `report(step, loss terms)` is called every step.
    `stop_at` ends the run early with a checkpoint.
    """
    torch.manual_seed(settings.seed)
    config = digitworld_config()
    model = VotPerceptionModel(config).train()
    processor = make_processor(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, undecayed=["queries"]),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    signature = asdict(settings)
    step = load_state(out, model, optimizer, signature)
    end = min(settings.steps, stop_at or settings.steps)
    batches = TrainingBatches(settings.seed, settings.batch_size)
    try:
        for batch in batches.loader(step, end):
            terms = _loss(model, processor, batch)
            torch.stack(list(terms.values())).sum().backward()
            rate = cosine_schedule(step, settings.steps, settings.learning_rate, settings.warmup)
            update(model, optimizer, rate, settings.clip)
            step += 1
            values = {name: term.item() for name, term in terms.items()}
            report(step, {"loss": sum(values.values())} | values)
            if step % save_every == 0 and step < end:
                save_state(out, step, model, optimizer, signature)
    finally:  # also on Ctrl-C
        save_state(out, step, model, optimizer, signature)
    if step == settings.steps:
        train_dynamics(model, settings, report)
        fit_domain(model, processor, batches, settings.steps)
    return model.eval()


def train_dynamics(
    model: VotPerceptionModel,
    settings: PerceptionTraining,
    report: Callable[[int, dict[str, float]], None] = lambda step, terms: None,
) -> None:
    """Train relations and events on true tracks with noise, which needs no pixels and so costs little.

    Events are rare: a clip holds two or three hits, and without this stage the model sees too few of them.
    Everything else is frozen.
    """
    dynamics = model.head.dynamics
    optimizer = torch.optim.AdamW(dynamics.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = TrainingBatches(settings.seed + 1, _DYNAMICS_BATCH, render=False)
    for step, batch in enumerate(batches.loader(0, settings.dynamics_steps)):
        targets, frame = batch.targets, batch.clips.shape[2:4]
        noise = torch.rand(len(targets.exists), 1, 1, 1, generator=generator) * _TRACK_NOISE_PX
        noise = noise * torch.randn(targets.centers.shape, generator=generator)
        centers = targets.centers + noise / torch.tensor([frame[1], frame[0]])
        terms = dynamics_loss(dynamics(centers, targets.sizes, frame), targets)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        rate = cosine_schedule(step, settings.dynamics_steps, settings.learning_rate, settings.warmup)
        update(dynamics, optimizer, rate, clip=math.inf)
        report(settings.steps + step + 1, {"loss": loss.item()})


def make_processor(model: VotPerceptionModel) -> VotImageProcessor:
    """The processor that belongs to a model."""
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
    """Learn what training clips look like, from batches after `start`, which were not trained on."""
    model.eval()
    tokens = [
        model.mean_tokens(**processor(list(batch.clips), fps=batch.fps))
        for batch in batches.loader(start, start + _DOMAIN_STEPS + _DOMAIN_HELD_OUT)
    ]
    model.fit_domain(torch.cat(tokens[:_DOMAIN_STEPS]), torch.cat(tokens[_DOMAIN_STEPS:]))


def _loss(model: VotPerceptionModel, processor: VotImageProcessor, batch: Batch) -> dict[str, Tensor]:
    """The terms of the loss; their sum is minimised."""
    inputs = processor(list(batch.clips), fps=batch.fps)
    output = model(**inputs)
    (head,) = output.clips
    _, height, width = inputs["image_grid_thw"][0].tolist()
    terms = perception_loss(head, batch.targets, match(head, batch.targets), (height, width))
    return terms | {"balance": 0.01 * output.balance_loss}
