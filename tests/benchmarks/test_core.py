"""The terms of the suite, and what all shipped workloads and providers have in common."""

from collections import Counter

import pytest
import torch

from benchmarks.core import DIRECTIONS, Outcome, Provider, Status, anonymous, as_outputs, needs, ops_of
from benchmarks.problems.attention import Attention
from benchmarks.providers import PROVIDERS, providers_of
from benchmarks.workloads import SUITES, workloads

DEVICES = ("cpu", "cuda")
EVERY = [workload for device in DEVICES for workload in workloads(device)]


def test_needs_says_what_is_absent_without_importing():
    assert needs("torch")() is None
    assert needs("no_such_module")() == "no_such_module is not installed"
    assert needs("torch", "no_such_module", "no_such_parent.child")() == (
        "no_such_module, no_such_parent.child is not installed"
    )
    assert needs("no_such_module", package="nice-name")() == "nice-name is not installed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--benchmark-json=/home/me/out.json", "--benchmark-json=out.json"),
        ("/tmp/a b/c", "a b/c"),
        ("no '/opt/x-1.2/lib/y.so' at 0x7f8eb0a4a5c0", "no 'y.so' at 0x…"),
        ("https://example.org/a/b or results/x.json", "https://example.org/a/b or results/x.json"),
        ("1/2 of 0xff", "1/2 of 0xff"),
        ("", ""),
    ],
)  # fmt: skip
def test_anonymous_drops_folders_and_addresses(text, expected):
    assert anonymous(text) == expected


def test_one_output_or_several():
    x = torch.zeros(1)
    assert as_outputs(x) == (x,)
    assert as_outputs([x, x]) == (x, x)
    assert ops_of(Attention("linear_attention", (4,))) == ("linear_attention",)


def test_a_fresh_provider_runs_everywhere():
    plain = Provider("p", ("s",), lambda problem, prepared, x: x)
    assert plain.missing() is None
    assert plain.prepare(None, torch.float32, torch.device("cpu")) is None
    assert plain.refuses(None, torch.float32, torch.device("cpu"), "forward") is None
    assert plain.solves("x") == "x"
    assert Outcome("p", Status.TIMED).reason == ""


def test_names_can_be_selected_and_tell_providers_apart():
    for suite in SUITES:
        names = Counter(p.name.lower() for p in providers_of(suite))
        assert not [name for name, count in names.items() if count > 1], suite
    for provider in PROVIDERS:
        assert set(provider.suites) <= set(SUITES), provider.name
        assert provider.suites
        assert provider.name == provider.name.strip()


def test_ours_stand_first():
    for suite in SUITES:
        flags = [p.ours for p in providers_of(suite)]
        assert flags == sorted(flags, reverse=True), suite


def test_every_provider_says_whether_it_can_run_here():
    for provider in PROVIDERS:
        reason = provider.missing()
        assert reason is None or (isinstance(reason, str) and reason), provider.name


@pytest.mark.parametrize("device", DEVICES)
def test_workloads_are_data_in_the_order_of_their_suites(device):
    found = workloads(device)
    assert [w.suite for w in found] == sorted((w.suite for w in found), key=SUITES.index)
    names = Counter((w.suite, w.name) for w in found)
    assert not [name for name, count in names.items() if count > 1]
    for workload in found:
        assert workload.device in (device, "cpu")  # decoding runs on the CPU
        assert workload.directions and set(workload.directions) <= set(DIRECTIONS)
        assert "," not in workload.name and " " not in workload.name
    assert any(w.quick for w in found) or device == "cuda"


@pytest.mark.parametrize("workload", EVERY, ids=lambda w: f"{w.device}-{w.suite}-{w.name}")
def test_the_problem_of_a_workload_is_whole(workload):
    problem = workload.problem
    assert hash(problem) == hash(problem)
    assert problem.size > 0
    assert "\n" not in problem.describe() and problem.describe()
    small = problem.small()
    assert 0 < small.size <= problem.size
    inputs = small.inputs(workload.dtype, torch.device("cpu"))
    rows = small.rows(inputs)  # only ties among experts, which any rounding decides, are left out
    assert rows is None or len(rows) >= 64
    for direction in workload.directions:
        work = problem.work(direction, workload.dtype.itemsize)
        assert work.flops >= 0 and work.bytes > 0
        assert type(work.flops) is int and type(work.bytes) is int
