"""The first minutes on a GPU, rehearsed on the CPU, and the pieces they are cut into."""

import json
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import first_light as module
from benchmarks.pieces import DONE, INTERRUPTED, NO_TIME, Conductor, Journal, Piece
from benchmarks.providers import providers_of
from benchmarks.workloads import workloads
from tests.marks import compiled

ROOT = Path(__file__).parents[2]

# It runs the command repeatedly, because PyTorch takes long to start; each run gets its own estimate of a race in
# seconds. The package is not installed, the linear op is wrong, and the plain mixture of experts and one peer crash.
DRIVER = """
import gc, json, os, signal, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
from dataclasses import replace
from importlib.util import find_spec
assert find_spec("vot_kernels.kernels") is None, "it is installed"
from benchmarks import first_light, providers, race
import torch._dynamo, vot_kernels.kernels.common.ranges

def wrong(right):
    return lambda problem, *rest: right(problem, *rest) * (1.1 if problem.op == "linear_attention" else 1)

def deadly(right):
    return lambda *_: os.kill(os.getpid(), signal.SIGSEGV)

def sabotage(provider):
    ways = {
        ("vot-kernels torch", "linear"): wrong,
        ("vot-kernels torch", "moe"): deadly,
        ("SDPA + torch linear", "hybrid"): deadly,
    }
    for (name, suite), way in ways.items():
        if provider.name == name and suite in provider.suites:
            return replace(provider, run=way(provider.run))
    return provider

race.peak_memory = lambda *_: 0  # the profiler takes longer than all the rest
providers.PROVIDERS = tuple(map(sabotage, providers.PROVIDERS))
suites = ("softmax", "hybrid", "linear", "moe")
first, towers = first_light.WORKLOADS[:5], [w for w in first_light.WORKLOADS if w[0] == "towers"]
first_light.WORKLOADS = (*(w for w in first if w[0] in suites), *towers[:1])
first_light.SWEPT = first_light.SWEPT[:1]
piece = first_light._piece
gc.freeze()  # each race collects garbage: a fork would copy all of the modules for that
for line in sys.stdin:
    seconds, *sys.argv[1:] = json.loads(line)
    pid = os.fork()
    if pid == 0:
        first_light._piece = lambda kind, *rest: replace(piece(kind, *rest), estimate=seconds * ("time" in kind))
        sys.stdout = sys.stderr
        os._exit(first_light.main())
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def lines(path: Path) -> list[dict]:
    """Return all lines of a file, every one of which must be complete."""
    text = path.read_text() if path.exists() else ""
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class Command:
    """The process of the driver."""

    def __init__(self, folder: Path) -> None:
        self.out, self.errors = folder / "out", folder / "errors"
        script = folder / "driver.py"
        script.write_text(DRIVER)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def start(self, race_seconds: float = 1, *options: str) -> int:
        """Start a run and return the id of its process."""
        assert self.process.stdin
        arguments = [race_seconds, str(self.out), "--device", "cpu", *options]
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """Return the exit status of the last run."""
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout
        text = self.process.stdout.readline()
        assert text, self.errors.read_text()
        return int(text)


def wait_for(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- the rehearsal ---


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The lines that each of four runs adds: one is killed during the races, one has no time, one finishes, and one is
    the second call."""
    command = Command(tmp_path_factory.mktemp("first-light"))
    path = command.out / "first_light.jsonl"
    pid = command.start()
    wait_for(lambda: any(line["kind"] == "time" for line in lines(path)))
    os.kill(pid, signal.SIGKILL)
    command.wait()
    time.sleep(0.5)  # time for its pieces to notice
    parts, statuses = [lines(path)], []
    for race_seconds, *options in ((1000,), (1,), (1, "--call", "2")):
        command.start(race_seconds, *options)
        statuses.append(command.wait())
        parts.append(lines(path)[sum(map(len, parts)) :])
    command.process.communicate()
    return *parts, statuses, command.errors.read_text()


def states(lines: list[dict]) -> dict[str, str]:
    return {line["piece"]: line["status"] for line in lines if line["kind"] == "piece"}


def test_a_killed_run_leaves_whole_lines(rehearsal):
    kinds = [line["kind"] for line in rehearsal[0]]
    assert {"environment", "ceilings", "correctness", "piece", "red", "time"} <= set(kinds)
    assert "end" not in kinds


def test_a_run_without_time_starts_nothing_in_vain(rehearsal):
    found = [state for name, state in states(rehearsal[1]).items() if not name.startswith("environment")]
    assert set(found) == {NO_TIME}
    assert {line["kind"] for line in rehearsal[1]} == {"environment", "piece", "red", "end"}


def test_the_next_run_repeats_nothing_that_had_finished(rehearsal):
    first, second, third, *_ = rehearsal
    before = {name for part in (first, second) for name, state in states(part).items() if state != NO_TIME}
    assert len(before) > 5 and len(states(third)) > 5
    assert not before & set(states(third))
    assert not any(line["kind"] in ("ceilings", "correctness") for line in [*second, *third])
    assert third[-1]["kind"] == "end" and third[-1]["complete"]
    assert {name for name in before if "environment" not in name} < set(third[-1]["pieces"])


def test_lines_say_what_ran_where(rehearsal):
    before = rehearsal[0]
    environment, ceilings = (next(r for r in before if r["kind"] == k) for k in ("environment", "ceilings"))
    assert environment["device"]["type"] == "cpu" and environment["versions"]["torch"]
    assert ceilings["matmul_bf16_tflops"] > 0 and ceilings["copy_gb_per_s"] > 0
    assert len({line["source"] for line in before}) == 1


def test_red_ops_are_named_and_get_no_figure_while_others_do(rehearsal):
    *parts, statuses, errors = rehearsal
    assert statuses[1:] == [1, 0]
    everything = [line for part in parts[:3] for line in part]
    red = [line for line in everything if line["kind"] == "red"][-1]["red"]
    assert {" ".join(name.split()[:2]) for name in red} == {"linear 64k-d64", "moe 32k-d2048-n128-k8-h768"}
    assert all(name in errors for name in red)
    assert any("exceeds" in why for why in red.values()), "the wrong one"
    assert any("SIGSEGV" in why for why in red.values()), "the one that died"
    times = [line for line in everything if line["kind"] == "time"]
    timed = {(r["suite"], r["direction"]) for r in times if r["ours"] and r["status"] == "timed"}
    assert timed == {(s, d) for s in ("softmax", "hybrid", "towers") for d in ("forward", "both")}
    beside = {r["provider"] for r in times if r["suite"] == "towers" and r["status"] == "timed"}
    assert beside >= {"vot-kernels torch", "sdpa", "eager"}
    for r in times:
        assert (r["status"] == "timed") == bool(r["whole_s"]) == ("kernel_ms" in r)
    gated = [r for r in times if r["suite"] in ("linear", "moe")]
    assert {r["status"] for r in gated} == {"gated"} and all(r["ours"] for r in gated)


def test_who_dies_in_a_race_takes_no_other_along(rehearsal):
    found = states(rehearsal[2])
    assert found["time of hybrid 64k-d64"] == "crashed (SIGSEGV)"
    assert found["time of hybrid 64k-d64, vot-kernels torch"] == DONE
    assert found["time of hybrid 64k-d64, SDPA + torch linear"] == "crashed (SIGSEGV)"


def test_variants_are_swept_before_the_races(rehearsal):
    kinds = [line["kind"] for line in rehearsal[0]]
    assert kinds.index("sweep") < kinds.index("time")
    swept = [line for line in rehearsal[0] if line["kind"] == "sweep"]
    assert {r["provider"] for r in swept} == {"vot-kernels torch", "vot-kernels torch, rehearsed"}
    assert {r["status"] for r in swept} == {"timed"} and {r["direction"] for r in swept} == {
        "forward",
        "both",
    }


def test_the_second_call_times_the_best_once_more(rehearsal):
    again = [line for line in rehearsal[3] if line["kind"] == "again"]
    assert {r["suite"] for r in again} >= {"softmax", "towers"}
    for suite in ("softmax", "towers"):
        timed = {r["provider"]: r["ours"] for r in again if r["suite"] == suite and r["status"] == "timed"}
        assert sorted(timed.values()) == [False, True], "one of ours and one peer"


def test_a_signal_ends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["first_light", str(tmp_path)])
    monkeypatch.setattr(module, "import_module", lambda name: None)
    monkeypatch.setattr(module, "first_light", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert module.main() == 130
    finally:
        signal.signal(signal.SIGTERM, before)


def test_names_are_those_of_workloads_and_providers():
    known = {(w.suite, w.name) for w in workloads("cuda")}
    assert set(module.WORKLOADS) <= known
    for suite, peers in [*module.PEERS.items(), *module.SLOW_PEERS.items()]:
        assert set(peers) <= {p.name for p in providers_of(suite)}
    assert set(module.SWEPT) <= known and set(module.PROFILED) <= set(module.WORKLOADS)
    assert set(module.FAMILIES) == {suite for suite, _ in module.WORKLOADS}
    for w in module._workloads((*module.WORKLOADS, *module.SWEPT), "cuda"):
        assert [p.name for p in module._variants(w, "cpu")][:1] == ["vot-kernels torch"]


@compiled
def test_variants_are_those_that_change_a_launch():
    def names(*key):
        (workload,) = module._workloads([key], "cuda")
        return [p.name.removeprefix("vot-kernels triton") for p in module._variants(workload, "sm_90")]

    # TMA is the default of both, and without it heads of 64 have 8 warps.
    assert {"", ", eight_warps", ", warp_specialized"} <= set(names("softmax", "ragged-64k-d64"))
    assert {"", ", fused", ", warp_specialized"} <= set(names("softmax", "64k-d128"))
    assert ", warp_specialized" not in names("linear", "64k-d64")
    assert names("fused", "dense-residual-64k") == ["", ", narrow", ", wide"]
    assert names("fused", "normalise-patches-64") == ["", ", long", ", wide"]
    assert names("moe", "32k-d2048-n128-k8-h768")[0] == ""


@compiled
def test_on_a_gpu_every_variant_is_judged_on_few_tokens_and_raced_on_many(tmp_path):
    chosen = module._workloads(module.WORKLOADS, "cuda")
    judged = module._correctness(chosen, "cuda", "sm_90")
    assert len({p.name for p in judged}) == len(judged) > len(chosen)
    assert all(p.name.endswith("triton") for p in judged[: len(chosen)])
    for workload in chosen:
        case = module._case(workload)
        assert case.problem.size <= 2048 < workload.problem.size
        assert getattr(case.problem, "head_dim", 0) == getattr(workload.problem, "head_dim", 0)
    green = {key: ("green", "") for w in chosen for key in keys_of(w)}
    journal = Journal(tmp_path / "none.jsonl")
    races = module._races(chosen, green, journal, "cuda", "sm_90")
    assert [p.name.split()[0] for p in races] == ["time"] * 10 + ["slow"] * 2
    assert all(p.limit <= 25 for p in races[:10]), "all races of a workload are over within 25 seconds"
    swept = module._workloads((*module.WORKLOADS, *module.SWEPT), "cuda")
    green = {key: ("green", "") for w in swept for key in keys_of(w)}
    sweeps = [piece for w in swept for piece in module._sweeping(w, green, "cuda", "sm_90")]
    assert len(sweeps) >= 8
    assert sum(p.estimate for p in (*races, *sweeps)) <= 540


def keys_of(workload):
    for variant in module._variants(workload, "sm_90"):
        for direction in module._directions(workload):
            yield workload.suite, workload.name, variant.name, direction


def figure(provider, ours, direction, milliseconds, instead=""):
    return {
        "suite": "softmax", "workload": "w", "provider": provider, "ours": ours, "instead": instead,
        "direction": direction, "status": "timed", "kernel_ms": milliseconds,
    }  # fmt: skip


def test_the_fastest_is_that_of_all_directions(tmp_path):
    journal = Journal(tmp_path / "lines.jsonl")
    workload = SimpleNamespace(suite="softmax", name="w")
    assert module._fastest(journal, workload, True) is None
    for name, forward, both in (("a", 1.0, 9.0), ("b", 2.0, 5.0)):
        journal.write("sweep", **figure(name, True, "forward", forward))
        journal.write("sweep", **figure(name, True, "both", both))
    journal.write("time", **figure("forward alone", False, "forward", 0.1))
    journal.write("time", **figure("peer", False, "forward", 3.0))
    journal.write("time", **figure("peer", False, "both", 9.0))
    journal.write("time", **figure("something else", False, "forward", 0.1, "exact softmax"))
    journal.write("time", **figure("something else", False, "both", 0.1, "exact softmax"))
    assert module._fastest(journal, workload, True) == "b"
    assert module._fastest(journal, workload, False) == "peer"


def test_processes_are_spawned_where_a_fork_cannot_use_the_device(tmp_path, monkeypatch):
    def run(conductor, pieces):
        status = DONE if conductor.method == "spawn" else "failed"
        conductor.journal.write("environment", machine="a GPU", device={"capability": "sm_90"})
        conductor.journal.write("piece", piece=pieces[0].name, status=status)

    monkeypatch.setattr(Conductor, "run", run)
    conductor = conduct(tmp_path)
    assert module._meet(conductor, "cuda") == "sm_90"
    assert conductor.method == "spawn" and conductor.journal.stamp["machine"] == "a GPU"


# --- pieces ---


def conduct(folder: Path, seconds: float = 60.0, **options) -> Conductor:
    return Conductor(Journal(folder / "out.jsonl", source="s"), folder / "log", seconds, **options)


def results(conductor: Conductor) -> dict[str, dict]:
    return {record["piece"]: record for record in conductor.journal.read("piece")}


def good(write):
    print("words")
    write("result", x=1)


def bad(write):
    raise ValueError("no good")


def dying(write):
    os.kill(os.getpid(), signal.SIGKILL)


def endless(write):
    write("begun", pid=os.getpid())
    subprocess.run(["sleep", "600"])


def piece(name, work, estimate=0.0, limit=60.0, parts=()):
    return Piece(name, work, estimate, limit, parts)


def test_pieces_fail_one_by_one(tmp_path):
    conductor = conduct(tmp_path)
    works = {"bad": bad, "dying": dying, "endless": endless, "good": good}
    conductor.run(
        [piece(name, work, limit=0.6 if work is endless else 60) for name, work in works.items()], 2
    )
    found = results(conductor)
    assert {name: record["status"] for name, record in found.items()} == {
        "bad": "failed",
        "dying": "crashed (SIGKILL)",
        "endless": "not finished in 1 s",
        "good": DONE,
    }
    assert "ValueError: no good" in found["bad"]["output"] and str(ROOT) not in found["bad"]["output"]
    (result,) = conductor.journal.read("result")
    assert result["x"] == 1 and result["piece"] == "good" and result["source"] == "s"
    assert "== good: done\nwords\n" in (tmp_path / "log").read_text()


def test_parts_take_the_place_of_what_fails_now_and_later(tmp_path):
    parts = (piece("first part", good), piece("second part", bad))
    whole = piece("whole", dying, parts=parts)
    conductor = conduct(tmp_path)
    conductor.run([whole, piece("other", good, parts=parts)])
    assert list(results(conductor)) == ["whole", "first part", "second part", "other"]
    journal = conductor.journal
    kept = [line for line in lines(journal.path) if line["piece"] == "whole"]
    journal.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    conductor.run([whole])
    assert list(results(conductor)) == ["whole", "first part", "second part"]


def test_nothing_is_started_that_does_not_fit_and_it_is_tried_again_later(tmp_path):
    pieces = [piece("long", good, estimate=100), piece("short", good, estimate=1)]
    conductor = conduct(tmp_path)
    conductor.run(pieces)
    assert {name: r["status"] for name, r in results(conductor).items()} == {"long": NO_TIME, "short": DONE}
    conductor.seconds = 1000
    conductor.run(pieces)
    assert [r["piece"] for r in conductor.journal.read("result")] == ["short", "long"]
    conductor.run(pieces)
    conductor.run(pieces, again=True)
    assert len(conductor.journal.read("result")) == 4


def test_the_budget_ends_what_runs(tmp_path):
    conductor = conduct(tmp_path, 0.5)
    began = time.monotonic()
    conductor.run([piece("endless", endless)])
    assert time.monotonic() - began < 10
    assert results(conductor)["endless"]["status"] == NO_TIME and not conductor.finished()
    assert_gone(conductor.journal.read("begun")[0]["pid"])


def assert_gone(group: int) -> None:
    """Return whether no process of a piece's group is left."""

    def gone() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(gone)


def test_an_interrupted_run_ends_its_pieces(tmp_path, monkeypatch):
    conductor = conduct(tmp_path)
    sleep = time.sleep

    def interrupted(seconds):
        sleep(seconds)
        if conductor.journal.read("begun"):
            raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.pieces.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conductor.run([piece("endless", endless)])
    monkeypatch.undo()
    assert results(conductor)["endless"]["status"] == INTERRUPTED and not conductor.finished()
    assert_gone(conductor.journal.read("begun")[0]["pid"])


def test_pieces_end_with_a_killed_run(tmp_path):
    conductor = conduct(tmp_path)
    if (pid := os.fork()) == 0:
        conductor.run([piece("endless", endless)])
        os._exit(0)
    wait_for(lambda: conductor.journal.read("begun"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert_gone(conductor.journal.read("begun")[0]["pid"])


def test_pieces_can_be_spawned(tmp_path):
    conductor = conduct(tmp_path, method="spawn")
    conductor.run([piece("spawned", operator.methodcaller("__call__", "result"))])
    assert [r["piece"] for r in conductor.journal.read("result")] == ["spawned"]


def test_a_journal_reads_lines_of_its_stamp_and_mends_the_last(tmp_path):
    path = tmp_path / "lines.jsonl"
    Journal(path, source="old").write("x", i=0)
    Journal(path, source="new").write("x", i=1)
    with path.open("a") as file:
        file.write('{"kind": "x", "sou')
    journal = Journal(path, source="new")
    journal.write("x", i=2)
    journal.write("y", i=3)
    assert [line["i"] for line in journal.read("x")] == [1, 2]
    assert [line["i"] for line in lines(path)] == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        journal.write("x", i=float("nan"))
    assert len(lines(path)) == 4
