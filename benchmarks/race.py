"""A race of providers on one workload in one direction: each is checked, verified, and only then timed in turns."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Outcome, Problem, Provider, Status, Workload, anonymous, as_outputs, ops_of
from benchmarks.timing import Timer, make_timer, peak_memory, time_in_turns
from benchmarks.verify import Known, OracleError, verify
from vot_kernels.testing import ToleranceError

FAILURES = (Exception, SystemExit)  # a peer may fail in any way; the others are still measured


@dataclass
class Rules:
    """The rules of the races of one run.

    Attributes:
        rounds: timed runs per provider, None for as many as fit `seconds_per_provider` (3 to 50).
        seconds_per_provider: the target if `rounds` is None, on average over the providers of a race.
        quick: leave out providers that take long to build.
        gate: why an op of ours may not be timed (its GPU tests failed), None if it may.
        deadline: `time.monotonic()` after which nothing is started.
        input_sets: number of different inputs to rotate among, so that no run finds its inputs in the cache.
    """

    rounds: int | None = None
    seconds_per_provider: float = 2.0
    quick: bool = False
    gate: Callable[[str], str | None] = lambda op: None
    deadline: float = float("inf")
    input_sets: int = 3
    _verified: dict[tuple[str, str, str, bool], Outcome | None] = field(default_factory=dict)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


def race(
    workload: Workload, direction: str, providers: Sequence[Provider], rules: Rules
) -> dict[str, Outcome]:
    """Return the outcome of every provider, by name."""
    device = torch.device(workload.device)
    outcomes: dict[str, Outcome] = {}
    accepted: list[Provider] = []
    known: Known = {}
    for provider in providers:
        verdict = judge(provider, workload, direction, device, rules, known)
        if verdict is None:
            accepted.append(provider)
        else:
            outcomes[provider.name] = verdict
    known.clear()
    outcomes |= _time(accepted, workload, direction, device, rules)
    gc.collect()
    return {provider.name: outcomes[provider.name] for provider in providers}


def judge(
    provider: Provider,
    workload: Workload,
    direction: str,
    device: torch.device,
    rules: Rules,
    known: Known,
) -> Outcome | None:
    """Return the outcome of a provider that is not timed, as it does not take part, fails or is wrong; else None."""
    return refusal(provider, workload, direction, device, rules) or _unverified(
        provider, workload, direction, device, rules, known
    )


def refusal(
    provider: Provider, workload: Workload, direction: str, device: torch.device, rules: Rules
) -> Outcome | None:
    """Return the outcome of a provider that does not take part, before any of its code has run; else None."""
    if rules.out_of_time():
        return Outcome(provider.name, Status.NO_TIME, "the time budget of the run is spent")
    if reason := attempt(provider, provider.missing):
        return reason if isinstance(reason, Outcome) else Outcome(provider.name, Status.MISSING, reason)
    if provider.ours and (reasons := [why for op in ops_of(workload.problem) if (why := rules.gate(op))]):
        return Outcome(provider.name, Status.GATED, "; ".join(reasons))
    if rules.quick and workload.problem.size > provider.quick_size:
        return Outcome(provider.name, Status.UNSUPPORTED, "left out of the quick suite at this size")
    asked = attempt(
        provider,
        lambda: provider.refuses(provider.solves(workload.problem), workload.dtype, device, direction),
    )
    if isinstance(asked, Outcome):
        return asked
    return Outcome(provider.name, Status.UNSUPPORTED, asked) if asked else None


class Inputs:
    """The inputs of a race, shared by all providers of the same problem, so that memory has them once."""

    def __init__(self, workload: Workload, direction: str, device: torch.device, sets: int) -> None:
        self._dtype, self._device, self._sets = workload.dtype, device, sets
        self._gradients = direction != "forward"
        self._made: dict[Problem, list[list[Tensor]]] = {}

    def of(self, problem: Problem) -> list[list[Tensor]]:
        """Return several sets, which are leaves of autograd if gradients are needed."""
        if problem not in self._made:
            self._made[problem] = [self._leaves(problem, seed) for seed in range(self._sets)]
        return self._made[problem]

    def clear(self) -> None:
        """Release all inputs."""
        self._made.clear()

    def _leaves(self, problem: Problem, seed: int) -> list[Tensor]:
        made = problem.inputs(self._dtype, self._device, seed)
        return [x.requires_grad_(self._gradients and x.is_floating_point()) for x in made]


class Runner:
    """Calls one provider after all work that is not timed; it warms up when it is made."""

    def __init__(
        self, provider: Provider, workload: Workload, direction: str, device: torch.device, inputs: Inputs
    ) -> None:
        self.provider, self.direction, self.device = provider, direction, device
        self.problem, self.dtype = provider.solves(workload.problem), workload.dtype
        self.inputs = inputs.of(self.problem)
        self.grads: list[Tensor] = []
        with provider.around():
            self.prepared = provider.prepare(self.problem, self.dtype, device)
            if direction != "forward":
                outs = as_outputs(provider.run(self.problem, self.prepared, *self.inputs[0]))
                self.grads = [torch.randn_like(x) for x in outs]
                del outs
        self._seconds()  # may compile
        self.seconds = self._seconds()

    def whole(self, turn: int) -> Callable[[], object]:
        """Return the op as a user calls it, preparation included."""
        if self.direction == "backward":
            return self.kernel(turn)

        def call() -> object:
            with self.provider.around():
                return self._call(self.provider.prepare(self.problem, self.dtype, self.device), turn)

        return call

    def kernel(self, turn: int) -> Callable[[], object]:
        """Return the op with everything prepared; the backward runs on a forward that is computed now."""
        inputs = self.inputs[turn % len(self.inputs)]
        out = None
        if self.direction == "backward":
            with self.provider.around():
                out = self.provider.run(self.problem, self.prepared, *inputs)

        def call() -> object:
            with self.provider.around():
                return self._call(self.prepared, turn) if out is None else self._gradients(out, inputs)

        return call

    def columns(self) -> list[Callable[[int], Callable[[], object]]]:
        """Return the functions to time. The whole op comes first, because it fills the op's own caches of a packing."""
        return [self.whole] if self.direction == "backward" else [self.whole, self.kernel]

    def _call(self, prepared: Any, turn: int) -> object:
        inputs = self.inputs[turn % len(self.inputs)]
        if self.direction == "forward":
            with torch.no_grad():
                return self.provider.run(self.problem, prepared, *inputs)
        out = self.provider.run(self.problem, prepared, *inputs)
        return out, self._gradients(out, inputs)

    def _gradients(self, out: Tensor | Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        wanted = [x for x in inputs if x.requires_grad]
        return torch.autograd.grad(as_outputs(out), wanted, self.grads, allow_unused=True)

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.whole(0)()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def attempt(provider: Provider, function: Callable[[], Any]) -> Any:
    """Return the result of `function`, or the outcome that its exception means."""
    try:
        return function()
    except FAILURES as error:
        return failure(provider, error)


def failure(provider: Provider, error: BaseException) -> Outcome:
    """Return the outcome that an exception means."""
    if isinstance(error, ToleranceError):
        return Outcome(provider.name, Status.MISMATCH, _first_line(error))
    if _is_out_of_memory(error):
        return Outcome(provider.name, Status.OUT_OF_MEMORY, _first_line(error))
    return Outcome(provider.name, Status.ERROR, f"{type(error).__name__}: {_first_line(error)}")


def _unverified(
    provider: Provider,
    workload: Workload,
    direction: str,
    device: torch.device,
    rules: Rules,
    known: Known,
) -> Outcome | None:
    """Return the outcome of a provider that is wrong or fails, None for one that agrees with the oracle."""
    gradients = direction != "forward"
    key = (workload.suite, workload.name, provider.name, gradients)
    if key not in rules._verified:
        problem = provider.solves(workload.problem)
        rules._verified[key] = attempt(
            provider, lambda: verify(provider, problem, workload.dtype, device, gradients, known)
        )
        _release(device)
    return rules._verified[key]


def _time(
    providers: Sequence[Provider], workload: Workload, direction: str, device: torch.device, rules: Rules
) -> dict[str, Outcome]:
    """Time all in turns; a provider that does not fit into memory beside the others is timed alone afterwards."""
    if not providers:
        return {}
    timer, inputs = make_timer(device), Inputs(workload, direction, device, rules.input_sets)

    def together(chosen: Sequence[Provider]) -> dict[str, Outcome]:
        outcomes, runners = {}, []
        for provider in chosen:
            made = attempt(provider, lambda p=provider: Runner(p, workload, direction, device, inputs))
            if isinstance(made, Runner):
                runners.append(made)
            else:
                outcomes[provider.name] = made
        return outcomes | _in_turns(runners, timer, rules)

    outcomes = together(providers)
    crowded = [p for p in providers if outcomes[p.name].status is Status.OUT_OF_MEMORY]
    for provider in crowded if len(providers) > 1 else ():
        inputs.clear()
        _release(device)
        alone = together([provider])[provider.name]
        outcomes[provider.name] = replace(alone, notes={**alone.notes, "alone": True})
    return outcomes


def _in_turns(runners: list["Runner"], timer: Timer, rules: Rules) -> dict[str, Outcome]:
    """Time whole op and kernel alone of all runners in turns, without those that fail; then measure their memory."""
    outcomes: dict[str, Outcome] = {}
    seconds: Iterator[tuple[float, ...]] = iter(())
    while runners:
        running = [runners[0]]
        functions = [_announced(r, column, running) for r in runners for column in r.columns()]
        try:
            rounds = rules.rounds or _rounds(runners, rules)
            seconds = iter(time_in_turns(functions, timer, rounds, _warmups(runners, rules)))
            break
        except FAILURES as error:
            outcomes[running[0].provider.name] = failure(running[0].provider, error)
            runners.remove(running[0])
            _release(running[0].device)
    for runner in runners:
        columns = [next(seconds) for _ in runner.columns()]
        outcomes[runner.provider.name] = _timed(runner, *columns)
    return outcomes


def _announced(
    runner: "Runner", column: Callable[[int], Callable[[], object]], running: list["Runner"]
) -> Callable[[int], Callable[[], object]]:
    """Wrap `column` to record which runner is called, because an exception belongs to that runner."""

    def function(turn: int) -> Callable[[], object]:
        running[0] = runner
        return column(turn)

    return function


def _timed(runner: "Runner", whole: tuple[float, ...], kernel: tuple[float, ...] = ()) -> Outcome:
    provider = runner.provider
    peak = attempt(provider, lambda: peak_memory(runner.whole(0), runner.device))
    notes = {"solves": provider.instead} if provider.instead else {}
    peak_bytes = peak if isinstance(peak, int) else None
    return Outcome(provider.name, Status.TIMED, "", whole, kernel, peak_bytes, notes)


def _rounds(runners: Sequence["Runner"], rules: Rules) -> int:
    """Return the rounds that fit the time of all runners together: a slow one takes what fast ones leave."""
    mean = sum(runner.seconds for runner in runners) / len(runners)
    return int(min(50, max(3, rules.seconds_per_provider / max(mean, 1e-6))))


def _warmups(runners: Sequence["Runner"], rules: Rules) -> int:
    """Return 1, but 0 where one turn takes too long; every runner has run twice already."""
    return int(max(runner.seconds for runner in runners) <= rules.seconds_per_provider)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch's CPU allocator and compilers say so only in the message."""
    if isinstance(error, OracleError):
        return False
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in words for text in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _release(device: torch.device) -> None:
    """Free the GPU memory that failed calls and broken cycles hold."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return anonymous(lines[0])[:300] if lines else "no message"
