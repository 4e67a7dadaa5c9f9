"""What others put in the place of this package's parts, so that an encoder can be compared with its own variants."""

import torch
from torch import Tensor, nn

from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.ops.aoe import AoEAux
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.moe import moe
from vot_kernels.packing import PackedLayout

_FAR_ALONE = 30.0  # a log weight of far tokens beside which near ones vanish


class GatedAttention(HybridAttention):
    """Softmax over near tokens and linear attention over far ones, each with a normaliser of its own.

    The output of a head is (1 - g) near + g far with a learned gate g = sigmoid(beta), where `HybridAttention` has one
    normaliser for both. A token without far tokens has its near part alone. Without a window it is exact attention.

    Source: Munkhdalai et al., Leave No Context Behind (arXiv 2404.07143), section 2.1.2.
    """

    def forward(
        self, x: Tensor, layout: PackedLayout, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Map tokens `[tokens, dim]` to `[tokens, dim]`, as `HybridAttention` does."""
        if self.beta is None:
            return super().forward(x, layout, position_embeddings)
        q, k, v = self.project(x, layout, position_embeddings)
        near, far = (
            hybrid_attention(
                q,
                k,
                v,
                layout,
                window=self.window,
                beta=torch.full_like(self.beta, weight, requires_grad=False),
                feature_map=self.feature_map,
                causal=self.causal,
                scale=self.scale,
                backend=self.backend,
            )
            for weight in (-torch.inf, _FAR_ALONE)
        )
        return self.out(torch.lerp(near, far, self.beta.sigmoid()[:, None].to(near.dtype)).flatten(1))


class RoutedExperts(nn.Module):
    """Σ over the top_k experts that a linear router chooses of w_i · SwiGLU_i(x), with w the softmax of their logits.

    Args:
        dim: width of the tokens.
        num_experts: number of experts.
        top_k: number of experts per token.
        hidden: width of an expert.
        backend: the backend of the op, see `vot_kernels.moe`.

    Source: Fedus et al., Switch Transformers, JMLR 2022 (arXiv 2101.03961), equation 4, for the balance loss; Jiang et
    al., Mixtral of Experts (arXiv 2401.04088), section 2.1, for the weights.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, hidden: int, backend: str = "auto") -> None:
        super().__init__()
        self.top_k, self.backend = top_k, backend
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights with unit-variance activations for unit-variance input, as `AutonomyOfExperts` does."""
        for weight in (self.router.weight, self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, return_aux: bool = False) -> Tensor | tuple[Tensor, AoEAux]:
        """Map `[tokens, dim]` to `[tokens, dim]`; with `return_aux` return (y, aux), whose norms are the logits."""
        logits = self.router(x).float()
        chosen, indices = logits.topk(self.top_k, -1)
        weights = chosen.softmax(-1)
        y = moe(x, self.gate_up, self.down, indices, weights, backend=self.backend)
        if not return_aux:
            return y
        experts = logits.shape[-1]
        load = indices.flatten().bincount(minlength=experts) / max(1, len(x))
        balance = experts * (load * logits.softmax(-1).mean(0)).sum()
        return y, AoEAux(logits, indices, weights, load, balance)
