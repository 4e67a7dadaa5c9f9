"""The arguments that every backend of the flash-attn functions takes, except the reference."""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from vot_kernels.ops.parts.range_attention.triton import KeyRanges


class Inputs(NamedTuple):
    """The tensors of `flash_attn_varlen_func`, or the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor


class Saved(NamedTuple):
    """What the backward reads: the inputs and the results of the forward."""

    inputs: Inputs
    out: Tensor
    lse: Tensor


class Geometry(NamedTuple):
    """The keys of its segment that each query sees.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 `[segments + 1]`, on the device only.
        left, right: keys seen before and after the aligned position, None for all; 0 on the right if causal.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    left: int | None
    right: int | None

    def key_ranges(self) -> KeyRanges:
        """The same ranges as the kernels take them."""
        return KeyRanges.of_segments(*self)

    def host_bounds(self, inputs: Inputs) -> tuple[list[int], list[int]]:
        """The cumulative lengths of rows and of keys as numbers.

        Raises:
            ValueError: they do not ascend within the tensors.
        """
        rows = _host_bounds("cu_seqlens_q", self.cu_seqlens_q, "q", inputs.q)
        return rows, _host_bounds("cu_seqlens_k", self.cu_seqlens_k, "k", inputs.k)


def _host_bounds(name: str, bounds: Tensor, owner: str, x: Tensor) -> list[int]:
    """The cumulative lengths as numbers."""
    numbers = bounds.tolist()
    if numbers[0] != 0:
        raise ValueError(
            f"{name} must begin with 0, got {numbers[0]}: it has cumulative lengths, not lengths."
        )
    for before, number in pairwise([0, *numbers]):
        if not before <= number <= x.shape[0]:
            raise ValueError(
                f"{name} must ascend from 0 to at most the {x.shape[0]} rows of {owner}, "
                f"got {number} after {before}."
            )
    return numbers
