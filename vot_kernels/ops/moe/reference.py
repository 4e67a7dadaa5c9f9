"""A top-k mixture of SwiGLU experts, written to be read: the oracle for every backend of `moe`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def moe(x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """Sum over the chosen experts i of w_i · (SiLU(x W_gateᵢᵀ) ⊙ x W_upᵢᵀ) W_downᵢᵀ.

    Args:
        x: `[tokens, dim]`, any floating dtype.
        w_gate_up: `[experts, 2 * hidden, dim]`: the rows of W_gate, then those of W_up.
        w_down: `[experts, dim, hidden]`.
        topk_idx: integer `[tokens, k]`, the experts of each token; the ids of a token may be in any order.
        topk_weights: `[tokens, k]`, their weights, used unchanged.

    Returns:
        `[tokens, dim]` in the dtype of `x`, summed in float32 or wider; differentiable in all but `topk_idx`.

    The layout of the weights is that of the experts of transformers 5 (`gate_up_proj`, `down_proj`).
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(x.shape, dtype=accumulate)
    for expert, (gate_up, down) in enumerate(zip(w_gate_up.unbind(0), w_down.unbind(0), strict=True)):
        token, rank = (topk_idx == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up.T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down.T
        y = y.index_add(0, token, topk_weights[token, rank, None].to(accumulate) * out.to(accumulate))
    return y.to(x.dtype)
