"""A feed-forward layer whose experts select themselves."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vot_kernels.nn.mlp import SwiGLU
from vot_kernels.ops.aoe import WEIGHTINGS, AoEAux, aoe
from vot_kernels.ops.checks import check_choice, check_number, check_size, check_tensor, check_width
from vot_kernels.ops.dispatch import check_backend


class ExpertUsage(NamedTuple):
    """How evenly the experts were used.

    Attributes:
        imbalance: the largest load over the mean load; 1 is balanced, num_experts / top_k the worst.
        idle: int64, number of experts without a token.
    """

    imbalance: Tensor
    idle: Tensor


@torch.no_grad()
def expert_usage(load: Tensor) -> ExpertUsage:
    """Measure how evenly a load is spread over the experts, without waiting for the device.

    Args:
        load: `[..., num_experts]`, the `load` of an `AoEAux`, or the loads of several layers or steps.

    Returns:
        Tensors of the shape `[...]` on the device of `load`.
    """
    return ExpertUsage(load.amax(-1) / load.mean(-1), (load == 0).sum(-1))


def matched_hidden(dim: int, d_ffn: int, rank: int, multiple_of: int = 8) -> int:
    """Return the hidden width at which an AoE expert has the parameters of a SwiGLU expert of width `d_ffn`.

    D = (3 d d_ffn - r d) / (r + 2 d), rounded to the nearest multiple, at least one multiple. It matches
    one expert to one expert: a shared expert adds the parameters of its own width.
    """
    exact = (3 * dim * d_ffn - rank * dim) / (rank + 2 * dim)
    return max(multiple_of, round(exact / multiple_of) * multiple_of)


class AutonomyOfExperts(nn.Module):
    """Σ over the top_k experts with the largest ‖x W_downᵢᵀ‖ of w_i · (SiLU(C_i W_upᵢᵀ) ⊙ x W_pᵢᵀ) W_oᵢ.

    Every expert starts with the same Frobenius norm of W_down, hence the same expected cache norm, so that none is
    favoured at first. A forward changes nothing on the module. With `return_aux=True` it also returns the outcome of
    the selection, and there are two ways to balance it, which may be combined:

        y, aux = layer(x, return_aux=True)
        loss = objective(y) + 0.01 * aux.balance_loss  # every expert's W_down receives gradient
        layer.update_selection_bias(aux.load)  # no gradient involved; after the step

    A shared expert is an ordinary SwiGLU that processes every token and whose output is added unweighted. It plays no
    part in the selection, and its parameters, `shared.*`, exist only if its width is not 0.

    Args:
        dim: width of the tokens.
        num_experts: number of experts.
        top_k: number of experts per token.
        d_ffn: width of the SwiGLU expert whose parameter count to match; give this or `hidden`.
        rank: width of the cache; default dim / 3 to a multiple of 8, the best in the paper's ablation.
        hidden: width of an expert.
        weighting: "topk_softmax" or "softmax_topk", see `vot_kernels.aoe`.
        bias_rate: step of `update_selection_bias`, in units of the cache norm.
        shared_hidden: width of the shared expert, 0 for none; not part of what `d_ffn` matches.
        backend: the backend of the op, see `vot_kernels.aoe`.

    Attributes:
        selection_bias: float32 buffer `[num_experts]`, added to the norms for selection only; it is saved.
        spread: the op in place of `vot_kernels.aoe` where the experts are spread over ranks, else None; see
            `vot_kernels.distributed.expert_parallel`.

    Raises:
        TypeError: `bias_rate` is not a number.
        ValueError: sizes or options do not fit together.

    Source: Lv et al., Autonomy-of-Experts Models, ICML 2025 (arXiv 2501.13074); bias rule of Wang et al.,
    Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1; shared expert of Dai et al.,
    DeepSeekMoE (arXiv 2401.06066), section 3.2.
    """

    selection_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        d_ffn: int | None = None,
        rank: int | None = None,
        hidden: int | None = None,
        weighting: str = "topk_softmax",
        bias_rate: float = 1e-3,
        shared_hidden: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if check_size("top_k", top_k) > check_size("num_experts", num_experts):
            raise ValueError(f"top_k must be from 1 to num_experts, got {top_k} of {num_experts}.")
        check_choice("weighting", weighting, WEIGHTINGS)
        check_backend(backend)
        check_number("bias_rate", bias_rate)
        rank = max(8, round(check_size("dim", dim) / 24) * 8) if rank is None else check_size("rank", rank)
        if (hidden is None) == (d_ffn is None):
            raise ValueError(f"Give exactly one of d_ffn and hidden, got d_ffn={d_ffn} and hidden={hidden}.")
        if hidden is None:
            hidden = matched_hidden(dim, check_size("d_ffn", d_ffn), rank)
        check_size("hidden", hidden)
        check_size("shared_hidden", shared_hidden, 0)
        self.top_k, self.weighting, self.bias_rate, self.backend = top_k, weighting, bias_rate, backend
        self.w_down = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden, rank))
        self.w_p = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w_o = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.shared = SwiGLU(dim, shared_hidden) if shared_hidden else None
        self.spread: Callable[..., Tensor | tuple[Tensor, AoEAux]] | None = None
        self.register_buffer("selection_bias", torch.zeros(num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights with unit-variance activations for unit-variance input, experts of equal norm, no bias."""
        hidden, rank = self.w_up.shape[1:]
        for weight, fan_in in (
            (self.w_down, 1),
            (self.w_up, rank),
            (self.w_p, self.w_p.shape[2]),
            (self.w_o, hidden),
        ):
            nn.init.normal_(weight, std=fan_in**-0.5)
        for linear in () if self.shared is None else (self.shared.gate_up, self.shared.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        # E‖C‖² = ‖W_down‖² for white input: equal Frobenius norms make the expected cache norms equal.
        self.w_down.mul_(rank**0.5 / torch.linalg.vector_norm(self.w_down, dim=(1, 2), keepdim=True))
        self.selection_bias.zero_()

    def forward(self, x: Tensor, return_aux: bool = False) -> Tensor | tuple[Tensor, AoEAux]:
        """Map `[..., dim]` to `[..., dim]`; under autocast in its dtype, with norms in float32 as always.

        Args:
            x: `[..., dim]`.
            return_aux: return (y, `AoEAux`), whose tensors have one row per token.

        Raises:
            TypeError, ValueError: x is not a tensor `[..., dim]`.
        """
        check_width("x", x, self.w_down.shape[2])
        op: Callable[..., Tensor | tuple[Tensor, AoEAux]] = self.spread or aoe
        result = op(
            x.reshape(-1, x.shape[-1]),
            self.w_down,
            self.w_up,
            self.w_p,
            self.w_o,
            self.top_k,
            weighting=self.weighting,
            bias=self.selection_bias,
            return_aux=return_aux,
            backend=self.backend,
        )
        y = (result[0] if isinstance(result, tuple) else result).view(x.shape)
        y = y if self.shared is None else y + self.shared(x)
        return (y, result[1]) if isinstance(result, tuple) else y

    @torch.no_grad()
    def update_selection_bias(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean load by `bias_rate`, lower it above; call it once per step.

        No gradient is involved: the bias changes who is selected, never the mixing weights.

        Args:
            load: `[num_experts]`, the `load` of the step's `AoEAux`, or its mean over several forwards or ranks of a
                step. All ranks must pass the same.

        Raises:
            ValueError: `load` has another shape.
        """
        check_tensor("load", load, [self.selection_bias.shape[0]])
        self.selection_bias.add_(torch.sign(load.mean() - load), alpha=self.bias_rate)

    def extra_repr(self) -> str:
        experts, rank, dim = self.w_down.shape
        return (
            f"dim={dim}, num_experts={experts}, top_k={self.top_k}, rank={rank}, "
            f"hidden={self.w_up.shape[1]}, weighting={self.weighting!r}, backend={self.backend!r}"
        )
