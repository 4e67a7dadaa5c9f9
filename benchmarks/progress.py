"""The progress of a run: the current race, the number of races, and how long the rest will take."""

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.core import Provider, Workload
from benchmarks.race import Rules, refusal

# Seconds for verification, warm-up and memory measurement of a provider, until the run gives a better estimate.
_OVERHEAD = 1.5


class Progress:
    """Counts the races of a run.

    Args:
        entries: all candidates, in the order of the run.
        rules: how races are held.
        clock: seconds, on the clock of `rules.deadline`.
    """

    def __init__(
        self,
        entries: Iterable[tuple[Workload, str, Provider]],
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules, self._clock = rules, clock
        self._entrants: dict[str, int] = {}  # providers that neither refuse nor are missing, by race
        for workload, direction, provider in entries:
            name, device = _name(workload, direction), torch.device(workload.device)
            enters = refusal(provider, workload, direction, device, rules) is None
            self._entrants[name] = self._entrants.get(name, 0) + enters
        self._begun: list[str] = []
        self._start = clock()

    def begin(self, workload: Workload, direction: str) -> str | None:
        """Return the line that announces a race, or None if it has been announced."""
        name = _name(workload, direction)
        if name in self._begun:
            return None
        left = self._seconds_left()
        self._begun.append(name)
        entrants = self._entrants[name]
        providers = "1 provider" if entrants == 1 else f"{entrants} providers"
        return f"{len(self._begun)} of {len(self._entrants)}: {name}, {providers}; {_minutes(left)} left"

    def _seconds_left(self) -> float:
        """Return the time left if each provider takes the average of the previous ones; a guess counts as one."""
        done = sum(self._entrants[name] for name in self._begun)
        guess = _OVERHEAD + (self._rules.seconds_per_provider if self._rules.rounds is None else 0.0)
        now = self._clock()
        each = (now - self._start + guess) / (done + 1)
        return min(each * (sum(self._entrants.values()) - done), max(0.0, self._rules.deadline - now))


def _name(workload: Workload, direction: str) -> str:
    return f"{workload.suite} {workload.name} {direction}"


def _minutes(seconds: float) -> str:
    return "less than a minute" if seconds < 60 else f"about {seconds / 60:.0f} min"
