"""The loop that every stage runs: resume, step, report, save."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """The schedule of a stage's optimisation.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: peak, reached after `warmup` steps, from which it decays to 0 along a half cosine.
        warmup: number of steps.
        clip: largest gradient norm; infinity does not clip.
    """

    steps: int
    learning_rate: float
    warmup: int
    clip: float


def run_steps(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Callable[[int, int], Iterable[Batch]],
    loss_terms: Callable[[int, Batch], dict[str, Tensor]],
    *,
    signature: dict[str, Any],
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
        batches: `batches(start, stop)` yields the batches of the steps `start` … `stop - 1`.
        loss_terms: the terms of the loss of one step and its batch, scalars whose sum is minimised.
        signature: what must be equal for a run to be resumed.
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
    try:
        for batch in batches(step, end):
            terms = loss_terms(step, batch)
            torch.stack(list(terms.values())).sum().backward()
            ranks.average_gradients(model.parameters())
            after_backward()
            rate = cosine_schedule(step, schedule.steps, schedule.learning_rate, schedule.warmup)
            update(model, optimizer, rate, schedule.clip)
            step += 1
            values = ranks.average(terms)
            if ranks.first:
                report(step, {"loss": sum(values.values())} | values)
            if ranks.first and step % save_every == 0 and step < end:
                save_state(out, step, model, optimizer, signature)
    finally:  # also on Ctrl-C
        if ranks.first:
            save_state(out, step, model, optimizer, signature)
    return step
