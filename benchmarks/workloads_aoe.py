"""Inputs and providers for timing Autonomy-of-Experts. Every provider computes the same function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.aoe import aoe


@dataclass(frozen=True)
class AoEWorkload:
    """One problem size. `hidden` is chosen for parameters equal to SwiGLU experts of width `d_ffn`."""

    tokens: int = 8192
    dim: int = 512
    experts: int = 16
    top_k: int = 2
    rank: int = 64
    d_ffn: int = 512

    @property
    def hidden(self) -> int:
        exact = (3 * self.dim * self.d_ffn - self.rank * self.dim) / (self.rank + 2 * self.dim)
        return round(exact / 8) * 8

    @property
    def forward_flops(self) -> int:
        """Multiply-adds counted twice: all caches, then the bodies of the selected experts."""
        cache = self.experts * self.rank * self.dim
        body = self.top_k * self.hidden * (self.rank + 2 * self.dim)
        return 2 * self.tokens * (cache + body)

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, w_down, w_up, w_p, w_o with activations of unit scale."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            ((self.tokens, self.dim), 1),
            ((self.experts, self.rank, self.dim), self.dim),
            ((self.experts, self.hidden, self.rank), self.rank),
            ((self.experts, self.hidden, self.dim), self.dim),
            ((self.experts, self.hidden, self.dim), self.hidden),
        )
        x, w_down, w_up, w_p, w_o = (
            (torch.randn(shape, generator=generator) * fan_in**-0.5).to(device, dtype)
            for shape, fan_in in shapes
        )
        return x, w_down, w_up, w_p, w_o


def ours(workload: AoEWorkload) -> Callable[..., Tensor]:
    """`vot_kernels.aoe` with the backend that "auto" picks."""
    return lambda *inputs: aoe(*inputs, workload.top_k)


def masked_loop(workload: AoEWorkload) -> Callable[..., Tensor]:
    """Every expert computes every token and a mask keeps what was selected."""

    def run(x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor) -> Tensor:
        cache = torch.einsum("td,nrd->tnr", x, w_down)
        top = torch.linalg.vector_norm(cache, dim=-1).topk(workload.top_k, dim=-1)
        weights = torch.zeros(cache.shape[:2], dtype=x.dtype, device=x.device)
        weights = weights.scatter(1, top.indices, top.values.softmax(-1))
        y = torch.zeros_like(x)
        for i in range(w_down.shape[0]):
            hidden = F.silu(cache[:, i] @ w_up[i].T) * (x @ w_p[i].T)
            y = y + weights[:, i, None] * (hidden @ w_o[i])
        return y

    return run


def gathered_loop(workload: AoEWorkload) -> Callable[..., Tensor]:
    """Per expert only its own tokens, with autograd through the whole `[tokens, experts, rank]` cache."""

    def run(x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor) -> Tensor:
        cache = torch.einsum("td,nrd->tnr", x, w_down)
        top = torch.linalg.vector_norm(cache, dim=-1).topk(workload.top_k, dim=-1)
        weights = top.values.softmax(-1)
        y = torch.zeros_like(x)
        for i in range(w_down.shape[0]):
            token, rank = (top.indices == i).nonzero(as_tuple=True)
            hidden = F.silu(cache[token, i] @ w_up[i].T) * (x[token] @ w_p[i].T)
            y = y.index_add(0, token, weights[token, rank, None] * (hidden @ w_o[i]))
        return y

    return run


PROVIDERS = {"vot_kernels": ours, "masked loop": masked_loop, "gathered loop": gathered_loop}
