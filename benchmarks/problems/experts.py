"""Autonomy-of-Experts and plain top-k mixtures of experts at one size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counters
from benchmarks.core import Work
from vot_kernels.nn.autonomy_of_experts import matched_hidden
from vot_kernels.ops.aoe.reference import aoe as aoe_reference
from vot_kernels.ops.moe.reference import moe as moe_reference

ROWS = 128  # rows of the output that are verified at full size
CANDIDATES = 512  # tokens among which rows with a clear selection are sought
CLEAR = (
    0.02  # the norm of the last selected expert must exceed that of the first one not selected by this share
)
TOPIC = 0.6  # length of a topic in a token, relative to the token's noise


@dataclass(frozen=True)
class AoE:
    """One call of `aoe` with the weighting "topk_softmax".

    Random weights alone would give every expert nearly the same norm (their relative spread is 1/√(2 rank)).
    Here each token carries the topics of `top_k` experts drawn at random, directions to which those experts
    respond, as experts do once trained: selections are mostly clear and loads are about equal.

    Near ties may still fall either way, so only tokens with a clear selection are verified, also on the small form:
    of `CANDIDATES` tokens spread over all, the first `ROWS` whose k-th and (k+1)-th norm differ by `CLEAR` or more in
    float64.

    Attributes:
        tokens, dim, experts, top_k, rank: as in `vot_kernels.aoe`.
        d_ffn: width of the SwiGLU experts whose parameters these experts match.
    """

    tokens: int = 8192
    dim: int = 512
    experts: int = 16
    top_k: int = 2
    rank: int = 64
    d_ffn: int = 512

    @property
    def op(self) -> str:
        return "aoe"

    @property
    def size(self) -> int:
        return self.tokens

    @property
    def hidden(self) -> int:
        """The width of the expert bodies, D in the paper."""
        return matched_hidden(self.dim, self.d_ffn, self.rank)

    def describe(self) -> str:
        return (
            f"{self.tokens:,} tokens of {self.dim}, {self.top_k} of {self.experts} experts, "
            f"rank {self.rank}, hidden {self.hidden}"
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return x, w_down, w_up, w_p, w_o with activations of unit scale."""
        normal = _normal(device, seed)
        n, d, r, h = self.experts, self.dim, self.rank, self.hidden
        w_down = normal(n, r, d) * d**-0.5
        topics = F.normalize(torch.einsum("nrd,nr->nd", w_down, normal(n, r)), dim=-1) * d**0.5
        own = normal(self.tokens, n).topk(self.top_k, dim=-1).indices
        topical = torch.zeros(self.tokens, n, device=device).scatter_(1, own, TOPIC) @ topics
        x = (normal(self.tokens, d) + topical) * (1 + self.top_k * TOPIC**2) ** -0.5
        w_up, w_p, w_o = normal(n, h, r) * r**-0.5, normal(n, h, d) * d**-0.5, normal(n, h, d) * h**-0.5
        return tuple(tensor.to(dtype) for tensor in (x, w_down, w_up, w_p, w_o))

    def rows(self, inputs: Sequence[Tensor]) -> Tensor:
        x, w_down = inputs[0].detach(), inputs[1].detach()
        rows = _spread(self.tokens, CANDIDATES, x.device)
        if self.top_k < self.experts:
            norms = torch.einsum("td,nrd->tnr", x[rows].double(), w_down.double()).norm(dim=-1)
            last, next_ = norms.topk(self.top_k + 1, dim=-1).values[:, -2:].unbind(-1)
            rows = rows[last - next_ >= CLEAR * last]
        if not len(rows):
            raise ValueError(f"no token of {self.describe()} has a clear selection to verify")
        return rows[:: max(1, len(rows) // ROWS)][:ROWS]

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        x, *weights = inputs
        return aoe_reference(x if rows is None else x[rows], *weights, self.top_k)[0]

    def small(self) -> "AoE":
        """Return at most 256 tokens and 16 experts of a few dozen dimensions."""
        experts = min(self.experts, 16)
        return replace(
            self,
            tokens=min(self.tokens, 256),
            dim=64,
            experts=experts,
            top_k=min(self.top_k, experts),
            rank=32,
            d_ffn=48,
        )

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.aoe(self, direction, itemsize)

    def plain(self) -> "MoE":
        """Return the mixture of ordinary SwiGLU experts with as many parameters."""
        return MoE(self.tokens, self.dim, self.d_ffn, self.experts, self.top_k)


@dataclass(frozen=True)
class MoE:
    """One call of a plain top-k mixture of SwiGLU experts whose routing is given.

    Attributes:
        tokens, dim, hidden, experts, top_k: as in `vot_kernels.ops.moe.reference.moe`.
        skew: 0 for equal loads; else the routing logits of the i-th expert are lowered by skew · ln(i).
    """

    tokens: int = 4096
    dim: int = 512
    hidden: int = 512
    experts: int = 8
    top_k: int = 2
    skew: float = 0.0

    @property
    def op(self) -> str:
        return "moe"

    @property
    def size(self) -> int:
        return self.tokens

    def describe(self) -> str:
        loads = f", skew {self.skew:g}" if self.skew else ""
        return (
            f"{self.tokens:,} tokens of {self.dim}, {self.top_k} of {self.experts} experts, "
            f"hidden {self.hidden}{loads}"
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return x, w_gate_up, w_down, topk_idx (int64), topk_weights (sum to 1, in `dtype` as from routers)."""
        normal = _normal(device, seed)
        x = normal(self.tokens, self.dim)
        w_gate_up = normal(self.experts, 2 * self.hidden, self.dim) * self.dim**-0.5
        w_down = normal(self.experts, self.dim, self.hidden) * self.hidden**-0.5
        handicap = self.skew * torch.arange(1, self.experts + 1, device=device).log()
        best = (normal(self.tokens, self.experts) - handicap).topk(self.top_k, dim=-1)
        weights = best.values.softmax(-1)
        return x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), best.indices, weights.to(dtype)

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        return None if self.tokens <= 1024 else _spread(self.tokens, ROWS, inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        x, w_gate_up, w_down, idx, weights = inputs
        if rows is not None:
            x, idx, weights = x[rows], idx[rows], weights[rows]
        return moe_reference(x, w_gate_up, w_down, idx, weights)

    def small(self) -> "MoE":
        """Return at most 256 tokens and 16 experts, of sizes that whole tiles fit."""
        experts = min(self.experts, 16)
        return replace(
            self,
            tokens=min(self.tokens, 256),
            dim=256,
            hidden=128,
            experts=experts,
            top_k=min(self.top_k, experts),
        )

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.moe(self, direction, itemsize)


def _normal(device: torch.device, seed: int):
    """Return a function for standard normal float32 tensors, each call with the next numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """Return at most `count` different indices from 0 to size - 1."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64).round().long().to(device)
