"""Distillation of a model into its copy with cheaper attention: layer by layer, then end to end."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.loop import Report, Schedule, no_report, run_steps
from vot_kernels.train.ranks import ALONE, Ranks

Outputs = Callable[[nn.Module, Any], Sequence[Tensor]]
LayerErrors = dict[str, float]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def linearize(
    out: Path,
    teacher: nn.Module,
    student: nn.Module,
    names: Sequence[str],
    batches: Callable[[int, int], Iterable[Any]],
    outputs: Outputs,
    settings: Linearization,
    *,
    known: Mapping[str, Any] | None = None,
    save_every: int = 100,
    report: Report = no_report,
    ranks: Ranks = ALONE,
) -> dict[str, LayerErrors]:
    """Train `student`, in place, to compute what `teacher` does, or resume from the checkpoints under `out`.

    First each attention module learns to return what the teacher's returns for the teacher's input; then all of them
    together learn the teacher's outputs. Nothing else of the student changes. The errors are root mean squares
    relative to the teacher's outputs.

    Args:
        out: folder of the checkpoints.
        teacher: the model to imitate, which is not changed.
        student: a model with the same module names, whose attention is hybrid; the weights may be the teacher's.
        names: names of the attention modules, which return a tensor or a tuple that begins with one.
        batches: `batches(start, stop)` yields the batches of the steps `start` … `stop - 1`; no labels are needed.
        outputs: `outputs(model, batch)` runs a model and returns the tensors to match.
        settings: the number of steps and the learning rates.
        known: what must be equal for a run to be resumed, in addition to the settings.
        save_every: steps between two checkpoints.
        report: called after every step with the number of steps done and the loss terms.
        ranks: the processes that train together, each with `batches` of its own; the first saves and reports. Losses,
            errors and weights are, up to rounding, those of one process that has the batches of all.

    Returns:
        For "converted", "layer by layer" and "end to end" the error of every module's output in the student's own
        forward, and of the outputs as "outputs", on one batch that is not trained on. A stage that an earlier run
        finished is measured in its present state.

    Raises:
        ValueError: there are no names, a model lacks one of the modules, or the checkpoints are of another run.
    """
    _check_names(teacher, student, names)
    total = settings.layer_steps + settings.steps
    [held_out] = batches(total, total + 1)

    def layer_terms(step: int, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad(), _watched(teacher, names) as (calls, wanted):
            outputs(teacher, batch)
        with _watched(student, names, calls) as (_, found):
            outputs(student, batch)
        return {name: _relative(found[name], wanted[name], ranks) for name in names}

    def output_terms(step: int, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = outputs(teacher, batch)
        pairs = zip(outputs(student, batch), wanted, strict=True)
        return {f"output {i}": _relative(found, exact, ranks) for i, (found, exact) in enumerate(pairs)}

    def train(
        folder: Path, parameters: list[nn.Parameter], schedule: Schedule, first: int, terms: Any
    ) -> None:
        run_steps(
            folder,
            student,
            torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0),
            schedule,
            lambda start, stop: batches(first + start, first + stop),
            terms,
            signature=asdict(settings) | dict(known or {}),
            save_every=save_every,
            report=lambda step, values: report(first + step, values),
            ranks=ranks,
        )

    def measure() -> LayerErrors:
        return layer_errors(teacher, student, names, held_out, outputs, ranks)

    errors = {"converted": measure()}
    inside = [p for name in names for p in student.get_submodule(name).parameters()]
    student.requires_grad_(False)
    for parameter in inside:
        parameter.requires_grad_()
    schedule = Schedule(settings.layer_steps, settings.layer_learning_rate, settings.warmup, settings.clip)
    train(out / "layers", inside, schedule, 0, layer_terms)
    errors["layer by layer"] = measure()
    schedule = Schedule(settings.steps, settings.learning_rate, settings.warmup, settings.clip)
    train(out, inside, schedule, settings.layer_steps, output_terms)
    errors["end to end"] = measure()
    student.requires_grad_()
    return errors


@torch.no_grad()
def layer_errors(
    teacher: nn.Module,
    student: nn.Module,
    names: Sequence[str],
    batch: Any,
    outputs: Outputs,
    ranks: Ranks = ALONE,
) -> LayerErrors:
    """Return the relative error of each module's output and of the outputs, each model in its own forward.

    With several `ranks`, `batch` is the part of this one, and the errors are those of the whole.
    """

    def error(found: Tensor, exact: Tensor) -> float:
        return ranks.mean(_relative(found, exact, ranks)).sqrt().item()

    with _watched(teacher, names) as (_, wanted):
        exact = outputs(teacher, batch)
    with _watched(student, names) as (_, found):
        approximate = outputs(student, batch)
    errors = {name: error(found[name], wanted[name]) for name in names}
    pairs = [error(a, b) for a, b in zip(approximate, exact, strict=True)]
    return errors | {"outputs": sum(pairs) / len(pairs)}


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str], replay: dict[str, _Call] | None = None
) -> Iterator[tuple[dict[str, _Call], dict[str, Tensor]]]:
    """Record the modules' inputs and outputs; with `replay`, call the modules with these inputs instead."""
    calls: dict[str, _Call] = {}
    results: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., _Call | None]:
        def note(module: nn.Module, arguments: tuple, keywords: dict) -> _Call | None:
            calls[name] = arguments, keywords
            return None if replay is None else replay[name]

        return note

    def after(name: str) -> Callable[..., None]:
        def note(module: nn.Module, arguments: tuple, result: Any) -> None:
            results[name] = result if isinstance(result, Tensor) else result[0]

        return note

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(before(name), with_kwargs=True),
            module.register_forward_hook(after(name)),
        ]
    try:
        yield calls, results
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, exact: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean square of the difference over that of the exact values.

    With several ranks the average of what they return is the ratio of the means over the values of all.
    """
    weight = ranks.weight(exact.numel())
    power = ranks.mean(weight * exact.square().mean()).clamp(min=torch.finfo(exact.dtype).tiny)
    return weight * (found - exact).square().mean() / power


def _check_names(teacher: nn.Module, student: nn.Module, names: Sequence[str]) -> None:
    for who, model in (("teacher", teacher), ("student", student)):
        missing = sorted(set(names) - {name for name, _ in model.named_modules()})
        if missing or not names:
            raise ValueError(f"names must be modules of the {who}, got {missing[0] if missing else 'none'}.")
