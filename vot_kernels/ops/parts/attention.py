"""What every backend of an attention op is asked: `forward(inputs, geometry, options)` and `backward(saved, grads, …)`.

`Inputs`, `Saved` and `Geometry` are each op's own; a backward returns the gradients of the inputs as `Inputs`.
"""

from typing import NamedTuple

from torch import Tensor

VARIANTS = (None, "tma", "warp_specialized", "fused")


class Options(NamedTuple):
    """How to compute, apart from which rows see which.

    Attributes:
        feature_map: phi of far tokens.
        scale: factor on q.k of near tokens.
        deterministic: whether the backward must give the same bits for the same inputs.
        variant: one of `VARIANTS`, the form of the Triton kernels of range attention to use where it can run, or None
            for the default of the config tables.
    """

    feature_map: str = "softmax"
    scale: float = 1.0
    deterministic: bool = False
    variant: str | None = None


class Grads(NamedTuple):
    """Gradients of what a forward returned.

    Attributes:
        d_out: shaped like the output.
        d_lse: shaped like lse, None for 0.
    """

    d_out: Tensor
    d_lse: Tensor | None = None
