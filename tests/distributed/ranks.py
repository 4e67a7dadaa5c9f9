"""Starts the ranks of a file's tests once: every rank runs every case, and each test reads how its case ended.

A case is a function of the group. It computes what all ranks compute together and what one process computes, and raises
where these differ. Processes are costly to start, so the tests of a file share theirs.
"""

import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.multiprocessing import get_context

from tests.torchvision_operators import FOLDER, make_torchvision_importable

# A server finds `preloaded` from the root of the repository alone. A rank that was forked from one without it has the
# path of the tests, but not what they declared. It is still being made, and has no parent yet; this module is the first
# that it imports, before those of the cases.
if multiprocessing.current_process().name != "MainProcess":
    sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]
    make_torchvision_importable()

Case = Callable[[ProcessGroup], None]
Made = TypeVar("Made")


def run_ranks(
    cases: dict[str, Case], world_size: int, folder: Path, timeout_s: float = 120
) -> dict[str, str]:
    """Run the cases on `world_size` ranks and return what went wrong in each; "" if nothing did.

    Cases are functions at the top of a module, or partials of them, because ranks are new processes.
    """
    context = get_context("forkserver")  # imports what takes seconds once, not once for each rank
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    arguments = (world_size, folder, cases, timeout_s)
    ranks = [
        context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s + 60
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
    reports = [folder / f"{rank}.json" for rank in range(world_size)]
    found = [json.loads(path.read_text()) if path.exists() else {} for path in reports]
    return {
        name: "\n".join(
            f"rank {rank}: {report.get(name, 'not run')}"
            for rank, report in enumerate(found)
            if report.get(name, "not run")
        )
        for name in cases
    }


def _rank(rank: int, world_size: int, folder: Path, cases: dict[str, Case], timeout_s: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s / 4),
    )
    group, report = dist.group.WORLD, {}
    assert group is not None
    for name, case in cases.items():
        try:
            case(group)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc(limit=-2)
        (folder / f"{rank}.json").write_text(json.dumps(report))


def given_by_first(group: ProcessGroup, make: Callable[[], Made]) -> Made:
    """Let the first rank make something while the others wait, and return it on all."""
    box: list[Any] = [make() if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(box, group=group)
    return box[0]


class _Shared(torch.autograd.Function):
    """A tensor that all ranks have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, d_x: Tensor) -> tuple[Tensor, None]:
        total = d_x.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Joined(torch.autograd.Function):
    """The rows of all ranks; each rank's gradient is its part, since all ranks take the same loss of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        parts = [x.new_empty(max(counts), *x.shape[1:]) for _ in counts]
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, d_whole: Tensor) -> tuple[Tensor, None, None]:
        return d_whole[ctx.rows], None, None


def shared(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` with a gradient that is summed over the ranks."""
    return _Shared.apply(x, group)


def joined(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks, of which this one has `x`; differentiable if all ranks take the same loss of them."""
    return _Joined.apply(x, counts, group)


def shared_folder(group: ProcessGroup) -> Path:
    """A folder that all ranks know."""
    name = [tempfile.mkdtemp() if dist.get_rank(group) == 0 else ""]
    dist.broadcast_object_list(name, group=group)
    return Path(name[0])
