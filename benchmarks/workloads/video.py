"""Decoding and packing, on the CPU of any machine."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.video import DecodeAndPack


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of the suite, which are the same for every device."""
    forward = ("forward",)
    for name, problem, quick in (
        ("bikes-16", DecodeAndPack("bikes", 16), ()),
        ("bikes-50", DecodeAndPack("bikes", 50), ()),
        ("digitworld-16", DecodeAndPack("digitworld", 16, patch_size=8), forward),
    ):
        yield Workload("video", name, problem, torch.float32, "cpu", forward, quick)
