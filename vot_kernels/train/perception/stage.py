"""Training of the perception model (nano encoder + STSG head) on DigitWorld."""

import math
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.head import HeadOutput, Place
from vot_kernels.models.perception.loss import dynamics_loss, match, naming_loss, perception_loss
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.config import identity
from vot_kernels.train.estimate import Work
from vot_kernels.train.loop import Measure, Report, Schedule, Validation, no_report, run_steps
from vot_kernels.train.optimization import check_optimised, in_precision, parameter_groups
from vot_kernels.train.perception.batches import Batch, TrainingBatches, digitworld_config
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.ranks import ALONE, Ranks

_DYNAMICS_BATCH = 24
_UNUSED = ("encoder.pooling.",)  # which perception does without, and nothing therefore trains
_TRACK_NOISE_PX = 0.4  # largest standard deviation of the noise on true centres
_DOMAIN_STEPS = 40  # steps whose clips define the domain
_DOMAIN_HELD_OUT = 15


def train_perception(
    out: Path,
    settings: PerceptionTraining,
    *,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
    device: str = "cpu",
    config: VotPerceptionConfig | None = None,
    validate: Measure | None = None,
    ranks: Ranks = ALONE,
) -> VotPerceptionModel:
    """Train the three stages, or resume from the newest checkpoint; the caller saves the result.

    Checkpoints of the first stage are in `out`, those of the others in `out/dynamics` and `out/names`. Steps are
    counted through all, also in `stop_at`. A run may be resumed on another `device`. `config` is that of a model in
    the place of the nano one, and `validate` measures the model during training. With several `ranks` each runs the
    model on its part of every batch, and all compute the loss of the whole one, so that the weights are, up to
    rounding, those of one process. See `vot_kernels.train.loop.run_steps` for the other options.

    Raises:
        ValueError: torch cannot use the device, the checkpoint has other settings, or a batch has fewer clips than
            there are ranks.
    """
    ranks.part(_DYNAMICS_BATCH)  # so that too many ranks are refused here, and not after the first stage
    model = new_model(settings, device, config)
    known = {} if config is None else {"config": config.to_diff_dict()}
    processor = make_processor(model)
    kept: dict[str, Any] = {"save_every": save_every, "ranks": ranks}
    batches = stage_batches(settings, "whole", ranks)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, undecayed=["queries"], untrained=_UNUSED),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )

    def after(done: int) -> dict[str, Any]:
        return kept | {
            "stop_at": None if stop_at is None else max(0, stop_at - done),
            "validation": Validation(model, settings, validate, before=done),
        }

    with ranks.balance(model):
        step = run_steps(
            out,
            model,
            optimizer,
            Schedule.of(settings),
            batches.loader,
            lambda index, batch: perception_losses(model, processor, batch, ranks, settings.precision),
            signature=identity(settings) | known,
            after_backward=partial(_check, model, "", optimizer),
            report=report,
            **after(0),
        )
    if step == settings.steps:
        step += train_dynamics(out / "dynamics", model, settings, report, **after(step))
    if step == settings.steps + settings.dynamics_steps:
        step += train_names(out / "names", model, processor, settings, report, **after(step))
    if step == settings.steps + settings.dynamics_steps + settings.name_steps:
        fit_domain(model, processor, batches, settings, ranks)
    return model.eval()


def new_model(
    settings: PerceptionTraining, device: str = "cpu", config: VotPerceptionConfig | None = None
) -> VotPerceptionModel:
    """Return the model before its first step.

    Raises:
        ValueError: torch cannot use the device.
    """
    torch.manual_seed(settings.seed)
    model = VotPerceptionModel(config or digitworld_config(settings.attention))
    return on_device(model.train(), device)


def stage_batches(
    settings: PerceptionTraining, stage: Literal["whole", "dynamics", "names"], ranks: Ranks = ALONE
) -> TrainingBatches:
    """Return the batches of one of the stages, which are parts of its steps where these have pixels."""
    if stage == "dynamics":
        seed, size = settings.seed + 1, _DYNAMICS_BATCH
    else:
        seed, size = settings.seed + (2 if stage == "names" else 0), settings.part_size
    render = stage != "dynamics"
    return TrainingBatches(seed, size, render=render, num_frames=settings.num_frames, ranks=ranks)


def train_dynamics(
    out: Path,
    model: VotPerceptionModel,
    settings: PerceptionTraining,
    report: Report = no_report,
    *,
    ranks: Ranks = ALONE,
    **options: Any,
) -> int:
    """Train relations and events on true tracks with noise, which needs no pixels and is therefore cheap.

    Events are rare: a clip has two or three hits, and without this stage the model sees too few of them. All other
    parameters are frozen. The function returns the number of steps done.
    """
    optimizer = torch.optim.AdamW(
        model.head.dynamics.parameters(), lr=settings.learning_rate, weight_decay=0.0
    )
    return run_steps(
        out,
        model,
        optimizer,
        Schedule(settings.dynamics_steps, settings.learning_rate, settings.warmup, math.inf),
        stage_batches(settings, "dynamics", ranks).loader,
        lambda index, batch: dynamics_losses(model, batch, settings, index, ranks),
        signature=identity(settings),
        after_backward=partial(_check, model, "head.dynamics", optimizer),
        report=lambda step, terms: report(settings.steps + step, terms),
        ranks=ranks,
        **options,
    )


def dynamics_losses(
    model: VotPerceptionModel,
    batch: Batch,
    settings: PerceptionTraining,
    index: int,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Return the terms of the loss of relations and events, read from true tracks with noise."""
    targets, frame = batch.targets, batch.clips.shape[2:4]
    generator = torch.Generator().manual_seed(_noise_seed(settings.seed, index))
    noise = torch.rand(len(targets.exists), 1, 1, 1, generator=generator) * _TRACK_NOISE_PX
    noise = noise * torch.randn(targets.centers.shape, generator=generator)
    centers = targets.centers + noise / torch.tensor([frame[1], frame[0]])
    targets, own = targets.to(model.device), ranks.part(len(centers))
    with in_precision(model, settings.precision):
        read = model.head.dynamics(centers[own].to(model.device), targets.sizes[own], frame)
    return dynamics_loss({name: ranks.joined(_whole(logits)) for name, logits in read.items()}, targets)


def train_names(
    out: Path,
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    settings: PerceptionTraining,
    report: Report = no_report,
    *,
    ranks: Ranks = ALONE,
    **options: Any,
) -> int:
    """Train what names the objects so that a label rests on shape alone, whatever the colour.

    The training clips do not have every digit in every colour, so the colour says something about the digit, and after
    the first stage a digit in a colour that it never had is often called another. Here labels are learnt from glimpses
    in random colours and beside features of other objects. Attributes are learnt from what is really there. All other
    parameters are frozen. The function returns the number of steps done.
    """
    namer = model.head.namer
    schedule = Schedule.of(settings)
    peak, before = settings.learning_rate / 2, settings.steps + settings.dynamics_steps
    optimizer = torch.optim.AdamW(namer.parameters(), lr=peak, weight_decay=settings.weight_decay)
    return run_steps(
        out,
        namer,
        optimizer,
        replace(schedule, steps=settings.name_steps, learning_rate=peak),
        stage_batches(settings, "names", ranks).loader,
        lambda index, batch: naming_losses(model, processor, batch, settings, index, ranks),
        signature=identity(settings),
        after_backward=partial(_check, model, "head.namer", optimizer),
        report=lambda step, terms: report(before + step, terms),
        ranks=ranks,
        **options,
    )


def naming_losses(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    batch: Batch,
    settings: PerceptionTraining,
    index: int,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Return the terms of the loss of labels, read from recoloured glimpses, and of attributes."""
    namer, targets = model.head.namer, batch.targets.to(model.device)
    place, frames, head = _located(model, processor, batch)
    generator = torch.Generator().manual_seed(_noise_seed(settings.seed, index))
    crops = namer.glimpses(place, frames)
    # Features and colours are drawn for the whole batch, of which this rank then takes its part.
    whole, own = ranks.joined(place.features), ranks.part(len(targets.exists))
    others = torch.randperm(whole.shape[:2].numel(), generator=generator).to(model.device)
    features = whole.flatten(0, 1)[others].view_as(whole)[own]
    colours = torch.rand(*whole.shape[:2], 3, generator=generator).to(model.device)
    with in_precision(model, settings.precision):
        seen = namer.glimpse(recoloured(crops, colours[own]))
        labels = namer.read(namer.label, seen, place, features)
        attributes = namer.read(namer.attribute, namer.glimpse(crops), place)
    labels, attributes = (ranks.joined(_whole(logits)) for logits in (labels, attributes))
    return naming_loss(labels, attributes, targets, match(_joined(head, ranks), targets))


def perception_works(
    model: VotPerceptionModel, settings: PerceptionTraining
) -> dict[str, tuple[Collection[nn.Parameter], int, Work]]:
    """Return by the name of each stage the parameters that it trains, their number of steps, and what one computes."""
    processor = make_processor(model)
    whole, dynamics, names = (stage_batches(settings, name)[0] for name in ("whole", "dynamics", "names"))

    def work(losses: Callable[[], dict[str, Tensor]], passes: int) -> Work:
        return Work(lambda: torch.stack(list(losses().values())).sum(), passes)

    parts = settings.accumulation
    return {
        "the whole model": (
            _used(model).values(),
            settings.steps,
            work(lambda: perception_losses(model, processor, whole, precision=settings.precision), parts),
        ),
        "relations and events": (
            _used(model, "head.dynamics").values(),
            settings.dynamics_steps,
            work(lambda: dynamics_losses(model, dynamics, settings, 0), 1),
        ),
        "labels and attributes": (
            _used(model, "head.namer").values(),
            settings.name_steps,
            work(lambda: naming_losses(model, processor, names, settings, 0), parts),
        ),
    }


def _check(model: VotPerceptionModel, part: str, optimizer: torch.optim.Optimizer) -> None:
    """Check after a backward pass that exactly a part of the model is trained; "" is all that it uses."""
    check_optimised(dict(model.named_parameters()), _used(model, part), optimizer, part or "the whole model")


def _used(model: VotPerceptionModel, part: str = "") -> dict[str, nn.Parameter]:
    """Return by name the parameters of a part of the model, without those that perception does without."""
    named = model.get_submodule(part).named_parameters(prefix=part)
    return {name: parameter for name, parameter in named if not name.startswith(_UNUSED)}


@torch.no_grad()
def _located(
    model: VotPerceptionModel, processor: VotImageProcessor, batch: Batch
) -> tuple[Place, Tensor, HeadOutput]:
    """Return where the model sees the objects of this rank's clips, their frames, and all that it makes of them."""
    given: list[Any] = []
    handle = model.head.namer.register_forward_pre_hook(lambda module, args: given.append(args))
    try:
        (head,) = model(**processor(list(batch.clips), fps=batch.fps).to(model.device)).clips
    finally:
        handle.remove()
    ((_, place, frames),) = given
    return place, frames, head


def recoloured(crops: Tensor, colours: Tensor) -> Tensor:
    """Return crops `[B, Q, T, 3 * n * n]` of normalised pixels in the hue of each object's colour, `[B, Q, 3]`."""
    pixels = crops.unflatten(-1, (3, -1))
    brightness = (pixels.amax(-2, keepdim=True) + 1) / 2  # 0 is black
    colour = colours[:, :, None, :, None]
    colour = colour / colour.amax(-2, keepdim=True)
    return (2 * brightness * colour - 1).flatten(-2)


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
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    batches: TrainingBatches,
    settings: PerceptionTraining,
    ranks: Ranks = ALONE,
) -> None:
    """Learn the distribution of training clips from batches after those that were trained on.

    Every rank learns it from the clips of all.
    """
    model.eval()
    start, known, more = (
        settings.accumulation * steps for steps in (settings.steps, _DOMAIN_STEPS, _DOMAIN_HELD_OUT)
    )
    tokens = [
        ranks.joined(model.mean_tokens(**processor(list(batch.clips), fps=batch.fps).to(model.device)))
        for batch in batches.loader(start, start + known + more)
    ]
    model.fit_domain(torch.cat(tokens[:known]), torch.cat(tokens[known:]))


def perception_losses(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    batch: Batch,
    ranks: Ranks = ALONE,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """Return the terms of the loss of the whole batch, whose sum is minimised; they are the same on every rank."""
    inputs = processor(list(batch.clips), fps=batch.fps).to(model.device)
    targets = batch.targets.to(model.device)
    with in_precision(model, precision):
        output = model(**inputs, output_balance=True)
    head = _joined(output.clips[0], ranks)
    _, height, width = inputs["image_grid_thw"][0].tolist()
    terms = perception_loss(head, targets, match(head, targets), (height, width))
    return terms | {"balance": 0.01 * _whole(output.balance_loss)}


def _whole(values: Tensor) -> Tensor:
    """Return values in the precision of losses, which is at least single."""
    return values.float() if values.dtype == torch.bfloat16 else values


def _joined(head: HeadOutput, ranks: Ranks) -> HeadOutput:
    """Return what the queries of all ranks found, differentiable."""
    return HeadOutput(
        **{field.name: ranks.joined(_whole(getattr(head, field.name))) for field in fields(head)}
    )
