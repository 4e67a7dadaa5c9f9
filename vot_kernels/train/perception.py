"""Training the perception model (nano encoder + STSG head) on DigitWorld."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.loss import match, perception_loss
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.checkpoint import load_state, save_state
from vot_kernels.train.digitworld_batches import Batch, TrainingBatches, digitworld_config

_DOMAIN_STEPS = 40  # batches whose clips define the domain
_DOMAIN_HELD_OUT = 15


@dataclass(frozen=True)
class PerceptionTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    steps: optimiser steps; batch_size: clips a step; learning_rate: peak, after `warmup` steps, decaying to 0
    along a half cosine; weight_decay: AdamW's; clip: largest gradient norm; seed: of weights and data.
    """

    steps: int = 480
    batch_size: int = 12
    learning_rate: float = 2e-3
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
        _groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98)
    )
    signature = asdict(settings)
    step = load_state(out, model, optimizer, signature)
    end = min(settings.steps, stop_at or settings.steps)
    batches = TrainingBatches(settings.seed, settings.batch_size)
    try:
        for batch in batches.loader(step, end):
            terms = _train_step(
                model, processor, optimizer, batch, _learning_rate(step, settings), settings.clip
            )
            step += 1
            report(step, terms)
            if step % save_every == 0 and step < end:
                save_state(out, step, model, optimizer, signature)
    finally:  # also on Ctrl-C
        save_state(out, step, model, optimizer, signature)
    if step == settings.steps:
        fit_domain(model, processor, batches, settings.steps)
    return model.eval()


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


def _train_step(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: float,
    clip: float,
) -> dict[str, float]:
    inputs = processor(list(batch.clips), fps=batch.fps)
    output = model(**inputs)
    (head,) = output.clips
    grid = inputs["image_grid_thw"][0].tolist()
    terms: dict[str, Tensor] = perception_loss(
        head, batch.targets, match(head, batch.targets), (grid[1], grid[2])
    )
    terms["balance"] = 0.01 * output.balance_loss
    loss = torch.stack(list(terms.values())).sum()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}


def _learning_rate(step: int, settings: PerceptionTraining) -> float:
    warm = min(1.0, (step + 1) / settings.warmup)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases, betas, residual weights and queries do not."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "queries" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "queries" in n]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
