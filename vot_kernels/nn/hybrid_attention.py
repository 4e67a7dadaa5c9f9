"""Multi-head self-attention over packed tokens on the hybrid attention op."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vot_kernels.ops.attention_options import CAUSAL_MODES, FEATURE_MAPS, Window, window_sides
from vot_kernels.ops.checks import check_choice, check_layout, check_tensor
from vot_kernels.ops.hybrid_attention import HybridAttentionState, hybrid_attention, hybrid_attention_step
from vot_kernels.packing import PackedLayout

Rotary = Callable[[Tensor, Tensor, PackedLayout], tuple[Tensor, Tensor]]


class HybridAttention(nn.Module):
    """Projections, query-key norm and rotary around `hybrid_attention`, with a learned beta per head.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None is as many.
        head_dim: None is dim / num_heads.
        window: near groups, see `hybrid_attention`; None is exact softmax attention, which has no beta.
        causal: None, "group" or "token".
        feature_map: phi of the far part: "softmax", "elu" or "relu".
        beta_init: where the log weight of far tokens begins; it is learned.
        qk_norm: RMSNorm with a learned scale over head_dim of q and k (Dehghani et al., 2023).
        bias: biases in the projections.
        rotary: `(q, k, layout) -> (q, k)`, applied after the norm; q and k are `[tokens, heads, head_dim]`.
        backend: of the op.

    Raises:
        ValueError: sizes that do not divide, or an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: Window = 1,
        causal: str | None = None,
        feature_map: str = "softmax",
        beta_init: float = 0.0,
        qk_norm: bool = True,
        bias: bool = False,
        rotary: Rotary | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}.")
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads or head_dim given, got {dim} and {num_heads}."
            )
        check_choice("causal", causal, CAUSAL_MODES)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        window_sides(window, causal)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.window, self.causal, self.feature_map, self.backend = window, causal, feature_map, backend
        self.rotary = rotary
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.beta = None if window is None else nn.Parameter(torch.full((num_heads,), float(beta_init)))

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Tokens `[tokens, dim]` to `[tokens, dim]`; slack rows come out as the output bias, or 0."""
        q, k, v = self._project(x, layout)
        out = hybrid_attention(
            q,
            k,
            v,
            layout,
            window=self.window,
            beta=self.beta,
            feature_map=self.feature_map,
            causal=self.causal,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return self.out(out.flatten(1))

    def step(
        self, x: Tensor, layout: PackedLayout, state: HybridAttentionState | None = None
    ) -> tuple[Tensor, HybridAttentionState]:
        """The next group of a stream, for causal="group": output `[tokens, dim]` and the next state.

        `layout` describes the rows of `x`; a rotary embedding finds their positions in the stream there.

        Raises:
            ValueError: the module is not causal over groups, or its window is None.
        """
        if self.causal != "group" or self.window is None:
            raise ValueError(
                'A stream needs causal="group" and a window that is not None, '
                f"got causal={self.causal!r} and window={self.window!r}."
            )
        q, k, v = self._project(x, layout)
        out, state = hybrid_attention_step(
            q, k, v, state, window=self.window, beta=self.beta, feature_map=self.feature_map
        )
        return self.out(out.flatten(1)), state

    def extra_repr(self) -> str:
        """The options of the op."""
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"window={self.window}, causal={self.causal!r}, feature_map={self.feature_map!r}"
        )

    def _project(self, x: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor]:
        check_tensor("x", x, ["tokens", self.dim])
        check_layout("x", x, layout)
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, layout)
        return q, k, v
