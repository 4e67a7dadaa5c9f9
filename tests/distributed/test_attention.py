"""Attention over 2 and 4 ranks: results and gradients are those of one process; a rank that ends takes none along."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.attention_cases import CASES, ERRORS
from tests.distributed.ranks import run_ranks
from tests.marks import cpp

FEW = {name: case for name, case in CASES.items() if name.startswith(("segments", "hybrid"))}
ROOT = Path(__file__).parents[2]


def named(cases):
    return [pytest.param(name, marks=cpp if ", cpp," in name else ()) for name in cases]


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks(CASES, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(FEW | ERRORS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", named(CASES))
def test_four_ranks_equal_one_process(four_ranks, case):
    assert not four_ranks[case], four_ranks[case]


@pytest.mark.parametrize("case", named(FEW | ERRORS))
def test_two_ranks(two_ranks, case):
    assert not two_ranks[case], two_ranks[case]


def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path):
    """Rank 1 is killed between two calls; the others end by themselves, and say why."""
    command = [sys.executable, "-m", "tests.distributed.endless", str(tmp_path), "3"]
    running = [tmp_path / f"running{rank}" for rank in range(3)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as all_ranks:
        try:
            while not all(path.exists() and path.read_text() for path in running):
                assert all_ranks.poll() is None
                time.sleep(0.1)
            os.kill(int(running[1].read_text()), signal.SIGKILL)
            printed, _ = all_ranks.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(all_ranks.pid, signal.SIGKILL)
    assert json.loads(printed) == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        said = (tmp_path / f"said{rank}").read_text()
        assert f"failed on rank {rank} of 3, because another rank has ended" in said
