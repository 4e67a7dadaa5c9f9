"""Autonomy-of-Experts: experts choose themselves by the norm of their own activation (no router).

No backend keeps the whole `[tokens, experts, rank]` cache: only the caches of the selected experts are saved for the
backward.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from vot_kernels.ops.aoe import reference
from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.parts.experts.slots import Experts, Saved, Slots
from vot_kernels.packing import brief

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


@overload
def aoe(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    top_k: int,
    *,
    weighting: str = ...,
    bias: Tensor | None = ...,
    return_aux: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def aoe(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    top_k: int,
    *,
    weighting: str = ...,
    bias: Tensor | None = ...,
    return_aux: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, AoEAux]: ...


@autocasts("x", "w_down", "w_up", "w_p", "w_o")
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
    "topk_softmax" and no gradient through `norms` or `balance_loss`, only the selected experts get a gradient.
    Norms are finite wherever the C_i are, except that "triton" squares them in float32, so that a norm above 1.8e19
    becomes infinite.

    Args:
        x: `[tokens, dim]`, float64, float32, bfloat16 or float16.
        w_down: `[experts, rank, dim]`, dtype and device of `x`, like the other weights.
        w_up: `[experts, hidden, rank]`.
        w_p: `[experts, hidden, dim]`.
        w_o: `[experts, hidden, dim]`.
        top_k: experts per token, 1 to experts.
        weighting: "topk_softmax" (softmax over the selected norms) or "softmax_topk" (softmax over all
            norms, then the selected entries; they do not sum to 1).
        bias: `[experts]`, added to the norms for the selection alone; it gets no gradient.
        return_aux: also return an `AoEAux`.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        y `[tokens, dim]` in the dtype of `x`, or (y, AoEAux).

    Raises:
        TypeError: a tensor is missing or not floating, or a weight has another dtype than `x`.
        ValueError: a tensor does not have the shape above or lies on another device than `x`; `rank` is 0; `top_k`
            is not an int from 1 to experts; an unknown `weighting` or `backend`; the backend cannot serve these
            inputs.

    Source: Lv et al., Autonomy-of-Experts Models, ICML 2025 (arXiv 2501.13074), section 3.
    """
    _validate(x, w_down, w_up, w_p, w_o, top_k, weighting, bias)
    check_choice("return_aux", return_aux, (False, True))
    chosen = select("aoe", backend, x)
    if chosen == "reference":
        y, *aux = reference.aoe(x, w_down, w_up, w_p, w_o, top_k, weighting=weighting, bias=bias)
        return (y, AoEAux(*aux)) if return_aux else y
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_down, w_up, w_p, w_o))
    arguments = (x, w_down, w_up, w_p, w_o, bias, top_k, weighting, save, chosen)
    y, norms, indices, weights, *_, offsets = _aoe_fwd(*arguments)
    if not return_aux:
        return y
    share = 1.0 / max(x.shape[0], 1)
    loads = offsets.diff().to(norms.dtype) * share
    balance_loss = w_down.shape[0] * (loads * norms.softmax(-1).sum(0) * share).sum()
    return y, AoEAux(norms, indices, weights, loads, balance_loss)


@custom_op("vot_kernels::aoe_fwd")
def _aoe_fwd(
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
    """Return (y, norms, indices, weights) and what the backward reads: (cache, value, order, places, offsets).

    The last three are those of `Slots`; see also `Saved`. `cache` and `value` have no rows unless `save` is true.
    """
    experts = Experts(w_down, w_up, w_p, w_o)
    with torch.autocast(x.device.type, enabled=False):
        y, saved = load("aoe", backend).forward(x, experts, bias, top_k, weighting, save)
    norms, indices, weights, cache, value, slots = saved
    return y, norms, indices, weights, cache, value, slots.order, slots.places, slots.offsets


@_aoe_fwd.register_fake
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
        x.new_empty(slots if backend != "torch" else 0, dtype=torch.int32),
        x.new_empty(experts + 1, dtype=torch.int32),
    )


@custom_op("vot_kernels::aoe_bwd")
def _aoe_bwd(
    d_y: Tensor | None,
    d_norms: Tensor | None,
    d_weights: Tensor | None,
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
    """Return d_x, d_w_down, d_w_up, d_w_p and d_w_o, which are exactly zero for an expert without a gradient."""
    slots = Slots(order, places, offsets, indices.shape[1])
    saved = Saved(norms, indices, weights, cache, value, slots)
    experts = Experts(w_down, w_up, w_p, w_o)
    with torch.autocast(x.device.type, enabled=False):
        return load("aoe", backend).backward(d_y, d_norms, d_weights, x, experts, saved, weighting)


@_aoe_bwd.register_fake
def _(
    d_y: Tensor | None,
    d_norms: Tensor | None,
    d_weights: Tensor | None,
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x, d_w_down, d_w_up, d_w_p, d_w_o = (t.new_empty(t.shape) for t in (x, w_down, w_up, w_p, w_o))
    return d_x, d_w_down, d_w_up, d_w_p, d_w_o


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_down, w_up, w_p, w_o, _, _, weighting, _, backend = inputs
    _, norms, indices, weights, *saved = output
    ctx.save_for_backward(x, w_down, w_up, w_p, w_o, norms, indices, weights, *saved)
    ctx.options = weighting, backend
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    d_y: Tensor | None,
    d_norms: Tensor | None,
    _indices: None,
    d_weights: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    d_inputs = _aoe_bwd(d_y, d_norms, d_weights, *ctx.saved_tensors, *ctx.options)
    return *d_inputs, None, None, None, None, None


_aoe_fwd.register_autograd(_backward, setup_context=_setup_context)


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
    if rank == 0:
        raise ValueError(
            "w_down must have a rank of at least 1, because experts are chosen by norms over it, got 0."
        )
    check_tensor("w_up", w_up, [experts, "hidden", rank])
    check_tensor("w_p", w_p, [experts, w_up.shape[1], dim])
    check_tensor("w_o", w_o, [experts, w_up.shape[1], dim])
    check_alike("x", x, w_down=w_down, w_up=w_up, w_p=w_p, w_o=w_o)
    check_choice("weighting", weighting, WEIGHTINGS)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be an int from 1 to the {experts} experts, got {brief(top_k)}.")
    if bias is not None:
        check_tensor("bias", bias, [experts])
        check_floating("bias", bias)
        check_device("x", x, bias=bias)
