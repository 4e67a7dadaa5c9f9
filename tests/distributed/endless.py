"""`python -m tests.distributed.endless FOLDER RANKS`: attention over ranks, again and again.

Each rank writes its process ID to FOLDER/running{rank} after its first call, and errors to FOLDER/said{rank}. When all
have ended, the exit status of each is printed as JSON.
"""

import json
import os
import sys
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from vot_kernels.distributed import hybrid_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_qkv


def run(folder: Path, rank: int, ranks: int) -> None:
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout)
    layout = PackedLayout.from_lengths((8 * ranks,), group_size=4)
    q, k, v = make_qkv(8, requires_grad=True)
    running = folder / f"running{rank}"
    while True:
        hybrid_attention(q, k, v, layout, group=dist.group.WORLD, window=0).sum().backward()
        if not running.exists():
            running.write_text(str(os.getpid()))


if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    context = get_context("fork")  # they share what takes seconds to import
    processes = [context.Process(target=run, args=(folder, rank, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(json.dumps([process.exitcode for process in processes]))
