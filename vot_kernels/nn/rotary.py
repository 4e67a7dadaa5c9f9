"""Rotary positions, in time and space or by cos and sin that the caller gives."""

import torch
from torch import Tensor, nn

from vot_kernels.ops.checks import check_tensor
from vot_kernels.ops.rope_qk_norm import rope_qk_norm
from vot_kernels.packing import PackedLayout, brief


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by the (t, y, x) of their tokens; the attention modules accept it as `rotary`.

    Args:
        theta: base of the frequencies. Patch grids are small, so 100 is enough, where text uses 10,000.
    """

    def __init__(self, theta: float = 100.0):
        super().__init__()
        self.theta = theta

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        layout: PackedLayout,
        norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q `[tokens, heads, head_dim]` and k `[tokens, kv_heads, head_dim]`; shapes stay the same.

        `norms` of q and k over head_dim, with weights and one eps, are applied before, in the same pass.
        """
        if norms is None:
            return rope_qk_norm(q, k, layout.positions, theta=self.theta)
        return rope_qk_norm(
            q,
            k,
            layout.positions,
            q_weight=norms[0].weight,
            k_weight=norms[1].weight,
            theta=self.theta,
            eps=norms[0].eps or 0.0,
        )


def positions_per_call(q: Tensor, k: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Serve as `rotary` of attention that takes cos and sin with each call, and raise if a call lacks them.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "This attention takes its positions with each call: give position_embeddings=(cos, sin), each "
        "[tokens, head_dim], or set rotary to a callable (q, k, layout) -> (q, k)."
    )


def rotate(q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotate q and k by cos and sin, where dimension i is paired with dimension i + head_dim / 2.

    Args:
        q: `[tokens, heads, head_dim]`.
        k: `[tokens, kv_heads, head_dim]`.
        position_embeddings: cos and sin, each `[tokens, head_dim]`. A token with cos 1 and sin 0 does not change.

    Returns:
        The same shapes and dtypes; computed in the wider of both dtypes.

    Raises:
        TypeError, ValueError: it is not a pair, or cos or sin is not a tensor or has another shape.
    """
    if not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        raise TypeError(f"position_embeddings must be a pair (cos, sin), got {brief(position_embeddings)}.")
    for name, table in zip(("cos", "sin"), position_embeddings, strict=True):
        check_tensor(f"{name} of position_embeddings", table, [q.shape[0], q.shape[2]])
    cos, sin = (table[:, None] for table in position_embeddings)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return rotated(q), rotated(k)
