"""`pytest benchmarks/` as a user runs it: what it refuses and what it leaves behind, however it ends."""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import conftest
from benchmarks.core import DIRECTIONS
from benchmarks.gate import source_hash
from benchmarks.providers import PROVIDERS
from benchmarks.workloads import SUITES
from tests.processes import default_signals

ROOT = Path(__file__).parents[2]
DEFAULTS = {"suite": "", "provider": "", "workload": "", "direction": "", "quick": False, "device": "cpu"}
WAIT = 300  # seconds for all runs together, on a busy machine

# The suite with a workload of 40 tokens, one of which a provider sleeps on, and a provider that is wrong.
DRIVER = """
import json, sys, time
from functools import cache
from pathlib import Path
import pytest, torch
from benchmarks import providers, session, workloads
from benchmarks.core import Provider, Workload
from benchmarks.problems.attention import Attention

class Tiny:
    def workloads(device):
        for name, tokens in (("tiny", 40), ("endless", 41)):
            problem = Attention("packed_attention", (tokens,), 1, 1, 8)
            quick = ("forward",) if name == "tiny" else ()
            yield Workload("softmax", name, problem, torch.float32, device, ("forward",), quick)

def right(problem, prepared, *inputs):
    return problem.oracle(inputs, None)

def wrong(problem, prepared, *inputs):
    return right(problem, prepared, *inputs) * 1.001

def endless(problem, prepared, *inputs):
    if problem.size == 41:
        Path(sys.argv[1]).touch()
        time.sleep(600)
    return right(problem, prepared, *inputs)

workloads.FAMILIES = (Tiny,)
providers.PROVIDERS = (
    Provider("right", ("softmax",), right),
    Provider("wrong", ("softmax",), wrong),
    Provider("absent", ("softmax",), right, missing=lambda: "absent is not installed"),
    Provider("endless", ("softmax",), endless),
)

ceilings = cache(session.measure_ceilings)
session.measure_ceilings = lambda device, dtypes: ceilings(device, tuple(dtypes))
for line in sys.stdin:
    code = pytest.main(["benchmarks", "-p", "no:cacheprovider", *json.loads(line)])
    print("\\nEXIT", int(code), flush=True)
"""


class Command:
    """A process that runs the command again and again, because starting PyTorch takes longest."""

    def __init__(self, folder):
        self.marker = folder / "asleep"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PY_COLORS": "0"}
        environment.pop("PYTEST_ADDOPTS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.marker)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=default_signals,
        )
        self.watchdog = threading.Timer(WAIT, self.process.kill)
        self.watchdog.start()

    def run(self, *options, signal_when_asleep=None):
        """Return the exit status and the output."""
        self.marker.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(options) + "\n")
        self.process.stdin.flush()
        while signal_when_asleep and not self.marker.exists() and self.process.poll() is None:
            time.sleep(0.05)
        if signal_when_asleep:
            self.process.send_signal(signal_when_asleep)
        lines = []
        for line in self.process.stdout:
            if line.startswith("EXIT "):
                return int(line.split()[1]), "".join(lines)
            lines.append(line)
        raise AssertionError("the process ended: " + "".join(lines))

    def close(self):
        self.watchdog.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    process = Command(tmp_path_factory.mktemp("command"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def complete(command, tmp_path_factory):
    """A complete run with a wrong provider: exit status, output, JSON."""
    path = tmp_path_factory.mktemp("complete") / "new" / "out.json"
    code, output = command.run("--workload=tiny", "--rounds=2", f"--benchmark-json={path}")
    return code, output, path.read_text()


def test_a_mismatch_fails_the_run_and_has_no_figure(complete):
    code, output, text = complete
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "mismatch: output 0" in output
    found = json.loads(text)
    assert {b["extra_info"]["provider"] for b in found["benchmarks"]} == {"right", "endless"}
    statuses = {o["provider"]: (o["status"], o["reason"]) for o in found["vot_kernels"]["outcomes"]}
    assert statuses["wrong"][0] == "mismatch" and "exceeds" in statuses["wrong"][1]
    assert statuses["absent"] == ("missing", "absent is not installed")
    assert statuses["right"] == statuses["endless"] == ("timed", "")


def test_a_race_is_announced_with_its_number_and_an_estimate(complete):
    assert "\n1 of 1: softmax tiny forward, 3 providers; less than a minute left\n" in complete[1]


def test_a_whole_run_says_so_and_holds_the_samples(complete):
    found = json.loads(complete[2])
    facts = found["vot_kernels"]
    assert facts["complete"] is True and facts["schema"] == 1
    assert facts["ceilings"]["matmul_flops_per_s"]["float32"] > 0
    for one in found["benchmarks"]:
        assert one["stats"]["rounds"] == len(one["stats"]["data"]) == len(one["extra_info"]["kernel_s"]) == 2
        assert min(one["stats"]["data"]) > 0
        assert one["extra_info"]["peak_bytes"] > 0
        assert one["group"] == "softmax tiny forward"


def test_the_json_tells_nothing_of_whose_machine_it_is(complete):
    text = complete[2]
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    assert not re.search(r"0x[0-9a-f]{6}", text)
    for folder in (ROOT, Path.home(), Path(sys.prefix), "/tmp/", "/home/"):
        assert str(folder) not in text
    assert "--benchmark-json=out.json" in json.loads(text)["vot_kernels"]["command"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_what_was_measured(name, command, tmp_path):
    path = tmp_path / "out.json"
    options = "--provider=right,endless", "--rounds=1", f"--benchmark-json={path}"
    code, output = command.run(*options, signal_when_asleep=getattr(signal, name))
    assert code == pytest.ExitCode.INTERRUPTED, output
    announced = re.findall(r"^(\d of \d: .*), 2 providers; .* left$", output, re.MULTILINE)
    assert announced == ["1 of 2: softmax tiny forward", "2 of 2: softmax endless forward"], "before it ends"
    found = json.loads(path.read_text())
    assert found["vot_kernels"]["complete"] is False
    assert [b["extra_info"]["workload"] for b in found["benchmarks"]] == ["tiny", "tiny"]
    assert [o["status"] for o in found["vot_kernels"]["outcomes"]] == ["timed", "timed"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_stopping_at_the_first_failure_is_not_complete(command, tmp_path):
    path = tmp_path / "out.json"
    options = "--workload=tiny", "--rounds=1", "--exitfirst", f"--benchmark-json={path}"
    code, output = command.run(*options)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert json.loads(path.read_text())["vot_kernels"]["complete"] is False


def test_a_spent_budget_leaves_a_valid_file(command, tmp_path):
    path = tmp_path / "out.json"
    code, output = command.run("--budget=0.001", f"--benchmark-json={path}")
    assert code == pytest.ExitCode.OK, output
    found = json.loads(path.read_text())
    assert found["benchmarks"] == []
    assert [o["status"] for o in found["vot_kernels"]["outcomes"]] == ["no time left"] * 8
    assert not command.marker.exists()


def test_disabled_benchmarks_measure_nothing(command, tmp_path):
    path = tmp_path / "out.json"
    code, output = command.run("--workload=tiny", "--benchmark-disable", f"--benchmark-json={path}")
    assert code == pytest.ExitCode.OK, output
    assert json.loads(path.read_text())["vot_kernels"]["outcomes"] == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--suite=nope", f"ERROR: unknown suite nope; known are {', '.join(SUITES)}"),
        ("--provider=nope", "ERROR: unknown provider nope; known are right, wrong, absent, endless"),
        ("--workload=nope", "ERROR: nothing to measure on cpu: no workload fits --workload nope"),
        ("--rounds=0", "must be int above 0, got '0'"),
        ("--gate=/nope", "ERROR: --gate"),
    ],
)
def test_a_wrong_option_is_a_usage_error_and_writes_nothing(option, message, command, tmp_path):
    path = tmp_path / "out.json"
    code, output = command.run(option, f"--benchmark-json={path}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert message in output
    assert "Traceback" not in output
    assert not path.exists()


@pytest.mark.parametrize(
    ("option", "known"),
    [("suite", SUITES), ("provider", tuple(p.name for p in PROVIDERS)), ("direction", DIRECTIONS)],
)
def test_unknown_names_list_the_known_ones(option, known):
    with pytest.raises(pytest.UsageError, match=f"unknown {option} nor, nope; known are ") as raised:
        conftest._choose(Namespace(**DEFAULTS | {option: f"nor, Nope,{known[0]}"}))
    assert all(name in str(raised.value) for name in known)


def test_every_name_selects_itself_whatever_its_case():
    known = tuple(dict.fromkeys(p.name for p in PROVIDERS))
    for name in known:
        assert conftest._chosen(f" {name.upper()} ,", known, "provider") == [name]
    assert conftest._chosen("", known, "provider") == conftest._chosen(",".join(known), known, "provider")


def test_names_may_hold_commas():
    known = ("a", "a, b", "c")
    assert conftest._chosen("c,a,b", known, "name") == ["a, b", "c"]
    assert conftest._chosen("a,c", known, "name") == ["a", "c"]
    with pytest.raises(pytest.UsageError, match="unknown name b; known are a, a, b, c"):
        conftest._chosen("b,a", known, "name")


@pytest.mark.parametrize(
    "given",
    [
        {"workload": "no such"},
        {"suite": "linear", "provider": "padded SDPA"},
        {"workload": "zz", "quick": True},
    ],
)
def test_an_empty_selection_says_what_was_asked_for(given):
    with pytest.raises(pytest.UsageError, match="nothing to measure on cpu: no workload fits --") as raised:
        conftest._choose(Namespace(**DEFAULTS | given))
    assert all(f"--{key}" in str(raised.value) for key in given)


def test_a_selection_holds_what_fits_and_nothing_else():
    chosen = conftest._choose(
        Namespace(**DEFAULTS | {"suite": "linear,hybrid", "direction": "forward", "quick": True})
    )
    assert {w.suite for w, _, _ in chosen} == {"linear", "hybrid"}
    assert {direction for _, direction, _ in chosen} == {"forward"}
    assert all(w.quick and w.suite in p.suites for w, _, p in chosen)


@pytest.mark.skipif(conftest.torch.cuda.is_available(), reason="there is one")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(pytest.UsageError, match="needs a CUDA device"):
        conftest._choose(Namespace(**DEFAULTS | {"device": "cuda"}))


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", ""])
@pytest.mark.parametrize("kind", [int, float])
def test_numbers_must_be_above_0(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0, got"):
        conftest._number(kind)(text)
    assert conftest._number(kind)("3") == 3


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    assert conftest._writable(None) is None
    assert conftest._writable(tmp_path / "a" / "b.json").parent.is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(pytest.UsageError, match="cannot be written"):
            conftest._writable(path)


def test_the_gate_is_that_of_its_file_and_a_broken_one_is_refused(tmp_path):
    assert conftest._gate(None)("anything") is None
    path = tmp_path / "gate.json"
    path.write_text(
        json.dumps({"ops": {"aoe": "passed", "linear_attention": "failed"}, "source": source_hash()})
    )
    gate = conftest._gate(path)
    assert gate("aoe") is None
    assert gate("linear_attention") and gate("packed_attention")
    for text in ("{", "[]", "{}", "\0"):
        path.write_text(text)
        with pytest.raises(pytest.UsageError, match="gate.json"):
            conftest._gate(path)
    with pytest.raises(pytest.UsageError, match="absent.json"):
        conftest._gate(tmp_path / "absent.json")
