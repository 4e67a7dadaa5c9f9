"""The terms of the suite: a problem, a workload, a provider, and the outcome of a provider on a workload.

It does not import torch, which takes seconds: reports know its terms, and compute nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do.

    Attributes:
        flops: floating-point operations, a multiply-add counted as two.
        bytes: device memory traffic, each input read once and each output written once.
    """

    flops: int
    bytes: int


class Problem(Protocol):
    """A function at one size: its inputs, its oracle, its minimal work. Instances are frozen dataclasses.

    A problem that other ops than `op`, or several ops, serve names them in an attribute `ops`. If a problem has
    several results, its providers and its oracle return a tuple, and `rows` selects in each element.
    """

    @property
    def op(self) -> str:
        """The op of `vot_kernels` that solves it, or a name for the problem if none does."""

    @property
    def size(self) -> int:
        """The number of tokens, which is the x axis of the plots."""

    def describe(self) -> str:
        """Return one line for the reader, without the dtype."""

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return the inputs of every provider, which depend only on the seed. Floating ones are differentiated."""

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Return the rows of the output to verify at this size, int64; None means all of them."""

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor | Sequence[Tensor]:
        """Return the given rows of the correct output, in the dtype of the inputs, differentiable."""

    def small(self) -> Problem:
        """Return the same structure at a size for which the oracle computes every row; `rows` leaves out only ties."""

    def work(self, direction: str, itemsize: int) -> Work:
        """Return the minimal work of a direction for inputs of `itemsize` bytes."""


def ops_of(problem: Problem) -> tuple[str, ...]:
    """Return the ops of `vot_kernels` that serve a problem."""
    return getattr(problem, "ops", (problem.op,))


def as_outputs(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the results of a provider or an oracle as a tuple: one tensor, which alone has a dtype, or several."""
    return (result,) if hasattr(result, "dtype") else tuple(result)


@dataclass(frozen=True)
class Workload:
    """One problem in one dtype.

    Attributes:
        suite: the suite to which it belongs.
        name: unique within the suite.
        problem: what it computes.
        dtype: dtype of the inputs.
        device: "cpu" or "cuda".
        directions: the members of `DIRECTIONS` that are timed.
        quick: the directions that belong to the quick suite.
    """

    suite: str
    name: str
    problem: Problem
    dtype: torch.dtype
    device: str
    directions: tuple[str, ...] = DIRECTIONS
    quick: tuple[str, ...] = ()


def _nothing(problem: Any, dtype: torch.dtype, device: torch.device) -> None:
    return None


def _no_refusal(problem: Any, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to solve the problems of some suites.

    Attributes:
        name: shown in the tables.
        suites: the suites in which it takes part.
        run: `run(problem, prepared, *inputs)` returns the output or outputs, differentiable unless `refuses` says
            otherwise.
        prepare: `prepare(problem, dtype, device)` builds what depends only on the packing (layout, mask, index). The
            time of the whole op includes it; the time of the kernel alone does not.
        missing: why it cannot run on this machine ("flash-attn is not installed"), None if it can.
        refuses: `refuses(problem, dtype, device, direction)`, returns why it cannot solve this one, None if it can.
        solves: the problem that it solves in place of the given one, for peers that compute another function
            and are in the table for context.
        instead: what `solves` changes, for the reader; empty if it solves the problem itself.
        ours: one of this package's backends: shown first, and gated by the package's GPU tests.
        around: makes a context that all its code runs in, the backward too: a variant prefers other configs there.
        quick_size: the largest size at which it takes part in the quick suite (0 for providers that compile for half
            a minute).
    """

    name: str
    suites: tuple[str, ...]
    run: Callable[..., Tensor | Sequence[Tensor]]
    prepare: Callable[[Any, torch.dtype, torch.device], Any] = _nothing
    missing: Callable[[], str | None] = lambda: None
    refuses: Callable[[Any, torch.dtype, torch.device, str], str | None] = _no_refusal
    solves: Callable[[Any], Any] = lambda problem: problem
    instead: str = ""
    ours: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    quick_size: float = math.inf


class Status(StrEnum):
    """The outcome of a provider; only `TIMED` has figures."""

    TIMED = "timed"
    MISSING = "missing"
    UNSUPPORTED = "unsupported"
    GATED = "gated"
    MISMATCH = "mismatch"
    OUT_OF_MEMORY = "out of memory"
    ERROR = "error"
    NO_TIME = "no time left"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one provider on one workload in one direction.

    Attributes:
        status, reason: the reason is empty for `Status.TIMED`.
        whole_s: seconds of every timed run of the whole op, preparation included.
        kernel_s: the same with everything prepared; empty for the backward, which prepares nothing.
        peak_bytes: memory allocated on top of the inputs at the peak (for the backward alone: also on top of what
            its forward saved), None if not measured.
        notes: "solves" is what a peer computes instead; "alone" is true if it did not fit into memory beside the
            others and was therefore timed after them, not in turns.
    """

    provider: str
    status: Status
    reason: str = ""
    whole_s: tuple[float, ...] = ()
    kernel_s: tuple[float, ...] = ()
    peak_bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def anonymous(text: str) -> str:
    """Return `text` without details of one machine: the folders of absolute paths and memory addresses."""
    text = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", text)
    return re.sub(r"(?<![\w.:/~-])/(?:[^\s/'\":,;()<>]+/)+", "", text)


def needs(*modules: str, package: str = "") -> Callable[[], str | None]:
    """Return a `missing` that looks for importable modules without importing them."""

    def missing() -> str | None:
        absent = [name for name in modules if not _importable(name)]
        return f"{package or ', '.join(absent)} is not installed" if absent else None

    return missing


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except Exception:  # looking for a submodule imports its parent, which may fail in any way
        return False
