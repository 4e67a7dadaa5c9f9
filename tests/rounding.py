"""Results that are computed twice, in other orders: equal but for roundings."""

import torch
from torch import Tensor

from vot_kernels.testing import max_error


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Say whether two results differ by at most 16 roundings of the largest finite number in `b`, or of 1.

    How far they are apart depends on the processor: its matrix products sum in orders of their own.
    """
    sizes = b.detach().abs()
    largest = max([1.0, *sizes[sizes.isfinite()].flatten().tolist()])
    return max_error(a, b) <= 16 * torch.finfo(a.dtype).eps * largest
