"""Results must not depend on how many threads compute them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differing(compute: Callable[[], Sequence[Tensor]]) -> list[str]:
    """Which results have other bits with 2 or 3 threads than with 1; none should."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([x.detach().clone() for x in compute()])
    finally:
        torch.set_num_threads(before)
    return [
        f"result {i} on {threads} threads"
        for threads, found in zip((2, 3), results[1:], strict=True)
        for i, (a, b) in enumerate(zip(found, results[0], strict=True))
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    ]
