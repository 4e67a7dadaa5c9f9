"""Multi-head linear attention, the ablation of `HybridAttention` without its softmax part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.ops.checks import check_choice
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.packing import PackedLayout

DECAYS = (None, "fixed", "learned")


class LinearAttention(HybridAttention):
    """`HybridAttention` whose every token is far: normalised linear attention over the whole segment.

    Args:
        dim, num_heads: as there, and so are the other options but for `window` and `beta_init`, which have no
            meaning here.
        decay: None, "fixed" or "learned": a token n places back weighs decay_h ** n times as much in head h. Needs
            causal="token".
        decay_init: the decay of each head, from 0 to 1 but not 0, and not 1 if it is learned; default
            1 - 2 ** -(5 + h) of head h, those of retention (Sun et al., 2023, section 2.2).

    Attributes:
        decay_logit: `[num_heads]`, the decay is its sigmoid: a parameter if learned, a saved buffer if fixed, else
            None.

    Raises:
        ValueError: options that do not fit, or decays out of range.
    """

    decay_logit: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay: str | None = None,
        decay_init: Sequence[float] | None = None,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, window=None, **options)  # type: ignore[arg-type]
        check_choice("decay", decay, DECAYS)
        if decay is not None and self.causal != "token":
            raise ValueError(f'decay={decay!r} needs causal="token", got causal={self.causal!r}.')
        if decay is None and decay_init is not None:
            raise ValueError('decay_init needs decay="fixed" or "learned", got decay=None.')
        self.decay = decay
        logit = None if decay is None else _decay_logit(num_heads, decay_init, decay == "learned")
        if decay == "learned":
            assert logit is not None
            self.decay_logit = nn.Parameter(logit)
        else:
            self.register_buffer("decay_logit", logit)

    @property
    def log_decay(self) -> Tensor | None:
        """`[num_heads]` in float32 at least, or None without a decay."""
        if self.decay_logit is None:
            return None
        return logsigmoid(self.decay_logit.to(torch.promote_types(self.decay_logit.dtype, torch.float32)))

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Tokens `[tokens, dim]` to `[tokens, dim]`."""
        q, k, v = self._project(x, layout)
        out = linear_attention(
            q,
            k,
            v,
            layout,
            feature_map=self.feature_map,
            causal=self.causal == "token",
            log_decay=self.log_decay,
            backend=self.backend,
        )
        return self.out(out.flatten(1))

    def extra_repr(self) -> str:
        """The options of the op."""
        return f"{super().extra_repr()}, decay={self.decay!r}"


def _decay_logit(heads: int, decays: Sequence[float] | None, learned: bool) -> Tensor:
    """Logits of the given decays, or of the default ones, in the default dtype."""
    if decays is None:
        bits = torch.arange(5, 5 + heads, dtype=torch.float64).clamp_(max=40)  # farther is 1 in any case
        return (2**bits - 1).log().to(torch.get_default_dtype())
    given = torch.as_tensor(decays, dtype=torch.float64)
    if given.shape != (heads,):
        raise ValueError(
            f"decay_init must have {heads} numbers, one per head, got shape {list(given.shape)}."
        )
    inside = (given > 0) & ((given < 1) if learned else (given <= 1))
    if not inside.all():
        limit = "below 1, for it is learned" if learned else "at most 1"
        raise ValueError(f"decay_init must be above 0 and {limit}, got {given[~inside][0].item():g}.")
    return given.logit().to(torch.get_default_dtype())
