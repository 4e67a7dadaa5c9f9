"""The PyTorch backend of `aoe`: norms in blocks of tokens, then each expert once over the tokens that chose it.

The host reads from the device how many tokens each expert has, in the forward and in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.parts.experts.slots import (
    Experts,
    Saved,
    Slots,
    cache_blocks,
    group_slots,
    norm_gradient,
    norms_backward,
    over_norm,
    softmax_backward,
    swiglu_backward,
    through_norms,
)

# Outside this range of norms, squares may overflow or vanish in float32, so rows with such norms are scaled first. On
# a GPU all rows are scaled, because looking at the norms would wait for the device.
_ORDINARY_NORMS = (1e-15, 1e15)
_LARGEST_EXPONENT = 120  # 2^n and 2^-n are normal numbers in float32 up to this n


def forward(
    x: Tensor, experts: Experts, bias: Tensor | None, top_k: int, weighting: str, save: bool
) -> tuple[Tensor, Saved]:
    """Return y `[tokens, dim]` and what the backward reads; its cache and value have no rows unless `save` is true."""
    norms, indices, cache = _select(x, experts.w_down, bias, top_k)
    weights = _mixing_weights(norms, indices, weighting)
    slots = group_slots(indices, norms.shape[1])
    cache = cache.index_select(0, slots.order)
    y, value = _bodies(x, experts, weights, cache, slots, save)
    if not save:
        cache = cache.new_empty(0, cache.shape[1])
    return y, Saved(norms, indices, weights, cache, value, slots)


def forward_chosen(x: Tensor, experts: Experts, norms: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `forward`, for experts that were chosen before: ids that none of these experts has add nothing."""
    saved = _saved_of(x, experts, norms, indices, weights)
    return _bodies(x, experts, weights, saved.cache, saved.slots, False)[0]


def backward_chosen(
    d_y: Tensor, x: Tensor, experts: Experts, norms: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the experts and the weights; that of the norms is `chosen_norms_backward`'s."""
    saved = _saved_of(x, experts, norms, indices, weights)
    for expert, places, ids in saved.slots.by_expert():
        saved.value[places] = x.index_select(0, ids // saved.slots.top_k) @ experts.w_p[expert].T
    d_x = x.new_zeros(x.shape, dtype=accumulator(x.dtype))
    d_experts = Experts(*(w.new_zeros(w.shape) for w in experts))
    d_cache, d_mix = torch.zeros_like(saved.cache), torch.zeros_like(weights)
    _bodies_backward(d_y, x, experts, saved, d_x, d_experts, d_cache, d_mix)
    _caches_backward(d_cache, x, experts.w_down, saved.slots, d_x, d_experts.w_down)
    return d_x.to(x.dtype, copy=False), *d_experts, d_mix


def chosen_norms_backward(
    x: Tensor, w_down: Tensor, d_norms: Tensor, norms: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the gradients of the norms of the chosen experts add to the gradients of x and w_down.

    d_norms, norms: `[tokens, top_k]`. Ids without an expert are left out.
    """
    slots = group_slots(indices, w_down.shape[0])
    ordered = (norm.flatten()[slots.order] for norm in (d_norms, norms))
    d_cache = through_norms(_caches_of(x, w_down, slots), *ordered)
    d_x, d_down = x.new_zeros(x.shape, dtype=accumulator(x.dtype)), torch.zeros_like(w_down)
    _caches_backward(d_cache, x, w_down, slots, d_x, d_down)
    return d_x.to(x.dtype, copy=False), d_down


def all_norms(x: Tensor, w_down: Tensor) -> Tensor:
    """Return the norms of the caches of all experts `[tokens, experts]`; there may be none."""
    if not w_down.shape[0]:
        return x.new_empty(x.shape[0], 0, dtype=accumulator(x.dtype))
    return _select(x, w_down, None, 1)[0]


def _saved_of(x: Tensor, experts: Experts, norms: Tensor, indices: Tensor, weights: Tensor) -> Saved:
    """What `forward` would save for this choice; its value is not written yet."""
    slots = group_slots(indices, experts.w_down.shape[0])
    cache = _caches_of(x, experts.w_down, slots)
    return Saved(norms, indices, weights, cache, x.new_empty(cache.shape[0], experts.w_p.shape[1]), slots)


def _caches_of(x: Tensor, w_down: Tensor, slots: Slots) -> Tensor:
    """Return the caches of chosen experts `[slots, rank]`, in the order of places; 0 where there is no expert."""
    cache = x.new_zeros(slots.order.shape[0], w_down.shape[1])
    for expert, places, ids in slots.by_expert():
        cache[places] = x.index_select(0, ids // slots.top_k) @ w_down[expert].T
    return cache


def _caches_backward(
    d_cache: Tensor, x: Tensor, w_down: Tensor, slots: Slots, d_x: Tensor, d_down: Tensor
) -> None:
    """Add to d_x, and write to d_down for each expert with slots."""
    for expert, places, ids in slots.by_expert():
        rows = ids // slots.top_k
        d_down[expert] = d_cache[places].T @ x.index_select(0, rows)
        d_x.index_add_(0, rows, (d_cache[places] @ w_down[expert]).to(d_x.dtype))


def _bodies(
    x: Tensor, experts: Experts, weights: Tensor, cache: Tensor, slots: Slots, save: bool
) -> tuple[Tensor, Tensor]:
    """Return y, and the value in the order of places, which has no rows unless `save` is true."""
    values = x.new_empty(cache.shape[0] if save else 0, experts.w_p.shape[1])
    y = x.new_zeros(x.shape, dtype=weights.dtype)
    flat_weights = weights.flatten()
    for expert, places, chosen in slots.by_expert():
        rows = chosen // slots.top_k
        value = x.index_select(0, rows) @ experts.w_p[expert].T
        hidden = F.silu(cache[places] @ experts.w_up[expert].T).mul_(value)
        y.index_add_(0, rows, (hidden @ experts.w_o[expert]) * flat_weights[chosen, None])
        if save:
            values[places] = value
    return y.to(x.dtype, copy=False), values


def backward(
    d_y: Tensor | None,
    d_norms: Tensor | None,
    d_weights: Tensor | None,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return d_x, d_w_down, d_w_up, d_w_p and d_w_o; None stands for an output gradient that is absent."""
    norms, indices, weights, cache, _, slots = saved
    d_x = x.new_zeros(x.shape, dtype=norms.dtype)
    d_experts = Experts(*(w.new_zeros(w.shape) for w in experts))
    d_cache = torch.zeros_like(cache)
    d_mix = (
        torch.zeros_like(weights)
        if d_weights is None
        else d_weights.clone(memory_format=torch.contiguous_format)
    )
    if d_y is not None:
        _bodies_backward(d_y, x, experts, saved, d_x, d_experts, d_cache, d_mix)
    dense = weighting != "topk_softmax" or d_norms is not None
    if not dense:
        chosen = norms.gather(1, indices)
        scale = over_norm(softmax_backward(weights, d_mix), chosen).flatten()
        d_cache.add_(cache * scale[slots.order, None])
    _caches_backward(d_cache, x, experts.w_down, slots, d_x, d_experts.w_down)
    if dense:  # the norms of all experts have gradients, not only those of the selected ones
        d_norms = norm_gradient(norms, indices, weights, d_mix, d_norms, weighting)
        more_x, more_down = norms_backward(x, experts.w_down, d_norms, norms, norms.dtype)
        d_x.add_(more_x)
        d_experts.w_down.add_(more_down)
    return d_x.to(x.dtype, copy=False), *d_experts


def _select(x: Tensor, w_down: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms of all caches, the choice, and the selected caches `[slots, rank]` in the dtype of `x`."""
    waits = x.device.type != "cpu" and x.shape[1] > 0
    scale = _row_scale(x, accumulator(x.dtype)) if waits else None
    norms, indices, selected = _select_scaled(x, w_down, bias, top_k, scale)
    if waits:
        return norms, indices, selected.view(-1, w_down.shape[1])
    low, high = _ORDINARY_NORMS
    extreme = ((norms < low) | (norms > high)).any(1).nonzero()[:, 0]
    if extreme.shape[0] and x.shape[1]:
        rows = x[extreme]
        again = _select_scaled(rows, w_down, bias, top_k, _row_scale(rows, norms.dtype))
        norms[extreme], indices[extreme], selected[extreme] = again
    return norms, indices, selected.view(-1, w_down.shape[1])


def _select_scaled(
    x: Tensor, w_down: Tensor, bias: Tensor | None, top_k: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_select`, but square the caches of scale · x; the selected caches are `[tokens, top_k, rank]`."""
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    # Products of two half-precision numbers are exact in float32, so widening first gives the accumulator's value.
    accumulate = accumulator(x.dtype)
    norms = x.new_empty(tokens, experts, dtype=accumulate)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    selected = x.new_empty(tokens, top_k, rank)
    for block, cache in cache_blocks(x, w_down, accumulate, scale):
        torch.linalg.vector_norm(cache, dim=-1, out=norms[block])
        if scale is not None:
            norms[block] /= scale[block]
            cache /= scale[block, :, None]
        scores = norms[block] if bias is None else norms[block] + bias
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
        indices[block] = best
        selected[block] = cache.gather(1, best[..., None].expand(-1, -1, rank))
    return norms, indices, selected


def _row_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return powers of two `[tokens, 1]` that bring the largest entry of each row near 1 without rounding."""
    largest = x.abs().amax(1, keepdim=True).to(dtype)
    exponent = torch.frexp(largest).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def _mixing_weights(norms: Tensor, indices: Tensor, weighting: str) -> Tensor:
    if weighting == "topk_softmax":
        return norms.gather(1, indices).softmax(-1)
    return norms.softmax(-1).gather(1, indices)


def _bodies_backward(
    d_y: Tensor,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    d_x: Tensor,
    d_experts: Experts,
    d_cache: Tensor,
    d_mix: Tensor,
) -> None:
    """Compute the backward of the expert bodies; fill or add to every argument after `saved`."""
    accumulate, slots = saved.weights.dtype, saved.slots
    flat_weights, flat_d_mix = saved.weights.flatten(), d_mix.view(-1)
    for expert, places, chosen in slots.by_expert():
        rows = chosen // slots.top_k
        weight = flat_weights[chosen, None]
        tokens, d_out = x.index_select(0, rows), d_y.index_select(0, rows)
        cache, value = saved.cache[places], saved.value[places].to(accumulate)
        gate = (cache @ experts.w_up[expert].T).to(accumulate)
        d_hidden = (d_out @ experts.w_o[expert].T).to(accumulate)
        d_wide_gate, d_wide_value, d_weight, hidden = swiglu_backward(gate, value, d_hidden, weight)
        flat_d_mix[chosen] += d_weight
        d_gate, d_value = d_wide_gate.to(x.dtype), d_wide_value.to(x.dtype)
        d_experts.w_o[expert] = hidden.to(x.dtype).T @ d_out
        d_experts.w_p[expert] = d_value.T @ tokens
        d_experts.w_up[expert] = d_gate.T @ cache
        d_cache[places] = d_gate @ experts.w_up[expert]
        d_x.index_add_(0, rows, (d_value @ experts.w_p[expert]).to(accumulate))
