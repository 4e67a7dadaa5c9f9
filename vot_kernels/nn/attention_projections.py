"""The parts that the attention modules share: projections, query-key norm and rotary positions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vot_kernels.nn.rotary import RotaryEmbedding, rotate
from vot_kernels.ops.checks import check_layout, check_size, check_tensor
from vot_kernels.ops.dispatch import check_backend
from vot_kernels.packing import PackedLayout, brief

Rotary = Callable[[Tensor, Tensor, PackedLayout], tuple[Tensor, Tensor]]


class AttentionProjections(nn.Module):
    """The projections of packed tokens to queries, keys and values, and the output projection, without attention.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None means the same number.
        head_dim: None means dim / num_heads.
        qk_norm: RMSNorm with a learned scale over head_dim of q and k (Dehghani et al., 2023).
        bias: biases in the projections.
        rotary: `(q, k, layout) -> (q, k)`, applied after the norm; q and k are `[tokens, heads, head_dim]`.

        backend: the backend of the op that follows.

    Raises:
        TypeError: `rotary` cannot be called.
        ValueError: a size is below 1, the sizes do not divide each other, or `backend` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        head_dim: int | None,
        qk_norm: bool,
        bias: bool,
        rotary: Rotary | None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else check_size("num_kv_heads", num_kv_heads)
        if check_size("num_heads", num_heads) % kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}.")
        if check_size("dim", dim) % num_heads and head_dim is None:
            raise ValueError(
                f"dim must be a multiple of num_heads unless head_dim is given, got {dim} and {num_heads}."
            )
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, kv_heads
        self.head_dim = dim // num_heads if head_dim is None else check_size("head_dim", head_dim)
        if rotary is not None and not callable(rotary):
            raise TypeError(
                f"rotary must be a callable (q, k, layout) -> (q, k) or None, got {brief(rotary)}."
            )
        check_backend(backend)
        self.rotary, self.backend = rotary, backend
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def project(
        self, x: Tensor, layout: PackedLayout, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[tokens, num_heads, head_dim]`, k, v `[tokens, num_kv_heads, head_dim]` of x `[tokens, dim]`.

        `position_embeddings`, (cos, sin) as for `vot_kernels.nn.rotary.rotate`, replace `rotary`.
        """
        check_tensor("x", x, ["tokens", self.dim])
        check_layout("x", x, layout)
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if type(self.rotary) is RotaryEmbedding and position_embeddings is None:
            norms = self._joint_norms(x.device)
            if norms is not None:
                return *self.rotary(q, k, layout, norms), v
        q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            q, k = rotate(q, k, position_embeddings)
        elif self.rotary is not None:
            q, k = self.rotary(q, k, layout)
        return q, k, v

    def _joint_norms(self, device: torch.device) -> tuple[nn.RMSNorm, nn.RMSNorm] | None:
        """Return the norms of q and k where one op applies them and rotates; None where that is no gain.

        On a GPU PyTorch has a kernel for the norm, and that op has none.
        """
        q_norm, k_norm = self.q_norm, self.k_norm
        if device.type != "cpu" or type(q_norm) is not nn.RMSNorm or type(k_norm) is not nn.RMSNorm:
            return None
        whole = q_norm.weight is not None and k_norm.weight is not None and q_norm.eps is not None
        return (q_norm, k_norm) if whole and q_norm.eps == k_norm.eps else None

    def extra_repr(self) -> str:
        """Return the sizes of the heads."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
