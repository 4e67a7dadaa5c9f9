"""The memory-bound ops at the sizes of the encoder's presets."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.fused import (
    DenseResidual,
    DenseResidualNorm,
    NormalisePatches,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)

K = 1024
CLIPS = ((8, 24, 32), (1, 40, 51))  # a clip and an image, 8,184 patches
LONG_CLIPS = ((64, 24, 32), (16, 32, 32), (1, 64, 64))  # 69,632 patches
PHOTOGRAPHS = ((224, 224), (384, 256), (160, 480), (512, 512))


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of the suite, the most informative first."""
    yield from (_cuda if device == "cuda" else _cpu)()


def _cpu() -> Iterator[Workload]:
    def workload(name: str, problem) -> Workload:
        return Workload("fused", name, problem, torch.float32, "cpu", quick=("forward",))

    yield workload("dense-residual-8k", DenseResidual(8 * K))
    yield workload("rope-qk-norm-8k", RopeQkNorm(CLIPS))
    yield workload("size-aware-embedding-64", SizeAwareEmbedding(_images(64)))
    yield workload("pack-patches-4", PackPatches(PHOTOGRAPHS))


def _cuda() -> Iterator[Workload]:
    def workload(name: str, problem) -> Workload:
        directions = ("forward",) if isinstance(problem, PackPatches) else ("forward", "backward", "both")
        return Workload("fused", name, problem, torch.bfloat16, "cuda", directions)

    yield workload("dense-residual-64k", DenseResidual(64 * K))
    yield workload("dense-residual-16k-24", DenseResidual(16 * K, width=1280, states=24))
    yield workload("dense-residual-norm-64k", DenseResidualNorm(64 * K))
    yield workload("rope-qk-norm-68k", RopeQkNorm(LONG_CLIPS))
    yield workload("rope-qk-norm-8k", RopeQkNorm(CLIPS))
    yield workload("size-aware-embedding-512", SizeAwareEmbedding(_images(512)))
    yield workload("pack-patches-64", PackPatches(PHOTOGRAPHS * 16))
    yield workload("pack-patches-4k", PackPatches(((2160, 3840),) * 4))
    yield workload("normalise-patches-64", NormalisePatches(PHOTOGRAPHS * 16))


def _images(count: int) -> tuple[tuple[int, int, int], ...]:
    """Return images of mixed sizes, in patches."""
    return tuple((1, 4 + i % 11, 5 + i % 13) for i in range(count))
