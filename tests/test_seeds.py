"""The seed sweep finds what fails under only one seed, and repeats no finished run."""

import json
import subprocess
import sys
from pathlib import Path

from tests.seeds import ENVIRONMENTS, environment

FAILS_UNDER_ONE = """
import os

def test_passes():
    assert os.environ["OMP_NUM_THREADS"] == "2" and "TRITON_INTERPRET" not in os.environ

def test_fails_under_one():
    assert os.environ["VOT_TEST_SEED"] != "1"
"""


def test_twelve_seeds_in_a_row_have_all_environments():
    found = [environment(seed, interpreted=True) for seed in range(4, 16)]
    assert [run.pop("VOT_TEST_SEED") for run in found] == [str(seed) for seed in range(4, 16)]
    assert [run.pop("TRITON_INTERPRET") for run in found] == ["1"] * 12
    assert all(found.count(run) == 1 for run in ENVIRONMENTS)


def test_names_what_fails_and_repeats_nothing(tmp_path):
    file, log = tmp_path / "test_it.py", tmp_path / "runs.jsonl"
    file.write_text(FAILS_UNDER_ONE)
    command = [sys.executable, "-m", "tests.seeds", "--kind", "torch", "--out", str(log), str(file)]

    def sweep(seeds: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--seeds", seeds], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )

    first = sweep("1")
    assert first.returncode == 1
    assert first.stdout.count("FAILED") == first.stdout.count("test_it.py::test_fails_under_one") == 1
    file.write_text("def test_passes(): pass")
    both = sweep("0-1")
    assert both.stdout.endswith(first.stdout)  # remembered
    assert [len(json.loads(line)["failures"]) for line in log.read_text().splitlines()] == [1, 0]
