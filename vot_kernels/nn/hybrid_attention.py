"""Multi-head self-attention over packed tokens on the hybrid attention op."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vot_kernels.nn.attention_conversion import AttentionParts, answers, linear_of, sample_of, take_apart
from vot_kernels.nn.attention_projections import AttentionProjections, Rotary
from vot_kernels.nn.rotary import positions_per_call
from vot_kernels.ops.attention_options import CAUSAL_MODES, FEATURE_MAPS, Causal, Window, window_sides
from vot_kernels.ops.checks import check_causal, check_choice, check_number, check_scale
from vot_kernels.ops.hybrid_attention import HybridAttentionState, hybrid_attention, hybrid_attention_step
from vot_kernels.packing import PackedLayout


class HybridAttention(AttentionProjections):
    """Projections, query-key norm and rotary around `hybrid_attention`, with a learned weight of far tokens per head.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None means the same number.
        head_dim: None means dim / num_heads.
        window: near groups, see `hybrid_attention`; None means exact softmax attention, which has no beta.
        causal: None, "group" or "token"; False means None, and True means "token".
        feature_map: phi of the far part: "softmax", "elu" or "relu".
        scale: factor on q.k of near tokens; None means head_dim ** -0.5.
        beta_init: the initial log weight of far tokens, which is learned. None means 0 without a parameter `beta`.
        far_init: the initial weight itself, >= 0, which is learned in place of its log. 0 starts as window attention
            and can learn; beta_init = -inf cannot.
        qk_norm: RMSNorm with a learned scale over head_dim of q and k (Dehghani et al., 2023).
        bias: biases in the projections.
        rotary: `(q, k, layout) -> (q, k)`, applied after the norm; q and k are `[tokens, heads, head_dim]`.
        backend: the backend of the op, see `hybrid_attention`.

    Attributes:
        beta: `[num_heads]`, the log weight of far tokens, or None.
        far_weight: `[num_heads]`, the weight of far tokens, or None. A negative one counts as its size.
        spread: the op in place of `vot_kernels.hybrid_attention` where rows are spread over ranks, else None; see
            `vot_kernels.distributed.context_parallel`.

    Raises:
        TypeError: a factor or an initial weight is not a number, or `rotary` cannot be called.
        ValueError: a size is below 1, sizes do not divide each other, `far_init` is negative, or an option is unknown.
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
        scale: float | None = None,
        beta_init: float | None = 0.0,
        far_init: float | None = None,
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
        self.causal = check_causal(causal, CAUSAL_MODES)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        window_sides(window, self.causal)
        self.window, self.feature_map = window, feature_map
        self.scale = check_scale("scale", scale, self.head_dim)
        if far_init is not None and not check_number("far_init", far_init) >= 0:
            raise ValueError(f"far_init must be a weight >= 0 or None, got {far_init}.")
        self.far_init = None if window is None else far_init
        self.far_weight = None if self.far_init is None else nn.Parameter(torch.empty(num_heads))
        if beta_init is not None:
            check_number("beta_init", beta_init)
        self.beta_init = None if window is None or far_init is not None else beta_init
        self.beta = None if self.beta_init is None else nn.Parameter(torch.empty(num_heads))
        self.spread: Callable[..., Tensor] | None = None
        self.reset_parameters()

    @classmethod
    def from_attention(
        cls,
        module: nn.Module,
        *,
        window: Window = None,
        causal: Causal = None,
        feature_map: str = "softmax",
        beta_init: float | None = 0.0,
        far_init: float | None = None,
        rotary: Rotary | None = None,
        backend: str = "auto",
        check: bool = True,
    ) -> "HybridAttention":
        """Convert the attention of another package to packed tokens; with `window=None` it computes the same.

        It takes `nn.MultiheadAttention` and self-attention made of linear layers: `qkv` and `proj` (Qwen-VL, timm), or
        one layer each for queries, keys and values (SigLIP, ViT, CLIP, DINO in transformers), with or without biases
        and with norms of each head (`q_norm`, `k_norm`). Weights are copied and keep their dtype, device and
        `requires_grad`.

        **Positions.** A module whose forward takes `position_embeddings` takes them per call here too, for packed
        tokens: `attention(x, layout, position_embeddings=(cos, sin))`. CLS and register tokens have cos 1 and sin 0.
        A module that rotates in another way needs a `rotary`.

        **The far weight.** A converted module with a window differs from the original only in far tokens. beta_init =
        -inf leaves them out. That is window attention, with a gradient of beta that is 0, so that training never
        includes them. A very negative number, such as -10, starts close to that and can learn; far_init = 0 starts at
        window attention and can learn. beta_init = 0 uses phi(q).phi(k) unchanged, which for "softmax" is about
        1 / head_dim and so much less than exp(scale q.k). `fit_beta` finds the best beta from sample tokens.

        Args:
            module: the attention module, which is not changed.
            window, causal, feature_map, beta_init, far_init, backend: as for this class; the default is exact
                attention. A causal module needs a `causal`.
            rotary: `(q, k, layout) -> (q, k)` for a module whose positions are not given per call, or instead of them.
            check: compare with the module on a few random tokens in float64, without window and `rotary`. A module
                whose positions come from `rotary` alone is not compared.

        Raises:
            TypeError: `module` is not a module.
            ValueError: none of the above layouts is found, the module does more than HybridAttention can (dropout, a
                sliding window, other parameters), or the comparison fails.
        """
        parts = take_apart(module)
        if parts.causal and check_causal(causal, CAUSAL_MODES) is None:
            raise ValueError(f'{parts.kind} is causal, so causal must be "token" or "group", got {causal!r}.')
        with torch.device("meta"):  # every parameter is replaced below
            attention = cls(
                parts.weight.shape[1],
                parts.num_heads,
                num_kv_heads=parts.num_kv_heads,
                head_dim=parts.head_dim,
                window=window,
                causal=causal,
                feature_map=feature_map,
                scale=parts.scale,
                beta_init=beta_init,
                far_init=far_init,
                qk_norm=False,
                rotary=positions_per_call if rotary is None and parts.per_call else rotary,
                backend=backend,
            )
        attention.qkv = linear_of(parts.weight, parts.bias)
        attention.out = linear_of(parts.out.weight, parts.out.bias)
        attention.q_norm = nn.Identity() if parts.q_norm is None else copy.deepcopy(parts.q_norm)
        attention.k_norm = nn.Identity() if parts.k_norm is None else copy.deepcopy(parts.k_norm)
        for name in ("beta", "far_weight"):
            if getattr(attention, name) is not None:
                setattr(attention, name, nn.Parameter(parts.weight.new_empty(parts.num_heads)))
        attention.reset_parameters()
        if check and not parts.weight.is_meta and (rotary is None or parts.per_call):
            attention._compare(module, parts)
        return attention.train(module.training)

    @torch.no_grad()
    def _compare(self, module: nn.Module, parts: AttentionParts) -> None:
        """Raise a ValueError unless the module computes what this one does without a window."""
        x, position_embeddings = sample_of(parts)
        ours = copy.deepcopy(self).to("cpu", torch.float64)
        ours.window, ours.causal, ours.backend = None, "token" if parts.causal else None, "auto"
        layout = PackedLayout.from_lengths([len(x)])
        expected = ours(x, layout, position_embeddings if parts.per_call else None)
        errors = [float((y - expected).abs().max()) for y in answers(module, x, position_embeddings)]
        if not errors or not min(errors) <= 1e-4 * float(expected.abs().max()):
            found = f"differs by {min(errors):.2g}" if errors else "cannot be called"
            raise ValueError(
                f"{parts.kind} has the parts of an attention module but computes something else (on sample tokens it "
                f"{found}); if it has positions of its own, give them as rotary, a callable (q, k, layout) -> (q, k)."
            )

    @torch.no_grad()
    def fit_beta(
        self, x: Tensor, layout: PackedLayout, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Set `beta` so that on these tokens the output of every head is as close to exact attention as beta allows.

        With N the sum of exp(scale q.k) over near tokens and L that of phi(q).phi(k) over far ones, the output of a
        token is o_near + w (o_far - o_near) with w = sigmoid(beta + log L/N). One number per head fits this to exact
        attention by least squares. Where attention is spread out, beta gives far tokens their share of its mass;
        where it is sharp, the mean of the far part would be wrong, and beta stays small.

        Args:
            x: `[tokens, dim]`, inputs of the module: some thousands of tokens like those that it will see.
            layout: of x.
            position_embeddings: as for `forward`.

        Returns:
            `beta`, from -17 to 17, computed in float64.

        Raises:
            ValueError: the module has no beta, or no token of x has far tokens.
        """
        if self.beta is None:
            raise ValueError(
                f"fit_beta needs a window and a learned beta, got window={self.window}, beta_init={self.beta_init}."
            )
        q, k, v = (t.double() for t in self.project(x, layout, position_embeddings))

        def attend(window: Window, beta: float) -> tuple[Tensor, Tensor]:
            return hybrid_attention(
                q,
                k,
                v,
                layout,
                window=window,
                beta=q.new_full((self.num_heads,), beta),
                feature_map=self.feature_map,
                causal=self.causal,
                scale=self.scale,
                return_lse=True,
            )

        exact, _ = attend(None, 0)
        near, near_lse = attend(self.window, -torch.inf)
        both, lse = attend(self.window, 0)
        seen = lse > near_lse
        if not seen.any():
            raise ValueError(
                "At least one token of x must have far tokens, but its layout has too few groups for the window."
            )
        ratio = torch.expm1(lse - near_lse).where(seen, 1).log()  # log L/N
        far = (both - near).where(seen[..., None], 0) / ratio.sigmoid()[..., None]  # o_far - o_near
        self.beta.copy_(_least_squares(ratio, far, exact - near))
        return self.beta

    def reset_parameters(self) -> None:
        """Set `beta` or `far_weight` to its start; the projections and norms have a `reset_parameters` of their own."""
        if self.beta is not None and self.beta_init is not None:
            nn.init.constant_(self.beta, self.beta_init)
        if self.far_weight is not None and self.far_init is not None:
            nn.init.constant_(self.far_weight, self.far_init)

    def forward(
        self, x: Tensor, layout: PackedLayout, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Map tokens `[tokens, dim]` to `[tokens, dim]`; slack rows become the output bias, or 0.

        Args:
            x: `[tokens, dim]`.
            layout: which rows belong to which segment and group.
            position_embeddings: cos and sin for this call, each `[tokens, head_dim]`, in place of `rotary`; dimension i
                is rotated with dimension i + head_dim / 2.
        """
        q, k, v = self.project(x, layout, position_embeddings)
        op: Callable[..., Tensor] = self.spread or hybrid_attention
        out = op(
            q,
            k,
            v,
            layout,
            window=self.window,
            beta=self.beta,
            far_weight=None if self.far_weight is None else magnitude(self.far_weight),
            feature_map=self.feature_map,
            causal=self.causal,
            scale=self.scale,
            backend=self.backend,
        )
        return self.out(out.flatten(1))

    def step(
        self,
        x: Tensor,
        layout: PackedLayout,
        state: HybridAttentionState | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, HybridAttentionState]:
        """Attend from the next group of a stream, for causal="group"; return `[tokens, dim]` and the next state.

        `layout` describes the rows of `x`; a rotary embedding finds their positions in the stream there, unless they
        are given by `position_embeddings`, as for `forward`.

        Raises:
            ValueError: the module is not causal over groups, or its window is None.
        """
        if self.causal != "group" or self.window is None:
            raise ValueError(
                'A stream needs causal="group" and a window that is not None, '
                f"got causal={self.causal!r} and window={self.window!r}."
            )
        q, k, v = self.project(x, layout, position_embeddings)
        beta = self.beta if self.far_weight is None else magnitude(self.far_weight).log()
        out, state = hybrid_attention_step(
            q,
            k,
            v,
            state,
            window=self.window,
            beta=beta,
            feature_map=self.feature_map,
            scale=self.scale,
            backend=self.backend if self.backend in ("cpp", "torch") else "auto",  # the others have no step
        )
        return self.out(out.flatten(1)), state

    def extra_repr(self) -> str:
        """The options of the op."""
        return (
            f"{super().extra_repr()}, window={self.window}, causal={self.causal!r}, "
            f"feature_map={self.feature_map!r}"
        )


def magnitude(weight: Tensor) -> Tensor:
    """Return |x| with the derivative 1 at 0, so that a far weight of 0 can be trained."""
    return torch.where(weight < 0, -weight, weight)


def _least_squares(ratio: Tensor, change: Tensor, wanted: Tensor) -> Tensor:
    """Return the beta `[heads]` with the least squares of sigmoid(beta + ratio) change - wanted.

    `ratio` is `[tokens, heads]`, the others are `[tokens, heads, head_dim]`.
    """
    square, product = change.square().sum(2), (change * wanted).sum(2)
    best = ratio.new_zeros(ratio.shape[1])
    for step in (1 / 4, 1 / 64):  # from -16 to 16, then about the best of these
        betas = best + step * torch.arange(-64, 65, device=ratio.device)[:, None]
        weights = ((beta + ratio).sigmoid() for beta in betas)
        errors = torch.stack([(w * (w * square - 2 * product)).sum(0) for w in weights])
        best = betas.gather(0, errors.argmin(0, keepdim=True))[0]
    return best
