"""Training over ranks gives the losses and weights of one process; segments are shared by cost."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.training_cases import CASES
from vot_kernels.distributed import assign
from vot_kernels.packing import PackedLayout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(CASES, 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(outcomes, case):
    assert not outcomes[case], outcomes[case]


def test_torchrun_trains_one_model(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = "encoder --num-frames 2 --eval-clips 2 --contrastive 0 --teacher random --steps 2 --batch-size 2"
    command = [*launch, "-m", "vot_kernels.train", *stage.split(), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Teacher: ") == 1
    assert json.loads((tmp_path / "model" / "training.json").read_text())["processes"] == 2


def test_other_stages_refuse_several_processes(monkeypatch, capsys):
    from vot_kernels import cli

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["vot", "train", "preference", "checkpoint", "--out", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "vot train preference runs in one process, but torchrun has started 4" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [0, 1, None])
def test_segments_are_shared_by_cost(world_size, window):
    sizes = np.random.randint(1, 6, (20, 3)).tolist()
    layout = PackedLayout.from_grid_thw(sizes)
    shares = assign(layout, world_size, window=window, token_cost=8.0)
    assert sorted(segment for own in shares for segment in own) == list(range(20))
    assert shares == assign(layout, world_size, window=window, token_cost=8.0)

    def cost(grid):
        frames, *sides = grid
        tokens = int(np.prod(sides))
        near = sum(
            min(frames, t + (frames if window is None else window) + 1)
            - max(0, t - (frames if window is None else window))
            for t in range(frames)
        )
        return tokens * (tokens * near + 8.0 * frames)

    loads = [sum(cost(sizes[segment]) for segment in own) for own in shares]
    assert max(loads) - min(loads) <= max(map(cost, sizes))


def test_fewer_segments_than_ranks_leave_some_without():
    assert assign(PackedLayout.from_lengths([7, 2]), 3) == [[0], [1], []]
    assert assign(PackedLayout.from_lengths([]), 2) == [[], []]
