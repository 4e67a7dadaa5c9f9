"""Whole encoders: images of mixed sizes, and one long clip."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.encoder import Encoder

# (frames, height, width) in patches of 8 pixels, from thumbnails to 288 × 224, in the aspect ratios of photographs.
IMAGES = tuple(
    (1, h, w) for h, w in ((36, 28), (28, 36), (24, 24), (16, 28), (20, 15), (12, 12), (8, 14), (10, 6))
)
THUMBNAILS = tuple((1, h, w) for h, w in ((18, 14), (12, 12), (8, 14), (10, 6), (4, 9)))
# The same for patches of 16: up to 1,024 × 768 pixels.
PHOTOGRAPHS = tuple(
    (1, h, w) for h, w in ((64, 48), (36, 64), (40, 40), (24, 32), (32, 18), (14, 14), (12, 20), (8, 8))
)


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of the suite, the most informative first."""
    yield from (_cuda if device == "cuda" else _cpu)()


def _cpu() -> Iterator[Workload]:
    both = ("forward", "both")
    # With these seeds no token's choice of experts is closer than 2e-5, so that rounding cannot change it.
    clip = Encoder("nano", ((48, 8, 8),), attention="hybrid", seed=3)
    yield Workload("encoder", "long-clip-nano", clip, torch.float32, "cpu", both)
    images = Encoder("nano", IMAGES, seed=5)
    yield Workload("encoder", "mixed-images-nano", images, torch.float32, "cpu", both, quick=("forward",))
    yield Workload(
        "encoder",
        "thumbnails-nano",
        Encoder("nano", THUMBNAILS, seed=7),
        torch.float32,
        "cpu",
        ("forward",),
        quick=("forward",),
    )


def _cuda() -> Iterator[Workload]:
    def workload(name: str, problem: Encoder, directions: tuple[str, ...] = ("forward", "both")) -> Workload:
        return Workload("encoder", name, problem, torch.bfloat16, "cuda", directions)

    # 64 frames of 256 × 256 pixels, and 256 of them: 16,384 and 65,536 patches.
    yield workload("long-clip-small", Encoder("small", ((64, 16, 16),), "hybrid", experts=False))
    yield workload(
        "very-long-clip-base", Encoder("base", ((256, 16, 16),), "hybrid", experts=False), ("forward",)
    )
    yield workload("mixed-images-small", Encoder("small", PHOTOGRAPHS * 4, experts=False))
    yield workload("mixed-images-base", Encoder("base", PHOTOGRAPHS * 2, experts=False))
    yield workload("photographs-small", Encoder("small", PHOTOGRAPHS, experts=False), ("forward",))
