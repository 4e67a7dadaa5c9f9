"""Results that are computed twice, in other orders: equal but for roundings."""

import torch
from torch import Tensor

from vot_kernels.testing import max_error


def nearly_equal(a: Tensor, b: Tensor, roundings: float = 16.0) -> bool:
    """Say whether two results differ by at most so many roundings of the largest finite number in `b`.

    How far they are apart depends on the processor: its matrix products sum in orders of their own.
    """
    sizes = b.detach().abs()
    largest = max([1.0, *sizes[sizes.isfinite()].flatten().tolist()])
    return max_error(a, b) <= roundings * torch.finfo(a.dtype).eps * largest
