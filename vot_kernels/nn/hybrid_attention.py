"""Multi-head self-attention over packed tokens on the hybrid attention op."""

import torch
from torch import Tensor, nn

from vot_kernels.nn.attention_projections import AttentionProjections, Rotary
from vot_kernels.ops.attention_options import CAUSAL_MODES, FEATURE_MAPS, Causal, Window, window_sides
from vot_kernels.ops.checks import check_causal, check_choice
from vot_kernels.ops.hybrid_attention import HybridAttentionState, hybrid_attention, hybrid_attention_step
from vot_kernels.packing import PackedLayout


class HybridAttention(AttentionProjections):
    """Projections, query-key norm and rotary around `hybrid_attention`, with a learned beta per head.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None is as many.
        head_dim: None is dim / num_heads.
        window: near groups, see `hybrid_attention`; None is exact softmax attention, which has no beta.
        causal: None, "group" or "token"; False is None and True is "token".
        feature_map: phi of the far part: "softmax", "elu" or "relu".
        beta_init: the initial log weight of far tokens, which is learned. With None it is 0 and there is no `beta`.
        qk_norm: RMSNorm with a learned scale over head_dim of q and k (Dehghani et al., 2023).
        bias: biases in the projections.
        rotary: `(q, k, layout) -> (q, k)`, applied after the norm; q and k are `[tokens, heads, head_dim]`.
        backend: the backend of the op, see `hybrid_attention`.

    Attributes:
        beta: `[num_heads]`, the log weight of far tokens, or None.

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
        causal: Causal = None,
        feature_map: str = "softmax",
        beta_init: float | None = 0.0,
        qk_norm: bool = True,
        bias: bool = False,
        rotary: Rotary | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            bias=bias,
            rotary=rotary,
        )
        self.causal = check_causal(causal, CAUSAL_MODES)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        window_sides(window, self.causal)
        self.window, self.feature_map, self.backend = window, feature_map, backend
        self.beta_init = None if window is None else beta_init
        self.beta = None if self.beta_init is None else nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set `beta` to `beta_init`; the projections and norms have a `reset_parameters` of their own."""
        if self.beta is not None and self.beta_init is not None:
            nn.init.constant_(self.beta, self.beta_init)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Tokens `[tokens, dim]` to `[tokens, dim]`; slack rows come out as the output bias, or 0."""
        q, k, v = self.project(x, layout)
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
        q, k, v = self.project(x, layout)
        out, state = hybrid_attention_step(
            q, k, v, state, window=self.window, beta=self.beta, feature_map=self.feature_map
        )
        return self.out(out.flatten(1)), state

    def extra_repr(self) -> str:
        """The options of the op."""
        return (
            f"{super().extra_repr()}, window={self.window}, causal={self.causal!r}, "
            f"feature_map={self.feature_map!r}"
        )
