"""The trainers of transformers and TRL with this package's checkpoints: atomic, safetensors, resumed to the same bits.

What they save themselves has the same bits too, on a CPU and between two rounds of replies, but a killed process may
leave half a folder, and optimiser and random numbers are pickles.
"""

import contextlib
import math
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, TrainerCallback, set_seed

from vot_kernels.train.checkpoint import fingerprint, load_state, newest_checkpoint, save_state
from vot_kernels.train.config import identity
from vot_kernels.train.loop import Measure, Report, Validation
from vot_kernels.train.optimization import cosine_schedule, parameter_groups
from vot_kernels.train.vlm.model import check_trained, train_only

STATE = "trainer_state.json"


class Run:
    """What a resumable run is: its folder, the parameters that it trains, their optimiser, and its signature."""

    def __init__(
        self, out: Path, model: nn.Module, settings: Any, parts: Sequence[str] | None = None, **known: Any
    ) -> None:
        self.out, self.model, self.settings = out, model, settings
        self.parts = settings.parts if parts is None else parts
        self.signature = {**identity(settings), "start": fingerprint(model), **known}
        self.trained = train_only(model, self.parts)
        groups = parameter_groups(self.trained, settings.weight_decay, undecayed=("embed_tokens",))
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, as a share of its peak."""
        return cosine_schedule(step, self.settings.steps, 1.0, self.settings.warmup)

    def save(self, step: int, state: str) -> None:
        """Save a checkpoint with the state of the trainer as JSON."""
        save_state(self.out, step, self.trained, self.optimizer, self.signature, {STATE: state})

    def load(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step."""
        step = load_state(self.out, self.trained, self.optimizer, self.signature)
        known = self.schedule.state_dict()
        self.schedule.load_state_dict(known | {"last_epoch": step, "_step_count": step + 1})
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.rate(step)
        return step

    def check(self) -> None:
        """Check that exactly what the stage trains may change and has a gradient.

        Raises:
            RuntimeError: it is not so; the message names a parameter.
        """
        check_trained(self.model, self.parts)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad != (parameter.grad is not None):
                state = "no gradient" if parameter.requires_grad else "a gradient"
                raise RuntimeError(f"{name} has {state}, but the stage trains {', '.join(self.parts)}.")


class Resumable:
    """A trainer whose checkpoints are those of a `Run`; to be mixed into a trainer of transformers.

    The rows are taken in their order, and all random numbers of a step follow from the seed and the step.
    """

    run: Run
    state: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.run.save(self.state.global_step, _as_json(self.state))

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        """The weights are loaded with the optimiser."""

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        self.run.load()

    def _load_rng_state(self, folder: str | None) -> None:
        """Every step begins with random numbers of its own."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        rows = self.train_dataset if dataset is None else dataset  # type: ignore[attr-defined]
        return SequentialSampler(rows)


class EachStep(TrainerCallback):
    """What happens around every step: its random numbers, checks, reports, held-out metrics, and the end on request."""

    def __init__(self, run: Run, report: Report, validate: Measure | None, stop_at: int | None) -> None:
        self.run, self.report, self.stop_at = run, report, stop_at
        self.validation = Validation(run.model, run.settings, validate)
        self.interrupted = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        set_seed(seed_of(self.run.settings.seed, state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted or state.global_step == self.stop_at:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        values = logs | self.validation.after(step)
        self.report(step, {name: math.nan if v is None else float(v) for name, v in values.items()})


def seed_of(seed: int, step: int) -> int:
    """Return the seed of a step's random numbers."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def train(trainer: Any, run: Run, each: EachStep) -> int:
    """Train, or resume, and return the number of steps done.

    Ctrl-C ends the run after the step in progress, with a checkpoint; a second one ends it at once, without.

    Raises:
        KeyboardInterrupt: the run was stopped so.
        ValueError: a checkpoint is of another run.
    """
    trainer.run = run
    trainer.remove_callback(PrinterCallback)
    end = run.settings.steps if each.stop_at is None else min(run.settings.steps, each.stop_at)
    newest = newest_checkpoint(run.out)
    done = run.load() if newest else 0
    if done < end:
        with _ending_softly(each):
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        done = trainer.state.global_step
    run.model.eval()
    if each.interrupted and done < end:
        raise KeyboardInterrupt
    return done


def arguments(settings: Any, device: str) -> dict[str, Any]:
    """Return the arguments that all trainers have in common."""
    return {
        "max_steps": settings.steps,
        "gradient_accumulation_steps": settings.accumulation,
        "max_grad_norm": settings.clip,
        "use_cpu": device == "cpu",
        "bf16": settings.precision == "bfloat16",
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "steps",
        "seed": settings.seed,
        "eval_strategy": "no",
    }


@contextlib.contextmanager
def _ending_softly(each: EachStep) -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of the step."""

    def stop(signal_number: int, frame: Any) -> None:
        if each.interrupted:
            raise KeyboardInterrupt
        each.interrupted = True

    try:
        before: Any = signal.signal(signal.SIGINT, stop)
    except ValueError:  # only the main thread may handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _as_json(state: Any) -> str:
    """Return what `TrainerState.load_from_json` reads."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / STATE
        state.save_to_json(str(file))
        return file.read_text(encoding="utf-8")


def mean_rewards(rewards: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return the mean of each reward over the replies that have one; NaN if none has."""
    known = {name: [v for v in values if v is not None] for name, values in rewards.items()}
    return {name: float(np.mean(values)) if values else math.nan for name, values in known.items()}
