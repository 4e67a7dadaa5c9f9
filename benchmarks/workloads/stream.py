"""Steps of hybrid attention over a stream, a frame at a time."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.stream import HybridStep


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of the suite; the step has no kernel for GPUs."""
    if device == "cuda":
        return
    for tokens, dtype in (
        (256, torch.float32),
        (256, torch.bfloat16),
        (64, torch.float32),
        (1024, torch.float32),
    ):
        name = f"step-{tokens}-d64" + ("-bf16" if dtype == torch.bfloat16 else "")
        quick = ("forward",) if tokens == 256 else ()
        yield Workload("stream", name, HybridStep(tokens), dtype, "cpu", ("forward",), quick)
