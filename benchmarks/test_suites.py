"""`pytest benchmarks/`: one test per suite, workload, direction and provider."""

import pytest

from benchmarks.core import Provider, Status, Workload
from benchmarks.session import Session, race_facts


class _Clock:
    """A clock that advances only by the samples that `replay` adds, so that pytest-benchmark reads samples in turns."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        return self._now

    def replay(self, samples: list[float]) -> None:
        self._now += samples.pop(0)


CLOCK = _Clock()


def clock() -> float:
    """Return the seconds on the clock of the replayed samples."""
    return CLOCK.read()


@pytest.mark.benchmark(timer=clock)
def test_provider(
    benchmark, measurements: Session, workload: Workload, direction: str, provider: Provider
) -> None:
    if benchmark.disabled:  # by --benchmark-disable, or by workers that would time each other
        benchmark.skipped = True
        pytest.skip("pytest-benchmark is disabled: nothing is measured")
    outcome = measurements.outcome(workload, direction, provider)
    if outcome.status in (Status.MISMATCH, Status.ERROR):
        benchmark.skipped = True
        pytest.fail(f"{outcome.status}: {outcome.reason}", pytrace=False)
    if outcome.status != Status.TIMED:
        benchmark.skipped = True
        pytest.skip(f"{outcome.status}: {outcome.reason}")
    benchmark.group = f"{workload.suite} {workload.name} {direction}"
    benchmark.params = None  # these would be whole objects with addresses; the facts describe them better
    benchmark.extra_info.update(
        {
            **race_facts(workload, direction, provider),
            "peak_bytes": outcome.peak_bytes,
            "kernel_s": list(outcome.kernel_s),
        }
    )
    samples = list(outcome.whole_s)
    benchmark.pedantic(CLOCK.replay, args=(samples,), rounds=len(samples))
    measurements.keep(benchmark.stats)
