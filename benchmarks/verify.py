"""Verification before any figure: a provider's output and gradients are compared with the oracle in float64.

Both are compared twice: every row on the small form of the workload's problem, then, at the workload's own size, the
rows that the problem names. The gradient of the output is zero elsewhere, so that the oracle needs only those rows and
every element of the inputs' gradients is still compared. The other rows of the output must be finite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Problem, Provider, as_outputs
from vot_kernels.testing import ToleranceError, assert_within, make_tensor, max_error, move_by_roundings

# Roundings allowed on top of twice the error of plain PyTorch: PyTorch's fused CPU kernels have an exp of up to
# 20 ulp, and flash kernels round the probabilities to the input's dtype before the second product.
ROUNDINGS = {torch.float32: 16.0, torch.float64: 16.0}
HALF_ROUNDINGS = 4.0
NEARBY = 4  # inputs a few roundings away, on which the oracle errs as well where its error on the given ones is luck


class OracleError(RuntimeError):
    """The oracle itself failed, so nobody can be verified."""


@dataclass(frozen=True)
class Expected:
    """The oracle's results for one problem: its outputs, then the gradients of the floating inputs.

    Attributes:
        problem, inputs, rows, gradients: what was computed.
        outputs: the number of results that are outputs.
        low: results in the dtype of the inputs, whose error is the reference.
        exact: results in float64.
    """

    problem: Problem
    inputs: tuple[Tensor, ...]
    rows: Tensor | None
    gradients: bool
    outputs: int
    low: list[Tensor]
    exact: list[Tensor]


Known = dict[tuple[Problem, bool], Expected]


def verify(
    provider: Provider,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    gradients: bool,
    known: Known | None = None,
) -> None:
    """Return if the provider is correct on `problem` and on its small form.

    `known` keeps the oracle's results for the next providers.

    Raises:
        ToleranceError: the provider is wrong.
        OracleError: the oracle failed.
    """
    known = {} if known is None else known
    for size in (problem.small(), problem):
        key = size, gradients
        if key not in known:
            known[key] = expect(size, size.inputs(dtype, device), gradients)
        check(provider, known[key])


def verify_on(provider: Provider, problem: Problem, inputs: Sequence[Tensor], gradients: bool) -> None:
    """Call `verify` for given inputs."""
    check(provider, expect(problem, inputs, gradients))


def expect(problem: Problem, inputs: Sequence[Tensor], gradients: bool) -> Expected:
    """Compute the oracle's results."""
    try:
        rows = problem.rows(inputs)
        low, exact = _low_and_exact(problem, inputs, rows, gradients)
    except Exception as error:
        raise OracleError(
            f"nobody can be verified, the oracle failed: {type(error).__name__}: {error}"
        ) from error
    outputs = len(low) - gradients * sum(x.is_floating_point() for x in inputs)
    return Expected(problem, tuple(inputs), rows, gradients, outputs, low, exact)


def _low_and_exact(
    problem: Problem, inputs: Sequence[Tensor], rows: Tensor | None, gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the oracle's results in the dtype of the inputs and in float64."""
    low, exact = (
        _results(lambda *x: as_outputs(problem.oracle(x, rows)), given, gradients)
        for given in (inputs, [_double(x) for x in inputs])
    )
    return low, exact


def _errors_nearby(expected: Expected) -> list[float]:
    """Return the largest error of each of the oracle's results on `NEARBY` other inputs."""
    errors = []
    for seed in range(NEARBY):
        moved = [move_by_roundings(x, seed) if x.is_floating_point() else x for x in expected.inputs]
        results = _low_and_exact(expected.problem, moved, expected.rows, expected.gradients)
        errors.append([max_error(low, exact) for low, exact in zip(*results, strict=True)])
    return [max(found) for found in zip(*errors, strict=True)]


def check(provider: Provider, expected: Expected) -> None:
    """Return if the provider agrees with the oracle, else raise `ToleranceError`."""
    problem, inputs = expected.problem, expected.inputs
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    before = [x.clone() for x in inputs]
    try:
        with provider.around():
            prepared = provider.prepare(problem, dtype, inputs[0].device)
            actual = _results(
                lambda *x: _formed(provider.run(problem, prepared, *x), expected), inputs, expected.gradients
            )
    finally:  # other providers are verified on the same inputs
        changed = [i for i, (x, y) in enumerate(zip(inputs, before, strict=True)) if not torch.equal(x, y)]
        for i in changed:
            inputs[i].copy_(before[i])
    if changed:
        raise ToleranceError(f"input {changed[0]} is overwritten, {problem.describe()}")
    nearby: list[float] = []
    for i, (a, b, c) in enumerate(zip(actual, expected.low, expected.exact, strict=True)):
        name = f"output {i}" if i < expected.outputs else f"gradient of input {i - expected.outputs}"
        # Roundings are those of the inputs' dtype: a float32 gradient of a bfloat16 op is no more exact.
        roundings = ROUNDINGS.get(dtype, HALF_ROUNDINGS) * torch.finfo(dtype).eps / torch.finfo(a.dtype).eps
        granted, label = max(1.0, roundings), f"{name}, {problem.describe()}"
        try:
            assert_within(a, c, max_error(b, c), granted, 0.0, label)
        except ToleranceError:
            nearby = nearby or _errors_nearby(expected)
            assert_within(a, c, max(max_error(b, c), nearby[i]), granted, 0.0, label)


def _formed(result: Tensor | Sequence[Tensor], expected: Expected) -> list[Tensor]:
    """Return the verified rows of the outputs, if these have the right form and are finite in all rows."""
    outs, right = as_outputs(result), expected.low[: expected.outputs]
    if len(outs) != len(right):
        raise ToleranceError(f"{len(outs)} outputs instead of {len(right)}")
    rows = []
    for i, (out, low) in enumerate(zip(outs, right, strict=True)):
        if out.dtype != low.dtype:  # a coarser dtype would also be allowed coarser roundings
            raise ToleranceError(f"output {i} is {out.dtype} instead of {low.dtype}")
        if not out.isfinite().all():
            raise ToleranceError(f"output {i} is not finite, {expected.problem.describe()}")
        rows.append(out if expected.rows is None else out[expected.rows])
    return rows


def _results(function: Any, inputs: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """Return the outputs, then the gradients of the floating inputs for fixed gradients of the outputs."""
    if not gradients:
        with torch.no_grad():
            return list(function(*inputs))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outs = list(function(*leaves))
    grads = [make_tensor(*x.shape, dtype=x.dtype, device=x.device, seed=99 + i) for i, x in enumerate(outs)]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(outs, wanted, grads, materialize_grads=True)
    return [*(x.detach() for x in outs), *found]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
