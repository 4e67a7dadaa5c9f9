"""Autonomy-of-Experts: experts choose themselves by the norm of their own activation (no router).

The `torch` backend never holds the `[tokens, experts, rank]` cache: norms come from blocks of tokens, the
caches of the selected experts are kept, tokens are grouped by a stable sort and each expert runs once over
its own. The number of tokens of each expert is the only thing the host asks for, once in the forward and once
in the backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops._validation import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select

WEIGHTINGS = ("topk_softmax", "softmax_topk")
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


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
        backend: "auto", "torch" or "reference".

    Returns:
        y `[tokens, dim]` in the dtype of `x`, or (y, AoEAux).

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.

    Source: Lv et al., Autonomy-of-Experts Models, ICML 2025 (arXiv 2501.13074), section 3.
    """
    _validate(x, w_down, w_up, w_p, w_o, top_k, weighting, bias)
    if select("aoe", backend, x) == "reference":
        from vot_kernels.reference import aoe as reference

        y, *aux = reference.aoe(x, w_down, w_up, w_p, w_o, top_k, weighting=weighting, bias=bias)
        return (y, AoEAux(*aux)) if return_aux else y
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_down, w_up, w_p, w_o))
    y, norms, indices, weights, *_, counts = aoe_fwd(x, w_down, w_up, w_p, w_o, bias, top_k, weighting, save)
    if not return_aux:
        return y
    share = 1.0 / max(x.shape[0], 1)
    load = counts.to(norms.dtype) * share
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, norms, indices, weights) and what the backward reads: (cache, gate, order, counts).

    Slot `t * top_k + j` is the j-th choice of token t. `cache` [slots, rank] lies in slot order; `order`
    [slots] sorts the slots by expert; `gate` = x W_pᵀ [slots, hidden] lies in that order; `counts`
    [experts] are slots per expert. `cache` and `gate` have no rows unless `save`.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, w_down, w_up, w_p, w_o, bias, top_k, weighting, save)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    slots = tokens * top_k
    saved = slots if save else 0
    accumulate = _accumulator(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, experts, dtype=accumulate),
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens, top_k, dtype=accumulate),
        x.new_empty(saved, rank),
        x.new_empty(saved, w_p.shape[1]),
        x.new_empty(slots, dtype=torch.int64),
        x.new_empty(experts, dtype=torch.int64),
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
    gate: Tensor,
    order: Tensor,
    counts: Tensor,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, w_down, w_up, w_p, w_o), exactly zero for an expert that got none."""
    with torch.autocast(x.device.type, enabled=False):
        return _gradients(
            grad_y, grad_norms, grad_weights, x, w_down, w_up, w_p, w_o,
            norms, indices, weights, cache, gate, order, counts, weighting,
        )  # fmt: skip


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
    norms: Tensor,
    indices: Tensor,
    weights: Tensor,
    cache: Tensor,
    gate: Tensor,
    order: Tensor,
    counts: Tensor,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_like, *others = (t.new_empty(t.shape) for t in (x, w_down, w_up, w_p, w_o))
    return x_like, others[0], others[1], others[2], others[3]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_down, w_up, w_p, w_o, _, _, weighting, _ = inputs
    _, norms, indices, weights, cache, gate, order, counts = output
    ctx.save_for_backward(x, w_down, w_up, w_p, w_o, norms, indices, weights, cache, gate, order, counts)
    ctx.weighting = weighting
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_norms, _indices, grad_weights, *_):  # type: ignore[no-untyped-def]
    grads = aoe_bwd(grad_y, grad_norms, grad_weights, *ctx.saved_tensors, ctx.weighting)
    return *grads, None, None, None, None


aoe_fwd.register_autograd(_backward, setup_context=_setup_context)


def _forward(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    bias: Tensor | None,
    top_k: int,
    weighting: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    norms, indices, cache = _select(x, w_down, bias, top_k)
    weights = _mixing_weights(norms, indices, weighting)
    order, counts = _group(indices, w_down.shape[0])
    gate = x.new_empty(order.shape[0] if save else 0, w_p.shape[1])
    y = x.new_zeros(x.shape, dtype=norms.dtype)
    flat_weights = weights.flatten()
    for expert, start, end in _spans(counts):
        slots = order[start:end]
        rows = slots // top_k
        value = x.index_select(0, rows) @ w_p[expert].T
        hidden = F.silu(cache.index_select(0, slots) @ w_up[expert].T).mul_(value)
        y.index_add_(0, rows, (hidden @ w_o[expert]) * flat_weights[slots, None])
        if save:
            gate[start:end] = value
    if not save:
        cache = cache.new_empty(0, cache.shape[1])
    return y.to(x.dtype, copy=False), norms, indices, weights, cache, gate, order, counts


def _select(x: Tensor, w_down: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of all caches and, in the dtype of `x`, the caches of the selected experts in slot order."""
    tokens, (experts, rank, _) = x.shape[0], w_down.shape
    norms = x.new_empty(tokens, experts, dtype=_accumulator(x.dtype))
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    selected = x.new_empty(tokens, top_k, rank)
    for start, end, cache in _cache_blocks(x, w_down):
        torch.linalg.vector_norm(cache, dim=-1, out=norms[start:end])
        scores = norms[start:end] if bias is None else norms[start:end] + bias
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
        indices[start:end] = best
        selected[start:end] = cache.gather(1, best[..., None].expand(-1, -1, rank))
    return norms, indices, selected.view(tokens * top_k, rank)


def _cache_blocks(x: Tensor, w_down: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, end, C `[end - start, experts, rank]` in the accumulator's dtype), bounded in size."""
    experts, rank, dim = w_down.shape
    accumulate = _accumulator(x.dtype)
    block = max(1, _BLOCK_ELEMENTS.get(x.device.type, 2**26) // (experts * rank))
    # Products of two half-precision numbers are exact in float32: widening first gives the accumulator.
    matrix = w_down.reshape(experts * rank, dim).to(accumulate).T
    for start in range(0, x.shape[0], block):
        end = min(start + block, x.shape[0])
        yield start, end, (x[start:end].to(accumulate) @ matrix).view(end - start, experts, rank)


def _mixing_weights(norms: Tensor, indices: Tensor, weighting: str) -> Tensor:
    if weighting == "topk_softmax":
        return norms.gather(1, indices).softmax(-1)
    return norms.softmax(-1).gather(1, indices)


def _group(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = indices.flatten()
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=experts)


def _spans(counts: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of each expert that has slots."""
    end = 0
    for expert, count in enumerate(counts.tolist()):
        start, end = end, end + count
        if count:
            yield expert, start, end


def _gradients(
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
    gate: Tensor,
    order: Tensor,
    counts: Tensor,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    top_k = indices.shape[1]
    grad_x = x.new_zeros(x.shape, dtype=norms.dtype)
    grad_down, grad_up, grad_p, grad_o = (w.new_zeros(w.shape) for w in (w_down, w_up, w_p, w_o))
    grad_cache = torch.zeros_like(cache)
    grad_mix = (
        torch.zeros_like(weights)
        if grad_weights is None
        else grad_weights.clone(memory_format=torch.contiguous_format)
    )
    if grad_y is not None:
        _experts_backward(
            grad_y, x, w_up, w_p, w_o, weights, cache, gate, order, counts,
            grad_x, grad_up, grad_p, grad_o, grad_cache, grad_mix,
        )  # fmt: skip
    if weighting == "topk_softmax" and grad_norms is None:
        chosen = norms.gather(1, indices)
        scale = _over_norm(_softmax_backward(weights, grad_mix), chosen).flatten()
        grad_cache.add_(cache * scale[:, None])
        for expert, start, end in _spans(counts):
            slots = order[start:end]
            rows = slots // top_k
            grad_c = grad_cache.index_select(0, slots)
            grad_down[expert] = grad_c.T @ x.index_select(0, rows)
            grad_x.index_add_(0, rows, (grad_c @ w_down[expert]).to(grad_x.dtype))
    else:
        grad_p_all = _norm_gradient(norms, indices, weights, grad_mix, grad_norms, weighting)
        _dense_cache_backward(
            x, w_down, _over_norm(grad_p_all, norms), indices, grad_cache, grad_x, grad_down
        )
    return grad_x.to(x.dtype, copy=False), grad_down, grad_up, grad_p, grad_o


def _experts_backward(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    weights: Tensor,
    cache: Tensor,
    gate: Tensor,
    order: Tensor,
    counts: Tensor,
    grad_x: Tensor,
    grad_up: Tensor,
    grad_p: Tensor,
    grad_o: Tensor,
    grad_cache: Tensor,
    grad_mix: Tensor,
) -> None:
    """Through the expert bodies; fills or adds to every `grad_*` argument after `counts`."""
    accumulate, top_k = weights.dtype, weights.shape[1]
    flat_weights, flat_grad_mix = weights.flatten(), grad_mix.view(-1)
    for expert, start, end in _spans(counts):
        slots = order[start:end]
        rows = slots // top_k
        weight = flat_weights[slots, None]
        tokens, upstream = x.index_select(0, rows), grad_y.index_select(0, rows)
        cached, value = cache.index_select(0, slots), gate[start:end].to(accumulate)
        up = (cached @ w_up[expert].T).to(accumulate)
        grad_hidden = (upstream @ w_o[expert].T).to(accumulate)
        sigmoid = torch.sigmoid(up)
        silu = up * sigmoid
        hidden = silu * value
        flat_grad_mix[slots] += (grad_hidden * hidden).sum(-1)
        grad_hidden.mul_(weight)
        grad_value = (grad_hidden * silu).to(x.dtype)
        # d silu(u) / du = s + silu(u) (1 - s), with s = sigmoid(u)
        grad_u = grad_hidden.mul_(value).mul_(sigmoid + silu * (1 - sigmoid)).to(x.dtype)
        grad_o[expert] = hidden.mul_(weight).to(x.dtype).T @ upstream
        grad_p[expert] = grad_value.T @ tokens
        grad_up[expert] = grad_u.T @ cached
        grad_cache.index_copy_(0, slots, grad_u @ w_up[expert])
        grad_x.index_add_(0, rows, (grad_value @ w_p[expert]).to(accumulate))


def _norm_gradient(
    norms: Tensor,
    indices: Tensor,
    weights: Tensor,
    grad_mix: Tensor,
    grad_norms: Tensor | None,
    weighting: str,
) -> Tensor:
    """Gradient of every norm `[tokens, experts]`, through the mixing weights and from outside."""
    if weighting == "topk_softmax":
        grad = torch.zeros_like(norms).scatter_(1, indices, _softmax_backward(weights, grad_mix))
    else:
        grad = _softmax_backward(norms.softmax(-1), torch.zeros_like(norms).scatter_(1, indices, grad_mix))
    return grad if grad_norms is None else grad.add_(grad_norms)


def _dense_cache_backward(
    x: Tensor,
    w_down: Tensor,
    scale: Tensor,
    indices: Tensor,
    grad_cache: Tensor,
    grad_x: Tensor,
    grad_down: Tensor,
) -> None:
    """Adds the gradients of x and w_down where every expert's norm has one: dC = scale · C + grad_cache."""
    experts, rank, dim = w_down.shape
    top_k = indices.shape[1]
    matrix = w_down.reshape(experts * rank, dim).to(grad_x.dtype)
    total = torch.zeros(experts * rank, dim, dtype=grad_x.dtype, device=x.device)
    for start, end, cache in _cache_blocks(x, w_down):
        grad = cache.mul_(scale[start:end, :, None])
        chosen = indices[start:end, :, None].expand(-1, -1, rank)
        grad.scatter_add_(1, chosen, grad_cache.view(-1, top_k, rank)[start:end].to(grad.dtype))
        flat = grad.view(end - start, experts * rank)
        grad_x[start:end] += flat @ matrix
        total.addmm_(flat.T, x[start:end].to(grad_x.dtype))
    grad_down.copy_(total.view_as(grad_down))


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    return probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True))


def _over_norm(grad: Tensor, norms: Tensor) -> Tensor:
    """grad / norms, and the subgradient 0 where the norm is 0."""
    return torch.where(norms > 0, grad / norms, torch.zeros_like(grad))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
