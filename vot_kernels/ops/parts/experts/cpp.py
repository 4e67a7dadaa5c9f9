"""Calls of the C++ kernels of experts. All numbers are float32.

What the backward reads lies *transposed*: `[slots, width]` holds for each expert, from its first place on, the matrix
`[width, its places]`. Rows that belong to slots lie in the order of the slots, not of the places.
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
        kept: where gate and value are written to, each `[slots, hidden]`, transposed; None for nowhere.
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


def hidden_backward(
    d_y: Tensor,
    w_out: Tensor,
    gate: Tensor | tuple[Tensor, Tensor],
    value: Tensor,
    weights: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through y of `expert_outputs`.

    Args:
        d_y: `[tokens, dim]`, any strides.
        w_out: `[experts, dim, hidden]`, any strides.
        gate: that of the forward; or its cache and w_gate, from which it is computed again.
        value: that of the forward.
        weights: `[tokens, top_k]`.
        slots: those of the forward.

    Returns:
        d_gate, d_value, and weight · SiLU(gate) · value, each `[slots, hidden]`, transposed; d_weights
        `[tokens, top_k]`, 0 for the slots of no expert.
    """
    cache, w_gate = gate if isinstance(gate, tuple) else (None, None)
    saved = None if isinstance(gate, tuple) else gate
    d_gate, d_value, weighted = (torch.empty_like(value) for _ in range(3))
    d_weights = value.new_zeros(weights.shape)
    kernels().experts_hidden_backward(
        *(_rows(d_y), cache, w_gate, w_out, saved, value, weights.float().contiguous()),
        *(slots.order, slots.offsets, slots.top_k),
        *(d_gate, d_value, weighted, d_weights),
    )
    return d_gate, d_value, weighted, d_weights


def input_backward(
    d_gate: Tensor,
    d_value: Tensor,
    w_gate: Tensor,
    w_value: Tensor,
    slots: Slots,
    tokens: int,
    cached: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x `[tokens, dim]` and of the cache `[slots, rank]`, transposed, or None without one.

    Args:
        d_gate, d_value: `[slots, hidden]`, transposed.
        w_gate, w_value: those of the forward.
        slots: those of the forward.
        tokens: how many.
        cached: cache `[slots, rank]` = x W_downᵀ, w_down `[experts, rank, dim]`, and scale `[slots]` or None: to the
            gradient of a cache is added scale times that cache.
    """
    cache, w_down, scale = (None, None, None) if cached is None else cached
    rows = d_value.new_empty(d_value.shape[0], w_value.shape[2])
    d_cache = None if cache is None else torch.empty_like(cache)
    grouping = (slots.order, slots.offsets, slots.top_k)
    kernels().experts_input_backward(
        d_gate, d_value, cache, scale, w_gate, w_value, w_down, *grouping, rows, d_cache
    )
    return combine(rows, slots, tokens, None), d_cache


def weight_gradient(left: Tensor, right: Tensor, slots: Slots, out: Tensor) -> None:
    """out[e] = sum over the places of expert e of leftᵀ right, in ascending order; 0 for experts without places.

    Args:
        left: `[slots, rows]`, transposed.
        right: `[tokens, columns]`, any strides; its rows are those of the slots' tokens.
        slots: the places of each expert.
        out: `[experts, rows, columns]`; one of the last two dimensions has the stride 1.
    """
    _weight_gradient(left, right, False, slots, out)


def weight_gradient_of_slots(left: Tensor, right: Tensor, slots: Slots, out: Tensor) -> None:
    """As `weight_gradient`, with right `[slots, columns]`."""
    _weight_gradient(left, right, True, slots, out)


def _weight_gradient(left: Tensor, right: Tensor, by_slot: bool, slots: Slots, out: Tensor) -> None:
    grouping = (slots.order, slots.offsets, slots.top_k)
    kernels().experts_weight_gradient(left, _rows(right), by_slot, *grouping, out)


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
