"""The tensors and options that every backend of linear attention takes, except the reference."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of `linear_attention`, or the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None


class Saved(NamedTuple):
    """What the backward reads: the inputs and the results of the forward."""

    inputs: Inputs
    out: Tensor
    inverse: Tensor


class Geometry(NamedTuple):
    """Which tokens see each other: all of a segment, or each token those up to itself.

    Attributes:
        cu_seqlens: int32, as in `PackedLayout`, on the device.
        host_cu_seqlens: the same on the host.
        causal: None or "token".
    """

    cu_seqlens: Tensor
    host_cu_seqlens: Tensor
    causal: str | None


class Options(NamedTuple):
    """How to compute the result.

    Attributes:
        feature_map: phi.
        decay_gradient: whether the backward computes the gradient of log_decay, if there is one.
    """

    feature_map: str
    decay_gradient: bool = False
