"""The dense feed-forward block."""

import torch.nn.functional as F
from torch import Tensor, nn

from vot_kernels.ops.checks import check_size


class SwiGLU(nn.Module):
    """`W_o(SiLU(W_g x) * W_u x)` (Shazeer, 2020), without biases.

    Args:
        dim: width of the input and the output.
        hidden: width between them.

    Raises:
        ValueError: a width is below 1.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        check_size("dim", dim)
        check_size("hidden", hidden)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim]` to `[..., dim]`."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
