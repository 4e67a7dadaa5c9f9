"""The gate between the GPU tests and the figures, and the script that runs both."""

import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gate
from benchmarks.gate import (
    SOURCES,
    TARGETS,
    TESTS,
    Pool,
    Shard,
    divide,
    judge_op,
    read_gate,
    run_gate,
    source_hash,
)
from benchmarks.workloads import SUITES, workloads
from vot_kernels.ops.dispatch import OPS

ROOT = Path(__file__).parents[2]


def write_gate(path: Path, source: str | None = None, **ops: str) -> Path:
    path.write_text(json.dumps({"source": source or source_hash(), "ops": ops}))
    return path


@pytest.mark.parametrize("op", TARGETS)
def test_every_op_has_gpu_tests_marked_as_such(op):
    text = (TESTS / f"test_{op}.py").read_text()
    assert "pytestmark = pytest.mark.gpu" in text and "def test_" in text


SHARDING = importlib.util.spec_from_file_location("gpu_conftest", TESTS / "conftest.py")
GPU_CONFTEST = importlib.util.module_from_spec(SHARDING)
SHARDING.loader.exec_module(GPU_CONFTEST)


def run(folder: Path, *ops: str, jobs: int = 3, seconds: float = 120.0, keep_going: bool = False):
    out = folder / "out.json"
    results = run_gate(out, jobs, seconds, keep_going, ops=ops, tests=folder)
    assert json.loads(out.read_text()) == {"source": source_hash(), "ops": results}
    return results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for tests of ops; its conftest has the real sharding, but does not import torch."""
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate, "FEWEST", 1)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    functions = (GPU_CONFTEST._parse_shard, GPU_CONFTEST.pytest_collection_modifyitems)
    sources = "\n".join(inspect.getsource(function) for function in functions)
    (tmp_path / "conftest.py").write_text(f"import os, re, pytest\n{sources}")
    return tmp_path


def write_tests(folder: Path, **bodies: str) -> None:
    for op, body in bodies.items():
        (folder / f"test_{op}.py").write_text(f"import os, pytest\npytestmark = pytest.mark.gpu\n{body}")


EACH = "@pytest.mark.parametrize('i', range(5))\n"


@pytest.mark.parametrize("jobs", [1, 3])
def test_shards_run_every_test_once(jobs, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    record = (
        "with open('ran', 'a') as file: print(i, b, os.getpid(), os.environ['OMP_NUM_THREADS'], file=file)"
    )
    both = "@pytest.mark.parametrize('b', ['triton', 'torch'])\n"
    write_tests(folder, a=f"{EACH}{both}def test_a(i, b):\n    {record}\n")
    assert run(folder, "a", jobs=jobs) == {"a": "passed"}
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    assert sorted((i, b) for i, b, *_ in ran) == sorted(
        (str(i), b) for i in range(5) for b in ("triton", "torch")
    )
    assert len({pid for _, _, pid, _ in ran}) == jobs
    assert len({(i, pid) for i, _, pid, _ in ran}) == 5, "the backends of a case ran in different processes"
    assert {threads for *_, threads in ran} == {"1" if jobs > 1 else "2"}


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (f"{EACH}def test_a(i): assert i != 3", "failed"),
        (f"{EACH}def test_a(i): pytest.skip()", "all skipped"),
        (f"{EACH}def test_a(i): i or pytest.skip()", "passed"),
        ("def test_a(): pass", "passed"),
        ("import nothing_of_this_name", "pytest ended with status 2"),
        ("", "there are none"),
    ],
)
def test_states_of_an_op(body, state, folder):
    write_tests(folder, a=body)
    assert run(folder, "a", jobs=2) == {"a": state}


def test_no_time_to_collect(folder):
    write_tests(folder, a="import time; time.sleep(60)", b="")
    assert run(folder, "a", "b", seconds=0.5) == {"a": "not finished in 0 s", "b": "not run"}


class Script(Shard):
    """Runs a shell script in place of pytest."""

    def start(self, environment):
        command = ["sh", "-c", self.path.read_text(), str(self.tests), str(self.number)]
        with self.log.open("w") as output:
            return subprocess.Popen(command, stdout=output, env=environment)

    def judge(self, status):
        return "passed" if status == 0 else super().judge(status)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Write a script for each op, which has as many shards as there are jobs."""
    monkeypatch.setattr(gate, "Shard", Script)
    monkeypatch.setattr(gate, "count_tests", lambda ops, *_: dict.fromkeys(ops, 1000))

    def write(**bodies: str) -> Path:
        for op, body in bodies.items():
            (tmp_path / f"test_{op}.py").write_text(body)
        return tmp_path

    return write


SECOND_IS_RED = "test $1 != 2 || { echo two is red; exit 1; }"
SLOW = "exec sleep 60"
THIRD_WAITS_FOR_RED = "test $1 != 3 || until grep -q failed $0/out.json; do sleep 0.05; done"


@pytest.mark.parametrize("keep_going", [False, True])
def test_the_first_red_op_is_the_last_unless_told(keep_going, scripts, capsys):
    """Record what runs before the pool is finished, and what runs after it is ended."""
    folder = scripts(a=THIRD_WAITS_FOR_RED, b=SECOND_IS_RED, c=SLOW if not keep_going else "true")
    results = run(folder, "a", "b", "c", jobs=3, keep_going=keep_going)
    assert results == {"a": "passed", "b": "failed", "c": "passed" if keep_going else "not run"}
    printed = capsys.readouterr().out
    assert "two is red" in printed and ("stopped at b: " in printed) != keep_going
    assert "two is red" in (folder / "gpu-tests-b-2.log").read_text()


def test_the_other_shards_of_a_red_op_are_ended(scripts):
    started = time.monotonic()
    folder = scripts(a=f"{SECOND_IS_RED}; {SLOW}", b="true")
    assert run(folder, "a", "b", keep_going=True) == {"a": "failed", "b": "passed"}
    assert time.monotonic() - started < 30


def test_an_earlier_op_may_turn_red_later(scripts):
    folder = scripts(a=f"{THIRD_WAITS_FOR_RED}; test $1 != 3", b="exit 1", c="true")
    assert run(folder, "a", "b", "c") == {"a": "failed", "b": "failed", "c": "not run"}


def test_no_op_is_judged_before_all_its_shards(scripts):
    """A shard without tests gives no verdict, and neither does a passed one: the third looks for one."""
    look = "sleep 0.5; ! grep -q passed $0/out.json"
    folder = scripts(a=f"case $1 in 1) exit 5;; 3) {look};; esac")
    assert run(folder, "a") == {"a": "passed"}


def test_results_are_written_as_soon_as_they_are_known(scripts):
    folder = scripts(
        a="true", b='grep -q \'"a": "passed"\' $0/out.json && grep -q \'"b": "not run"\' $0/out.json'
    )
    assert run(folder, "a", "b", jobs=1) == dict.fromkeys("ab", "passed")


@pytest.mark.parametrize("keep_going", [False, True])
def test_one_deadline_for_all(keep_going, scripts):
    folder = scripts(a="true", b=f"test $1 != 2 || {SLOW}", c="true", d=SLOW, e="true")
    started, late = time.monotonic(), "not finished in 3 s"
    states = list(run(folder, *"abcde", seconds=3.0, keep_going=keep_going).values())
    assert 3 <= time.monotonic() - started < 30
    assert states == ["passed", late, "passed", *([late] * 2 if keep_going else ["not run"] * 2)]


def test_interrupting_ends_the_shards(scripts):
    folder = scripts(a=f"test $1 = 2 || {SLOW}")
    with pytest.raises(KeyboardInterrupt), Pool(3, 120.0) as pool:
        pool.waiting = divide(["a"], {"a": 1000}, 3, folder, folder)
        for shard, _ in pool:
            assert shard.number == 2
            processes = list(pool.running.values())
            raise KeyboardInterrupt
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_at_most_so_many_run_at_a_time_in_the_order_of_ops(scripts, monkeypatch):
    folder, started = scripts(**dict.fromkeys("abc", "sleep 0.1")), []
    start = Script.start

    def note(shard, environment):
        started.append((shard.op, len(pool.running) + 1))
        return start(shard, environment)

    monkeypatch.setattr(Script, "start", note)
    with Pool(2, 120.0) as pool:
        pool.waiting = divide("abc", dict.fromkeys("abc", 1000), 3, folder, folder)
        assert len(list(pool)) == 9
    assert [op for op, _ in started] == list("aaabbbccc") and {running for _, running in started} == {1, 2}


@pytest.mark.parametrize(("tests", "shards"), [(0, 1), (2, 1), (15, 1), (24, 3), (129, 16), (5000, 16)])
def test_few_tests_make_few_shards(tests, shards):
    made = divide(["aoe"], {"aoe": tests}, 16, TESTS, Path("/nowhere"))
    assert [(shard.number, shard.count) for shard in made] == [(k, shards) for k in range(1, shards + 1)]


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_jobs_must_be_a_number(jobs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gate", "out.json", "--jobs", jobs])
    with pytest.raises(SystemExit):
        gate.main()
    assert f"--jobs: must be a whole number of at least 1, got '{jobs}'" in capsys.readouterr().err


class Item:
    def __init__(self, nodeid: str):
        self.nodeid = nodeid


def shards_of(ids: list[str], count: int, monkeypatch) -> list[list[str]]:
    """Return what the conftest of the GPU tests keeps of these tests in every shard."""
    shards = []
    for number in range(1, count + 1):
        monkeypatch.setenv("VOT_GPU_TESTS_SHARD", f"{number}/{count}")
        items, others = [Item(name) for name in ids], []
        hook = SimpleNamespace(pytest_deselected=lambda items, others=others: others.extend(items))
        GPU_CONFTEST.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        shards.append([item.nodeid for item in items])
        assert sorted(shards[-1] + [item.nodeid for item in others]) == sorted(ids)
    return shards


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 16, 40])
def test_shards_are_a_partition_into_even_parts(count, monkeypatch):
    ids = [f"test_a[{b}-{n}-{i}]" for i in range(5) for b in ("triton", "torch") for n in ("fp32", "bf16")]
    shards = shards_of([*ids, "test_b"], count, monkeypatch)
    assert sorted(name for shard in shards for name in shard) == sorted([*ids, "test_b"])
    cases = [{name.replace("triton", "torch") for name in shard} for shard in shards]
    assert sum(map(len, cases)) == 11, "the backends of a case are in different shards"
    assert max(map(len, cases)) - min(map(len, cases)) <= 1


def test_neighbours_are_in_different_shards_and_every_shard_begins_elsewhere(monkeypatch):
    shards = shards_of([str(i) for i in range(9)], 3, monkeypatch)
    assert shards == [["0", "3", "6"], ["4", "7", "1"], ["8", "2", "5"]]


@pytest.mark.parametrize("shard", ["", "2", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", " 1/2", "01/2"])
def test_what_is_no_shard_is_refused(shard, monkeypatch):
    monkeypatch.setenv("VOT_GPU_TESTS_SHARD", shard)
    with pytest.raises(pytest.UsageError, match=f"VOT_GPU_TESTS_SHARD must be K/N .*, got {shard!r}"):
        GPU_CONFTEST.pytest_collection_modifyitems(SimpleNamespace(), [])


@pytest.mark.parametrize(
    ("status", "counts", "state"),
    [
        (0, "tests='3' skipped='2' failures='0' errors='0'", "passed"),
        (0, "tests='3' skipped='3' failures='0' errors='0'", "all skipped"),
        (0, "tests='3' skipped='0' failures='1' errors='0'", "failed"),
        (1, "", "failed"),
        (2, "", "pytest ended with status 2"),
        (5, "", "there are none"),
        (-11, "", "pytest ended with status -11"),
    ],
)
def test_states_of_a_shard(status, counts, state, tmp_path):
    shard = Shard("aoe", 1, 1, TESTS, tmp_path)
    shard.report.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    assert shard.judge(status) == state


@pytest.mark.parametrize(
    ("shards", "state"),
    [
        (["there are none", "all skipped", "passed"], "passed"),
        (["there are none", "all skipped"], "all skipped"),
        (["there are none", "there are none"], "there are none"),
        (["passed", "pytest ended with status -9", "failed"], "pytest ended with status -9"),
    ],
)
def test_an_op_has_passed_if_every_shard_is_good_and_one_ran_a_test(shards, state):
    assert judge_op(shards) == state


def test_only_green_opens(tmp_path):
    opened = read_gate(write_gate(tmp_path / "gate.json", aoe="passed", linear_attention="failed"))
    assert opened("aoe") is None
    assert opened("linear_attention") == "GPU tests of linear_attention: failed"
    assert opened("hybrid_attention") == "GPU tests of hybrid_attention: not run"


@pytest.mark.parametrize("content", ["{", "[]", '{"ops": {}}', '{"source": "1", "ops": {}}'])
def test_what_is_no_result_of_this_source_is_refused(content, tmp_path):
    path = tmp_path / "gate.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"gate\.json"):
        read_gate(path)


@pytest.mark.parametrize(
    "name",
    ["kernels/triton/a.py", "vot_kernels/packing.py", "vot_kernels/testing.py", "vot_kernels/nn/a.py"]
    + ["vot_kernels/models/encoder/a.py", "vot_kernels/tuning/configs/sm_90/a.json", "tests/gpu/test_a.py"],
)
def test_the_hash_follows_the_source(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("1\n")
    before = source_hash(tmp_path)
    path.write_text("2\n")
    assert source_hash(tmp_path) != before and len(before) == 64


def test_everything_that_is_hashed_exists():
    assert all((ROOT / part).exists() for part in SOURCES)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    settings = os.environ | {"PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900)


def test_script_without_arguments_or_gpu(tmp_path):
    assert script().returncode == 2 and "gpu.sh OUT [SECONDS" in script().stderr
    wrong = script(str(tmp_path), "soon")
    assert wrong.returncode == 2 and "whole number, got 'soon'" in wrong.stderr
    none = script(str(tmp_path), "60", DEVICE="nosuchdevice")
    assert none.returncode == 3 and "cannot use the device nosuchdevice" in none.stderr


def test_script_runs_every_suite():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    found = {workload.suite for workload in workloads("cuda")}
    expected = [suite for suite in SUITES if suite in found]
    assert re.search(r"\$\{SUITES:-([\w,]+)\}", text)[1].split(",") == expected


def test_script_gives_no_figure_for_a_red_op(tmp_path):
    """A rehearsal on the CPU: packed attention is green, linear attention red."""
    results = dict.fromkeys(OPS, "not run") | {"packed_attention": "passed", "linear_attention": "failed"}
    path = write_gate(tmp_path / "gate.json", **results)
    arguments = ("--quick", "--workload", "2k", "--direction", "forward", "--rounds", "1")
    arguments += ("--provider", "naive,vot-kernels torch")  # without the peers that compile at length
    out = tmp_path / "out"
    run = script(str(out), "600", *arguments, DEVICE="cpu", GATE=str(path), SUITES="softmax,linear")
    assert run.returncode == 0, run.stdout + run.stderr
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    assert set(files) == {
        "environment.txt", "gpu-tests.json", "cpu.json", "report.md", "report.html", "logs.tar.gz"
    }  # fmt: skip
    assert sum(files.values()) < 16e6
    recorded = json.loads((out / "cpu.json").read_text())
    ours = [b["extra_info"]["op"] for b in recorded["benchmarks"] if b["extra_info"]["ours"]]
    assert ours and set(ours) == {"packed_attention"}
    states = {o["status"] for o in recorded["vot_kernels"]["outcomes"] if o["suite"] == "linear"}
    assert "gated" in states
    assert "GPU tests of linear_attention: failed" in (out / "report.md").read_text().replace("\\", "")
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "logs/softmax.log" in logs.getnames()


def test_a_script_that_is_killed_leaves_what_is_finished(tmp_path):
    """A rehearsal on the CPU, killed with everything it started while its second suite runs."""
    path = write_gate(tmp_path / "gate.json", **dict.fromkeys(OPS, "passed"))
    out, logs = tmp_path / "out", tmp_path / "out" / "logs"
    settings = {"PYTHON": sys.executable, "DEVICE": "cpu", "GATE": str(path), "SUITES": "softmax,linear"}
    arguments = ["--quick", "--workload", "2k", "--direction", "forward", "--rounds", "1"]
    arguments += ["--provider", "vot-kernels torch"]
    run = subprocess.Popen(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out), "600", *arguments],
        env=os.environ | settings | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while not (out / "cpu.json").exists() or not (logs / "linear.log").exists():
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        assert run.poll() is None
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert run.returncode == -signal.SIGKILL and not (out / "report.md").exists()
    recorded = json.loads((out / "cpu.json").read_text())
    assert {b["extra_info"]["op"] for b in recorded["benchmarks"]} == {"packed_attention"}
    assert all(b["stats"]["median"] > 0 for b in recorded["benchmarks"])
    assert {o["suite"] for o in recorded["vot_kernels"]["outcomes"]} == {"softmax"}
    assert read_gate(out / "gpu-tests.json")("packed_attention") is None
    assert (out / "environment.txt").stat().st_size and (logs / "softmax.log").stat().st_size


def test_peers_are_pinned_and_fit():
    lines = (ROOT / "benchmarks" / "peers.txt").read_text().splitlines()
    wheels = [line for line in lines if line and not line.startswith("#")]
    found = [re.fullmatch(r"[a-z0-9-]+==[\w.]+ +# +(\d+)  \S.*", wheel) for wheel in wheels]
    assert wheels and all(found), "NAME==VERSION  # BYTES  what for"
    assert sum(int(match[1]) for match in found) <= 60e6
