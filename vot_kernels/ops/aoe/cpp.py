"""The C++ backend of `aoe`: selection in blocks of tokens, then expert bodies in blocks of the tokens that chose them.

What comes through the norms of all experts (softmax_topk, or a gradient of the norms) is the plain matrix products of
the PyTorch backend.
"""

import torch
from torch import Tensor

from vot_kernels.ops.parts.experts.cpp import (
    bodies_backward,
    caches_backward,
    combine,
    expert_outputs,
    group_slots,
    select_experts,
)
from vot_kernels.ops.parts.experts.slots import (
    Experts,
    Saved,
    norm_gradient,
    norms_backward,
    over_norm,
    softmax_backward,
)


def forward(
    x: Tensor, experts: Experts, bias: Tensor | None, top_k: int, weighting: str, save: bool
) -> tuple[Tensor, Saved]:
    """As `vot_kernels.ops.aoe.torch.forward`; the cache is in the order of slots, the value in panels."""
    norms, indices, weights, cache = select_experts(x, experts.w_down, bias, top_k, weighting)
    slots = group_slots(indices, norms.shape[1])
    value = x.new_empty(cache.shape[0] if save else 0, experts.w_p.shape[1])
    kept = (None, value if save else None)
    w_out = experts.w_o.transpose(1, 2)
    y = expert_outputs(x, cache, experts.w_up, experts.w_p, w_out, slots, weights, kept)
    return y, Saved(
        norms, indices, weights, cache if save else cache.new_empty(0, cache.shape[1]), value, slots
    )


def backward(
    d_y: Tensor | None,
    d_norms: Tensor | None,
    d_weights: Tensor | None,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `vot_kernels.ops.aoe.torch.backward`; the gate and the hidden activations are computed again."""
    norms, indices, weights, cache, value, slots = saved
    d_y = torch.zeros_like(x) if d_y is None else d_y
    d_experts = Experts(*(torch.empty_like(w, memory_format=torch.contiguous_format) for w in experts))
    matrices = (experts.w_up, experts.w_p, experts.w_o.transpose(1, 2))
    d_matrices = (d_experts.w_up, d_experts.w_p, d_experts.w_o.transpose(1, 2))
    rows, d_cache, d_mix = bodies_backward(d_y, x, None, cache, value, matrices, d_matrices, slots, weights)
    assert d_cache is not None
    if d_weights is not None:
        d_mix += d_weights
    dense = weighting != "topk_softmax" or d_norms is not None
    if not dense:
        scale = over_norm(softmax_backward(weights, d_mix), norms.gather(1, indices))
        d_cache.addcmul_(cache, scale.view(-1, 1))
    caches_backward(d_cache, x, experts.w_down, slots, rows, d_experts.w_down)
    d_x = combine(rows, slots, x.shape[0], None)
    if dense:  # the norms of all experts have gradients, not only those of the selected ones
        d_norms = norm_gradient(norms, indices, weights, d_mix, d_norms, weighting)
        more_x, more_down = norms_backward(x, experts.w_down, d_norms, norms, x.dtype)
        d_x += more_x
        d_experts.w_down.add_(more_down)
    return d_x, *d_experts
