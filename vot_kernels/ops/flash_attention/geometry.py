"""The tensors and bounds that every backend of the flash-attn functions is given, but for the reference."""

from typing import NamedTuple

from torch import Tensor

from vot_kernels.ops.parts.range_attention.triton import KeyRanges


class Inputs(NamedTuple):
    """The tensors of `flash_attn_varlen_func`, or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor


class Saved(NamedTuple):
    """What the backward reads: the inputs, and what the forward returned for them."""

    inputs: Inputs
    out: Tensor
    lse: Tensor


class Geometry(NamedTuple):
    """Which keys of its segment each query sees.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 `[segments + 1]`, on the device alone.
        left, right: keys seen before and after the aligned place, None for all; 0 on the right if causal.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    left: int | None
    right: int | None

    def key_ranges(self) -> KeyRanges:
        """The same for the kernels."""
        return KeyRanges.of_segments(*self)
