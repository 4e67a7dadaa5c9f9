"""What every backend of an attention op is asked: `forward(inputs, geometry, options)` and `backward(saved, grads, …)`.

`Inputs`, `Saved` and `Geometry` are each op's own; a backward returns the gradients of the inputs as `Inputs`.
"""

from typing import NamedTuple

from torch import Tensor

VARIANTS = (None, "fused")


class Options(NamedTuple):
    """How to compute, apart from which rows see which.

    Attributes:
        feature_map: phi of far tokens.
        scale: factor on q.k of near tokens.
        deterministic: whether the backward must give the same bits for the same inputs.
        variant: one of `VARIANTS`, the form of a kernel to take whatever the config table prefers, None for what it
            prefers. "fused" is the backward with 5 matrix products per block instead of 7, which adds up dq in no
            fixed order.
    """

    feature_map: str = "softmax"
    scale: float = 1.0
    deterministic: bool = False
    variant: str | None = None

    @property
    def repeats(self) -> bool | None:
        """Whether the bits of the backward must repeat: True, False with "fused", None for no wish."""
        return False if self.variant == "fused" else self.deterministic or None


class Grads(NamedTuple):
    """Gradients of what a forward returned.

    Attributes:
        d_out: shaped like the output.
        d_lse: shaped like lse, None for 0.
    """

    d_out: Tensor
    d_lse: Tensor | None = None
