"""The current race, the number of races, and the estimate, on a clock that the test moves."""

import time
from itertools import product

import pytest
import torch

from benchmarks.core import Provider, Workload
from benchmarks.problems.attention import Attention
from benchmarks.progress import Progress
from benchmarks.race import Rules

PROBLEM = Attention("packed_attention", (8,), 1, 1, 4)
FIRST, SECOND, THIRD = (Workload("hybrid", name, PROBLEM, torch.float32, "cpu") for name in ("a", "b", "c"))
TWO = [Provider(name, ("hybrid",), print) for name in ("one", "two")]
ABSENT = Provider("absent", ("hybrid",), print, missing=lambda: "absent is not installed")
UNABLE = Provider("unable", ("hybrid",), print, refuses=lambda *_: "it cannot")


def cannot_say(*_):
    raise RuntimeError("no driver")


class Clock:
    def __init__(self):
        self.now = time.monotonic()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def progress(clock, providers=(*TWO, ABSENT), **rules):
    return Progress(product((FIRST, SECOND, THIRD), ["forward"], providers), Rules(**rules), clock)


def test_races_are_counted_and_announced_once(clock):
    found = progress(clock)
    lines = [found.begin(w, "forward") for w in (FIRST, FIRST, SECOND, SECOND, FIRST, THIRD)]
    assert [line and line.partition(";")[0] for line in lines] == [
        "1 of 3: hybrid a forward, 2 providers",
        None,
        "2 of 3: hybrid b forward, 2 providers",
        None,
        None,
        "3 of 3: hybrid c forward, 2 providers",
    ]


def test_the_estimate_follows_what_the_races_took(clock):
    found = progress(clock, rounds=3)  # without timing by the second the guess is 1.5 s a provider
    assert found.begin(FIRST, "forward").endswith("; less than a minute left"), (
        "6 providers, a guess of 1.5 s"
    )
    clock.now += 240
    line = found.begin(SECOND, "forward")
    assert line.endswith("; about 5 min left"), "241.5 s for 3 of which one is the guess, 4 to go: 322 s"
    clock.now += 60
    assert found.begin(THIRD, "forward").endswith("; about 2 min left"), "301.5 s for 5, 2 to go: 121 s"


def test_the_guess_counts_the_seconds_that_are_aimed_at(clock):
    assert progress(clock, seconds_per_provider=58.5).begin(FIRST, "forward").endswith("about 6 min left")


def test_no_estimate_goes_beyond_the_budget(clock):
    found = progress(clock, seconds_per_provider=600.0, deadline=clock.now + 120)
    assert found.begin(FIRST, "forward").endswith("about 2 min left")
    clock.now += 200
    assert found.begin(SECOND, "forward").endswith("less than a minute left")


def test_only_those_who_take_part_are_counted(clock):
    broken = Provider("broken", ("hybrid",), print, missing=cannot_say)
    gated = Provider("gated", ("hybrid",), print, ours=True)
    found = progress(clock, [TWO[0], ABSENT, UNABLE, broken, gated], gate=lambda op: "its tests failed")
    assert "hybrid a forward, 1 provider;" in found.begin(FIRST, "forward")
