"""Calls of the C++ kernels of experts. All numbers are float32.

What the backward reads of hidden layers lies *in panels*: `[slots, width]` holds for each panel of up to 64 places of
an expert, from its first place on, the matrix `[width, its places]`. Rows that belong to slots lie in the order of the
slots, not of the places.
"""

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.parts.experts.slots import Slots


def group_slots(indices: Tensor, experts: int) -> Slots:
    """Slots of `indices`, int32 or int64 `[tokens, top_k]` of any strides; ids that no expert has come last."""
    order, places = (indices.new_empty(indices.numel(), dtype=torch.int32) for _ in range(2))
    offsets = indices.new_empty(experts + 1, dtype=torch.int32)
    kernels().experts_group(indices, order, places, offsets)
    return Slots(order, places, offsets, indices.shape[1])


def select_experts(
    x: Tensor, w_down: Tensor, bias: Tensor | None, top_k: int, weighting: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms `[tokens, experts]`, indices int64 and weights `[tokens, top_k]`, the selected caches `[slots, rank]`.

    Chosen are the largest of norms + bias, the largest first, of equal ones the lowest id, NaN before any number.

    Args:
        x: `[tokens, dim]`, any strides.
        w_down: `[experts, rank, dim]`, any strides.
        bias: `[experts]` or None.
        top_k: experts of a token.
        weighting: "topk_softmax" or "softmax_topk", see `vot_kernels.aoe`.
    """
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    norms, weights = x.new_empty(tokens, experts), x.new_empty(tokens, top_k)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    cache = x.new_empty(tokens * top_k, rank)
    bias = None if bias is None else bias.float().contiguous()
    softmax_first = weighting == "softmax_topk"
    kernels().aoe_select(_rows(x), w_down, bias, softmax_first, norms, indices, weights, cache)
    return norms, indices, weights, cache


def expert_outputs(
    x: Tensor,
    cache: Tensor | None,
    w_gate: Tensor,
    w_value: Tensor,
    w_out: Tensor,
    slots: Slots,
    weights: Tensor,
    kept: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """y[t] = Σ_j weights[t, j] · (SiLU(gate) ⊙ value) W_outᵀ with the expert of slot (t, j), value = x W_valueᵀ.

    Args:
        x: `[tokens, dim]`, any strides.
        cache: `[slots, rank]`: gate = cache W_gateᵀ; or None: gate = x W_gateᵀ.
        w_gate, w_value, w_out: `[experts, hidden, rank or dim]`, `[experts, hidden, dim]` and
            `[experts, dim, hidden]`, any strides.
        slots: which slot has which place.
        weights: `[tokens, top_k]`.
        kept: where gate and value are written to, each `[slots, hidden]`, in panels; None for nowhere.
    """
    rows = x.new_empty(slots.order.shape[0], x.shape[1])
    grouping = (slots.order, slots.offsets, slots.top_k)
    kernels().experts_forward(_rows(x), cache, w_gate, w_value, w_out, *grouping, rows, *kept)
    return combine(rows, slots, x.shape[0], weights)


def combine(rows: Tensor, slots: Slots, tokens: int, weights: Tensor | None) -> Tensor:
    """out[t] = sum over the slots j of token t, in their order, of weights[t, j] (None: 1) times their row."""
    out = rows.new_empty(tokens, rows.shape[1])
    weights = None if weights is None else weights.float().contiguous()
    kernels().experts_combine(rows, slots.places, weights, slots.top_k, out)
    return out


def bodies_backward(
    d_y: Tensor,
    x: Tensor,
    gate: Tensor | None,
    cache: Tensor | None,
    value: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    d_matrices: tuple[Tensor, Tensor, Tensor],
    slots: Slots,
    weights: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients through `expert_outputs`.

    Args:
        d_y, x: `[tokens, dim]`, any strides.
        gate: what the forward kept of it; None where there is a cache, from which it is computed again.
        cache: that of the forward.
        value: what the forward kept of it.
        matrices: w_gate, w_value and w_out of the forward.
        d_matrices: where their gradients are written to, 0 for experts without places. Those of w_gate and w_value
            have rows, and that of w_out has rows or columns, whose numbers lie side by side.
        slots: those of the forward.
        weights: `[tokens, top_k]`.

    Returns:
        d_x `[slots, dim]` of every slot, without what comes through a cache; d_cache `[slots, rank]` or None; and
        d_weights `[tokens, top_k]`, 0 for the slots of no expert.
    """
    d_x = x.new_empty(slots.order.shape[0], x.shape[1])
    d_cache = None if cache is None else torch.empty_like(cache)
    d_weights = x.new_zeros(weights.shape)
    d_w_gate, d_w_value, d_w_out = d_matrices
    kernels().experts_backward(
        *(_rows(d_y), _rows(x), cache, *matrices, gate, value, weights.float().contiguous()),
        *(slots.order, slots.offsets, slots.top_k),
        *(d_x, d_cache, d_weights, d_w_gate, d_w_value, d_w_out.transpose(1, 2)),
    )
    return d_x, d_cache, d_weights


def caches_backward(
    d_cache: Tensor, x: Tensor, w_down: Tensor, slots: Slots, d_x: Tensor, d_w_down: Tensor
) -> None:
    """Gradients of cache = x W_downᵀ of each slot: that of x is added to d_x `[slots, dim]`, the other written."""
    grouping = (slots.order, slots.offsets, slots.top_k)
    kernels().experts_cache_backward(d_cache, _rows(x), w_down, *grouping, d_x, d_w_down)


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
