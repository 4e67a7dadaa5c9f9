"""The loop that every stage runs: resume, step, report, save."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vot_kernels.train.checkpoint import load_state, save_state
from vot_kernels.train.optimization import cosine_schedule, update
from vot_kernels.train.ranks import ALONE, Ranks

Batch = TypeVar("Batch")
Report = Callable[[int, dict[str, float]], None]
HELD_OUT = "held_out/"
"""What the names of metrics begin with that are measured during training."""


def no_report(step: int, terms: dict[str, float]) -> None:
    """A report that does nothing."""


def load_ahead(batches: Dataset[Batch], steps: range) -> DataLoader[Batch]:
    """Load the batches of `steps` in order, prepared in advance by one worker process."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=1,
        prefetch_factor=4,
        worker_init_fn=_keep_inherited,
    )


def _keep_inherited(worker: int) -> None:
    """Keep the objects that a worker inherits from being collected in it.

    A video decoder among them would wait for threads of its own, which a forked process does not have.
    """
    gc.freeze()


@dataclass(frozen=True)
class Schedule:
    """How a stage is optimised.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: peak, reached after `warmup` steps, from which it decays to 0 along a half cosine.
        warmup: number of steps.
        clip: largest gradient norm; infinity does not clip.
        accumulation: so many batches, one after the other, make a step.
    """

    steps: int
    learning_rate: float
    warmup: int
    clip: float
    accumulation: int = 1

    @classmethod
    def of(cls, settings: Any) -> "Schedule":
        """Return the schedule of a stage's settings."""
        return cls(
            settings.steps,
            settings.learning_rate,
            settings.warmup,
            settings.clip,
            settings.accumulation,
        )


Measure = Callable[[Any, int], Mapping[str, float]]
"""Returns metrics of a model by name, of so many held-out clips."""


class Validation:
    """The measurements of a model during training.

    Args:
        model: the whole model, of which a part may be trained.
        settings: of the stage, which say how often and of how many clips.
        measure: what is measured, by every rank; None is nothing.
        before: steps that were done before those of the loop, of other parts of the stage.
    """

    def __init__(self, model: nn.Module, settings: Any, measure: Measure | None, before: int = 0) -> None:
        self.model, self.measure, self.before = model, measure, before
        self.every, self.clips = settings.validate_every, settings.validation_clips

    def after(self, step: int) -> dict[str, float]:
        """Return the metrics, if they are due after so many steps; training goes on as if nothing had happened."""
        if self.measure is None or not self.every or (self.before + step) % self.every:
            return {}
        modes = {module: module.training for module in self.model.modules()}
        with torch.random.fork_rng(devices=[]):
            found = self.measure(self.model.eval(), self.clips)
        for module, mode in modes.items():
            module.training = mode
        return {f"{HELD_OUT}{name}": value for name, value in found.items()}


def run_steps(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Callable[[int, int], Iterable[Batch]],
    loss_terms: Callable[[int, Batch], dict[str, Tensor]],
    *,
    signature: dict[str, Any],
    rows: Callable[[Batch], int] | None = None,
    validation: Validation | None = None,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
    after_backward: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> int:
    """Train `model`, or resume from the newest checkpoint under `out`, up to `schedule.steps`.

    A checkpoint is saved every `save_every` steps, at the end, and on Ctrl-C or an error. If a stage is already at its
    end, only its weights are loaded.

    Args:
        out: folder of the checkpoints.
        model: receives the weights of the checkpoint; weights outside of `optimizer` are saved too.
        optimizer: the optimiser of all or some of the parameters.
        schedule: number and size of the steps.
        batches: `batches(start, stop)` yields the batches `start` … `stop - 1`. A step takes one, or as many as the
            schedule accumulates.
        loss_terms: the terms of the loss of a batch, by its number, scalars whose sum is minimised.
        signature: what must be equal for a run to be resumed.
        rows: of how many rows the loss of a batch is the mean, which says how much it counts among those of a step and
            of all ranks; None if equally much.
        validation: what is measured during training and reported with the losses.
        save_every: steps between two checkpoints.
        stop_at: end early after this step, with a checkpoint.
        report: called after every step with the number of steps done and the loss terms.
        after_backward: called when the gradients of a step have been computed.
        ranks: the processes that train together, each with batches and loss terms of its own; the first saves and
            reports.

    Returns:
        The number of steps done, earlier runs included.

    Raises:
        ValueError: the checkpoint has another signature.
    """
    step = load_state(out, model, optimizer, signature)
    end = schedule.steps if stop_at is None else min(schedule.steps, stop_at)
    if step >= end:
        return step
    parts = schedule.accumulation
    try:
        for group in _groups(batches(step * parts, end * parts), parts):
            found: dict[str, Tensor] = {}
            weights = [1 / parts] * parts if rows is None else ranks.weights([*map(rows, group)])
            for n, (batch, weight) in enumerate(zip(group, weights, strict=True)):
                terms = {name: weight * term for name, term in loss_terms(step * parts + n, batch).items()}
                torch.stack(list(terms.values())).sum().backward()
                found = {name: found.get(name, 0) + term.detach() for name, term in terms.items()}
            ranks.average_gradients(model.parameters())
            after_backward()
            rate = cosine_schedule(step, schedule.steps, schedule.learning_rate, schedule.warmup)
            update(model, optimizer, rate, schedule.clip)
            step += 1
            values = ranks.average(found)
            measured = {} if validation is None else validation.after(step)
            if ranks.first:
                report(step, {"loss": sum(values.values())} | values | measured)
            if ranks.first and step % save_every == 0 and step < end:
                save_state(out, step, model, optimizer, signature)
    finally:  # also on Ctrl-C
        if ranks.first:
            save_state(out, step, model, optimizer, signature)
    return step


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield so many batches at a time."""
    each = iter(batches)
    while group := list(islice(each, size)):
        yield group
