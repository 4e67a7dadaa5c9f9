"""The interface of the attention backends: `forward(inputs, geometry, options)` and `backward(saved, grads, …)`.

Each op has its own `Inputs`, `Saved` and `Geometry`; a backward returns the gradients of the inputs as `Inputs`.
"""

from typing import NamedTuple

from torch import Tensor

VARIANTS = (None, "plain", "tma", "warp_specialized", "gluon", "fused")


class Options(NamedTuple):
    """How to compute the result, apart from which rows see which keys.

    Attributes:
        feature_map: phi of far tokens.
        scale: factor on q.k of near tokens.
        deterministic: whether the backward must give bitwise equal results for the same inputs.
        variant: the form of the Triton kernels of range attention to use where it can run, one of `VARIANTS`, or None
            for the default of the config tables.
    """

    feature_map: str = "softmax"
    scale: float = 1.0
    deterministic: bool = False
    variant: str | None = None


class Grads(NamedTuple):
    """The gradients of a forward's results.

    Attributes:
        d_out: shaped like the output.
        d_lse: shaped like lse, or None for 0.
    """

    d_out: Tensor
    d_lse: Tensor | None = None
