"""The gate between the GPU tests and the figures, and the script that runs both."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import gate
from benchmarks.gate import TARGETS, TESTS, judge, read_gate, run_tests, source_hash
from vot_kernels.ops.dispatch import OPS

ROOT = Path(__file__).parents[2]


def write_gate(path: Path, source: str | None = None, **ops: str) -> Path:
    path.write_text(json.dumps({"source": source or source_hash(), "ops": ops}))
    return path


@pytest.mark.parametrize("op", TARGETS)
def test_every_op_has_gpu_tests_marked_as_such(op):
    text = (TESTS / f"test_{op}.py").read_text()
    assert "pytestmark = pytest.mark.gpu" in text and "def test_" in text


@pytest.mark.parametrize(
    ("body", "seconds", "state"),
    [
        ("def test_a(): pass", 120.0, "passed"),
        ("def test_a(): assert False", 120.0, "failed"),
        ("import time; time.sleep(60)", 0.5, "not finished in 0 s"),
    ],
)
def test_runs(body, seconds, state, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    test = f"import pytest\npytestmark = pytest.mark.gpu\n{body}\n"
    (tmp_path / "test_linear_attention.py").write_text(test)
    assert run_tests("linear_attention", tmp_path / "log", seconds, tests=tmp_path) == state


@pytest.mark.parametrize(
    ("status", "counts", "state"),
    [
        (0, "tests='3' skipped='2' failures='0' errors='0'", "passed"),
        (0, "tests='3' skipped='3' failures='0' errors='0'", "all skipped"),
        (0, "tests='3' skipped='0' failures='1' errors='0'", "failed"),
        (1, "", "failed"),
        (2, "", "pytest ended with status 2"),
        (5, "", "pytest ended with status 5"),
    ],
)
def test_states(status, counts, state, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    assert judge(status, report) == state


def test_no_tests():
    assert run_tests("aoe", Path("unused"), 1.0, tests=Path("/nowhere")) == "there are none"


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


def test_the_hash_follows_the_source(tmp_path):
    for folder in ("vot_kernels/ops", "kernels/triton"):
        (tmp_path / folder).mkdir(parents=True)
    kernel = tmp_path / "kernels" / "triton" / "a.py"
    kernel.write_text("x = 1\n")
    before = source_hash(tmp_path)
    kernel.write_text("x = 2\n")
    assert source_hash(tmp_path) != before and len(before) == 64


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    settings = os.environ | {"PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)


def test_script_without_arguments_or_gpu(tmp_path):
    assert script().returncode == 2 and "gpu.sh OUT [SECONDS" in script().stderr
    wrong = script(str(tmp_path), "soon")
    assert wrong.returncode == 2 and "whole number, got 'soon'" in wrong.stderr
    none = script(str(tmp_path), "60", DEVICE="nosuchdevice")
    assert none.returncode == 3 and "cannot use the device nosuchdevice" in none.stderr


def test_script_gives_no_figure_for_a_red_op(tmp_path):
    """A rehearsal on the CPU: packed attention is green, linear attention red."""
    results = dict.fromkeys(OPS, "not run") | {"packed_attention": "passed", "linear_attention": "failed"}
    path = write_gate(tmp_path / "gate.json", **results)
    arguments = ("--quick", "--workload", "2k", "--direction", "forward", "--rounds", "1")
    out = tmp_path / "out"
    run = script(str(out), "200", *arguments, DEVICE="cpu", GATE=str(path), SUITES="softmax,linear")
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


def test_peers_are_pinned_and_fit():
    lines = (ROOT / "benchmarks" / "peers.txt").read_text().splitlines()
    wheels = [line for line in lines if line and not line.startswith("#")]
    found = [re.fullmatch(r"[a-z0-9-]+==[\w.]+ +# +(\d+)  \S.*", wheel) for wheel in wheels]
    assert wheels and all(found), "NAME==VERSION  # BYTES  what for"
    assert sum(int(match[1]) for match in found) <= 60e6
