"""Autonomy-of-Experts, written to be read: the oracle for every backend of `vot_kernels.aoe`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def aoe(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    top_k: int,
    *,
    weighting: str = "topk_softmax",
    bias: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the cache of every expert for every token; the `top_k` experts with the largest norms contribute.

    The arguments are those of `vot_kernels.aoe`, of any floating dtype. The result is differentiable. `indices`
    `[tokens, top_k]` replaces the selection: near ties may fall either way, so a backend is compared on its own
    choice.

    Returns:
        (y, norms, indices, weights, load, balance_loss), see `vot_kernels.ops.aoe.AoEAux`.

    Source: Lv et al., Autonomy-of-Experts Models, ICML 2025 (arXiv 2501.13074), section 3.
    """
    tokens, experts = x.shape[0], w_down.shape[0]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    cache = torch.einsum("td,nrd->tnr", x.to(accumulate), w_down.to(accumulate))
    peak = cache.detach().abs().amax(-1, keepdim=True)
    peak = torch.where(peak == 0, 1, peak)  # no square of cache / peak overflows
    norms = torch.linalg.vector_norm(cache / peak, dim=-1) * peak[..., 0]
    cache = cache.to(x.dtype)
    if indices is None:
        scores = norms.detach() if bias is None else norms.detach() + bias
        indices = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if weighting == "topk_softmax":
        weights = norms.gather(1, indices).softmax(-1)
    else:
        weights = norms.softmax(-1).gather(1, indices)
    y = x.new_zeros(tokens, w_o.shape[-1], dtype=accumulate)
    for expert in range(experts):
        token, rank = (indices == expert).nonzero(as_tuple=True)
        hidden = F.silu(cache[token, expert] @ w_up[expert].T) * (x[token] @ w_p[expert].T)
        y = y.index_add(0, token, weights[token, rank, None] * (hidden @ w_o[expert]).to(accumulate))
    load = F.one_hot(indices, experts).to(accumulate).sum((0, 1)) / max(tokens, 1)
    balance_loss = experts * (load * norms.softmax(-1).sum(0) / max(tokens, 1)).sum()
    return y.to(x.dtype), norms, indices, weights, load, balance_loss
