"""Vision towers of other packages' models: many images of mixed sizes, and one clip."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.towers import FAMILIES, Sizes, Tower


def images(count: int, largest: int) -> Sizes:
    """Return images of mixed sizes and aspect ratios, from icons to `largest` patches on a side, in no order."""
    even = [2 * side for side in range(1, largest // 2 + 1)]
    return tuple(
        (1, even[7 * i % len(even)], even[(5 * i + i // len(even)) % len(even)]) for i in range(count)
    )


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of the suite, the most informative first."""
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    inputs = {
        "images": images(64, 64) if cuda else images(32, 16),
        "clip": ((32, 32, 32),) if cuda else ((32, 12, 16),),
    }
    for name, sizes in inputs.items():
        for head_dim, family in FAMILIES.items():
            quick = ("forward",) if (name, head_dim) == ("images", 64) and not cuda else ()
            yield Workload(
                "towers",
                f"{name}-{family.name.lower()}-d{head_dim}",
                Tower(head_dim, sizes, layers=2 if cuda or family.window else 1),
                dtype,
                device,
                ("forward", "both"),
                quick,
            )
