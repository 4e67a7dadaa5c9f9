"""Autonomy-of-Experts: experts choose themselves by the norm of their own activation (no router).

Neither backend holds the `[tokens, experts, rank]` cache for long: what is kept for the backward are the caches
of the selected experts. In the `torch` backend norms come from blocks of tokens, tokens are grouped by a stable
sort and each expert runs once over its own; the number of tokens of each expert is the only thing the host asks
for, once in the forward and once in the backward. The `triton` backend asks for nothing.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.checks import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.parts.experts import slots as _experts
from vot_kernels.ops.parts.experts.slots import Experts, Saved, Slots, accumulator

WEIGHTINGS = ("topk_softmax", "softmax_topk")


class AoEAux(NamedTuple):
    """What the selection did. Gradients flow through `norms`, `weights` and `balance_loss`.

    Attributes:
        norms: `[tokens, experts]`, L2 norm of each expert's cache, float32 (float64 for float64 inputs).
        indices: int64 `[tokens, top_k]`, selected experts, largest score first, ties to the lowest id.
        weights: `[tokens, top_k]`, mixing weights, the dtype of `norms`.
        load: `[experts]`, share of the tokens that chose each expert (sums to `top_k`); no gradient.
        balance_loss: scalar, experts · Σ load · mean softmax(norms), unscaled; `top_k` when balanced.
    """

    norms: Tensor
    indices: Tensor
    weights: Tensor
    load: Tensor
    balance_loss: Tensor


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
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AoEAux]:
    """Sum over the top_k experts i of w_i · (SiLU(C_i W_upᵢᵀ) ⊙ x W_pᵢᵀ) W_oᵢ, with C_i = x W_downᵢᵀ.

    An expert is selected by p_i = ‖C_i‖₂, computed from a float32 (or wider) accumulator. With
    "topk_softmax" and no gradient through `norms` or `balance_loss`, only selected experts get gradient.

    Args:
        x: `[tokens, dim]`, float64, float32, bfloat16 or float16.
        w_down: `[experts, rank, dim]`, dtype and device of `x`, like the other weights.
        w_up: `[experts, hidden, rank]`.
        w_p: `[experts, hidden, dim]`.
        w_o: `[experts, hidden, dim]`.
        top_k: experts per token, 1 to experts.
        weighting: "topk_softmax" (softmax over the selected norms) or "softmax_topk" (softmax over all
            norms, then the selected entries; they do not sum to 1).
        bias: `[experts]`, added to the norms for the selection alone; gets no gradient.
        return_aux: also return an `AoEAux`.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y `[tokens, dim]` in the dtype of `x`, or (y, AoEAux).

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.

    Source: Lv et al., Autonomy-of-Experts Models, ICML 2025 (arXiv 2501.13074), section 3.
    """
    _validate(x, w_down, w_up, w_p, w_o, top_k, weighting, bias)
    chosen = select("aoe", backend, x)
    if chosen == "reference":
        from vot_kernels.ops.aoe import reference

        y, *aux = reference.aoe(x, w_down, w_up, w_p, w_o, top_k, weighting=weighting, bias=bias)
        return (y, AoEAux(*aux)) if return_aux else y
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_down, w_up, w_p, w_o))
    arguments = (x, w_down, w_up, w_p, w_o, bias, top_k, weighting, save, chosen)
    y, norms, indices, weights, *_, offsets = aoe_fwd(*arguments)
    if not return_aux:
        return y
    share = 1.0 / max(x.shape[0], 1)
    load = offsets.diff().to(norms.dtype) * share
    balance_loss = w_down.shape[0] * (load * norms.softmax(-1).sum(0) * share).sum()
    return y, AoEAux(norms, indices, weights, load, balance_loss)


@torch.library.custom_op("vot_kernels::aoe_fwd", mutates_args=())
def aoe_fwd(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    bias: Tensor | None,
    top_k: int,
    weighting: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, norms, indices, weights) and what the backward reads: (cache, value, order, places, offsets).

    See `Saved` and, for the last three, `Slots`. `cache` and `value` have no rows unless `save`.
    """
    arguments = (x, Experts(w_down, w_up, w_p, w_o), bias, top_k, weighting, save)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "triton":
            from vot_kernels.ops.aoe.triton import aoe_forward

            y, saved = aoe_forward(*arguments)
        else:
            y, saved = _forward(*arguments)
    norms, indices, weights, cache, value, slots = saved
    return y, norms, indices, weights, cache, value, slots.order, slots.places, slots.offsets


@aoe_fwd.register_fake
def _(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    bias: Tensor | None,
    top_k: int,
    weighting: str,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    slots = tokens * top_k
    saved = slots if save else 0
    accumulate = accumulator(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, experts, dtype=accumulate),
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens, top_k, dtype=accumulate),
        x.new_empty(saved, rank),
        x.new_empty(saved, w_p.shape[1]),
        x.new_empty(slots, dtype=torch.int32),
        x.new_empty(slots if backend == "triton" else 0, dtype=torch.int32),
        x.new_empty(experts + 1, dtype=torch.int32),
    )


@torch.library.custom_op("vot_kernels::aoe_bwd", mutates_args=())
def aoe_bwd(
    grad_y: Tensor | None,
    grad_norms: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    norms: Tensor,
    indices: Tensor,
    weights: Tensor,
    cache: Tensor,
    value: Tensor,
    order: Tensor,
    places: Tensor,
    offsets: Tensor,
    weighting: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, w_down, w_up, w_p, w_o), exactly zero for an expert that got none."""
    slots = Slots(order, places, offsets, indices.shape[1])
    saved = Saved(norms, indices, weights, cache, value, slots)
    experts = Experts(w_down, w_up, w_p, w_o)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "triton":
            from vot_kernels.ops.aoe.triton import aoe_backward

            return aoe_backward(grad_y, grad_norms, grad_weights, x, experts, saved, weighting)
        return _gradients(grad_y, grad_norms, grad_weights, x, experts, saved, weighting)


@aoe_bwd.register_fake
def _(
    grad_y: Tensor | None,
    grad_norms: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_like, *others = (t.new_empty(t.shape) for t in (x, w_down, w_up, w_p, w_o))
    return x_like, others[0], others[1], others[2], others[3]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_down, w_up, w_p, w_o, _, _, weighting, _, backend = inputs
    _, norms, indices, weights, *saved = output
    ctx.save_for_backward(x, w_down, w_up, w_p, w_o, norms, indices, weights, *saved)
    ctx.options = weighting, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_norms, _indices, grad_weights, *_):  # type: ignore[no-untyped-def]
    grads = aoe_bwd(grad_y, grad_norms, grad_weights, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


aoe_fwd.register_autograd(_backward, setup_context=_setup_context)


def _forward(
    x: Tensor, experts: Experts, bias: Tensor | None, top_k: int, weighting: str, save: bool
) -> tuple[Tensor, Saved]:
    norms, indices, cache = _select(x, experts.w_down, bias, top_k)
    weights = _mixing_weights(norms, indices, weighting)
    slots = _experts.group_slots(indices, norms.shape[1])
    cache = cache.index_select(0, slots.order)
    values = x.new_empty(cache.shape[0] if save else 0, experts.w_p.shape[1])
    y = x.new_zeros(x.shape, dtype=norms.dtype)
    flat_weights = weights.flatten()
    for expert, places, chosen in slots.by_expert():
        rows = chosen // top_k
        value = x.index_select(0, rows) @ experts.w_p[expert].T
        hidden = F.silu(cache[places] @ experts.w_up[expert].T).mul_(value)
        y.index_add_(0, rows, (hidden @ experts.w_o[expert]) * flat_weights[chosen, None])
        if save:
            values[places] = value
    if not save:
        cache = cache.new_empty(0, cache.shape[1])
    return y.to(x.dtype, copy=False), Saved(norms, indices, weights, cache, values, slots)


def _select(x: Tensor, w_down: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of all caches and, in the dtype of `x`, the caches of the selected experts in slot order."""
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    # Products of two half-precision numbers are exact in float32: widening first gives the accumulator.
    accumulate = accumulator(x.dtype)
    norms = x.new_empty(tokens, experts, dtype=accumulate)
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    selected = x.new_empty(tokens, top_k, rank)
    for block, cache in _experts.cache_blocks(x, w_down, accumulate):
        torch.linalg.vector_norm(cache, dim=-1, out=norms[block])
        scores = norms[block] if bias is None else norms[block] + bias
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
        indices[block] = best
        selected[block] = cache.gather(1, best[..., None].expand(-1, -1, rank))
    return norms, indices, selected.view(tokens * top_k, rank)


def _mixing_weights(norms: Tensor, indices: Tensor, weighting: str) -> Tensor:
    if weighting == "topk_softmax":
        return norms.gather(1, indices).softmax(-1)
    return norms.softmax(-1).gather(1, indices)


def _gradients(
    grad_y: Tensor | None,
    grad_norms: Tensor | None,
    grad_weights: Tensor | None,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norms, indices, weights, cache, _, slots = saved
    grad_x = x.new_zeros(x.shape, dtype=norms.dtype)
    grads = Experts(*(w.new_zeros(w.shape) for w in experts))
    grad_cache = torch.zeros_like(cache)
    grad_mix = (
        torch.zeros_like(weights)
        if grad_weights is None
        else grad_weights.clone(memory_format=torch.contiguous_format)
    )
    if grad_y is not None:
        _bodies_backward(grad_y, x, experts, saved, grad_x, grads, grad_cache, grad_mix)
    dense = weighting != "topk_softmax" or grad_norms is not None
    if not dense:
        chosen = norms.gather(1, indices)
        scale = _experts.over_norm(_experts.softmax_backward(weights, grad_mix), chosen).flatten()
        grad_cache.add_(cache * scale[slots.order, None])
    for expert, places, ids in slots.by_expert():
        rows = ids // slots.top_k
        grads.w_down[expert] = grad_cache[places].T @ x.index_select(0, rows)
        grad_x.index_add_(0, rows, (grad_cache[places] @ experts.w_down[expert]).to(grad_x.dtype))
    if dense:  # every expert's norm has a gradient, not those of the selected ones alone
        grad = _experts.norm_gradient(norms, indices, weights, grad_mix, grad_norms, weighting)
        scale = _experts.over_norm(grad, norms)
        more_x, more_down = _experts.norms_backward(x, experts.w_down, scale, norms.dtype)
        grad_x.add_(more_x)
        grads.w_down.add_(more_down)
    return grad_x.to(x.dtype, copy=False), *grads


def _bodies_backward(
    grad_y: Tensor,
    x: Tensor,
    experts: Experts,
    saved: Saved,
    grad_x: Tensor,
    grads: Experts,
    grad_cache: Tensor,
    grad_mix: Tensor,
) -> None:
    """Through the expert bodies; fills or adds to every `grad_*` argument after `saved`."""
    accumulate, slots = saved.weights.dtype, saved.slots
    flat_weights, flat_grad_mix = saved.weights.flatten(), grad_mix.view(-1)
    for expert, places, chosen in slots.by_expert():
        rows = chosen // slots.top_k
        weight = flat_weights[chosen, None]
        tokens, upstream = x.index_select(0, rows), grad_y.index_select(0, rows)
        cache, value = saved.cache[places], saved.value[places].to(accumulate)
        gate = (cache @ experts.w_up[expert].T).to(accumulate)
        grad_hidden = (upstream @ experts.w_o[expert].T).to(accumulate)
        *both, grad_weight, hidden = _experts.swiglu_backward(gate, value, grad_hidden, weight)
        flat_grad_mix[chosen] += grad_weight
        grad_gate, grad_value = (grad.to(x.dtype) for grad in both)
        grads.w_o[expert] = hidden.to(x.dtype).T @ upstream
        grads.w_p[expert] = grad_value.T @ tokens
        grads.w_up[expert] = grad_gate.T @ cache
        grad_cache[places] = grad_gate @ experts.w_up[expert]
        grad_x.index_add_(0, rows, (grad_value @ experts.w_p[expert]).to(accumulate))


def _validate(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    top_k: int,
    weighting: str,
    bias: Tensor | None,
) -> None:
    check_tensor("x", x, ["tokens", "dim"])
    check_floating("x", x)
    dim = x.shape[1]
    check_tensor("w_down", w_down, ["experts", "rank", dim])
    experts, rank, _ = w_down.shape
    check_tensor("w_up", w_up, [experts, "hidden", rank])
    check_tensor("w_p", w_p, [experts, w_up.shape[1], dim])
    check_tensor("w_o", w_o, [experts, w_up.shape[1], dim])
    check_alike("x", x, w_down=w_down, w_up=w_up, w_p=w_p, w_o=w_o)
    check_choice("weighting", weighting, WEIGHTINGS)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be an int from 1 to the {experts} experts, got {top_k!r}.")
    if bias is not None:
        check_tensor("bias", bias, [experts])
        check_floating("bias", bias)
        check_device("x", x, bias=bias)
