"""Multi-head self-attention over packed tokens on the linear attention op."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vot_kernels.nn.attention_projections import AttentionProjections, Rotary
from vot_kernels.ops.attention_options import FEATURE_MAPS, TOKEN_CAUSAL_MODES, Causal
from vot_kernels.ops.checks import check_causal, check_choice
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.packing import PackedLayout

DECAYS = (None, "fixed", "learned")


class LinearAttention(AttentionProjections):
    """Projections, query-key norm and rotary around `linear_attention`, with an optional decay per head.

    It is the ablation of `HybridAttention` in which every token of the segment is far.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None means the same number.
        head_dim: None means dim / num_heads.
        causal: None or "token"; False means None, and True means "token".
        feature_map: "softmax", "elu" or "relu".
        decay: None, "fixed" or "learned": the weight of a token n places back is multiplied by decay_h ** n in head h.
            It needs causal="token".
        decay_init: the decay of each head, from 0 to 1 but not 0, and not 1 if it is learned; default
            1 - 2 ** -(5 + h) for head h, as in retention (Sun et al., 2023, section 2.2).
        qk_norm: RMSNorm with a learned scale over head_dim of q and k (Dehghani et al., 2023).
        bias: biases in the projections.
        rotary: `(q, k, layout) -> (q, k)`, applied after the norm; q and k are `[tokens, heads, head_dim]`.
        backend: the backend of the op, see `linear_attention`.

    Attributes:
        decay_logit: `[num_heads]`, whose sigmoid is the decay: a parameter if learned, a saved buffer if fixed, else
            None.
        spread: the op in place of `vot_kernels.linear_attention` where rows are spread over ranks, else None; see
            `vot_kernels.distributed.context_parallel`.

    Raises:
        TypeError: `rotary` cannot be called.
        ValueError: sizes or options do not fit together, or a decay is out of range.
    """

    decay_logit: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: Causal = None,
        feature_map: str = "softmax",
        decay: str | None = None,
        decay_init: Sequence[float] | None = None,
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
            backend=backend,
        )
        self.causal = check_causal(causal, TOKEN_CAUSAL_MODES)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        check_choice("decay", decay, DECAYS)
        if decay is not None and self.causal != "token":
            raise ValueError(f'decay={decay!r} needs causal="token", got causal={self.causal!r}.')
        if decay is None and decay_init is not None:
            raise ValueError('decay_init needs decay="fixed" or "learned", got decay=None.')
        self.feature_map, self.decay, self.decay_init = feature_map, decay, decay_init
        self.spread: Callable[..., Tensor] | None = None
        if decay == "learned":
            self.decay_logit = nn.Parameter(torch.empty(num_heads))
        else:
            self.register_buffer("decay_logit", None if decay is None else torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the decays to `decay_init`; the projections and norms have a `reset_parameters` of their own."""
        if self.decay_logit is not None:
            self.decay_logit.copy_(_decay_logit(self.num_heads, self.decay_init, self.decay == "learned"))

    @property
    def log_decay(self) -> Tensor | None:
        """The logarithm of the decays, `[num_heads]`, in float32 or wider; None without a decay."""
        if self.decay_logit is None:
            return None
        return logsigmoid(self.decay_logit.to(accumulator(self.decay_logit.dtype)))

    def forward(
        self, x: Tensor, layout: PackedLayout, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Map tokens `[tokens, dim]` to `[tokens, dim]`; `position_embeddings` as for `HybridAttention`."""
        q, k, v = self.project(x, layout, position_embeddings)
        op: Callable[..., Tensor] = self.spread or linear_attention
        out = op(
            q,
            k,
            v,
            layout,
            feature_map=self.feature_map,
            causal=self.causal,
            log_decay=self.log_decay,
            backend=self.backend,
        )
        return self.out(out.flatten(1))

    def extra_repr(self) -> str:
        """The options of the op."""
        return (
            f"{super().extra_repr()}, causal={self.causal!r}, feature_map={self.feature_map!r}, "
            f"decay={self.decay!r}"
        )


def _decay_logit(heads: int, decays: Sequence[float] | None, learned: bool) -> Tensor:
    """Return the logits of the given decays, or of the default ones, in float64 on the CPU."""
    if decays is None:
        bits = torch.arange(5, 5 + heads, dtype=torch.float64, device="cpu").clamp_(
            max=40
        )  # larger exponents give 1 in any case
        return (2**bits - 1).log()
    given = torch.as_tensor(decays, dtype=torch.float64, device="cpu")
    if given.shape != (heads,):
        raise ValueError(
            f"decay_init must have {heads} numbers, one per head, got shape {list(given.shape)}."
        )
    inside = (given > 0) & ((given < 1) if learned else (given <= 1))
    if not inside.all():
        limit = "below 1 to be learned" if learned else "at most 1"
        raise ValueError(f"decay_init must be above 0 and {limit}, got {given[~inside][0].item():g}.")
    return given.logit()
