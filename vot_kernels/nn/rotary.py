"""Rotary positions in time and space."""

from torch import Tensor, nn

from vot_kernels.ops.rope_qk_norm import rope_qk_norm
from vot_kernels.packing import PackedLayout


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by the (t, y, x) of their tokens; the attention modules accept it as `rotary`.

    Args:
        theta: base of the frequencies. Patch grids are small: 100 resolves them where text uses 10,000.
    """

    def __init__(self, theta: float = 100.0):
        super().__init__()
        self.theta = theta

    def forward(self, q: Tensor, k: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """q `[tokens, heads, head_dim]`, k `[tokens, kv_heads, head_dim]`; the same shapes, rotated."""
        return rope_qk_norm(q, k, layout.positions, theta=self.theta)
