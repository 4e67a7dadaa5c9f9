"""`python -m tests.distributed.endless FOLDER RANK RANKS`: attention over ranks, again and again."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vot_kernels.distributed import hybrid_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_qkv

folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
rendezvous = f"file://{folder / 'rendezvous'}"
timeout = timedelta(seconds=20)
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout)
layout = PackedLayout.from_lengths((8 * ranks,), group_size=4)
q, k, v = make_qkv(8, requires_grad=True)
while True:
    hybrid_attention(q, k, v, layout, group=dist.group.WORLD, window=0).sum().backward()
    (folder / f"running{rank}").touch()
