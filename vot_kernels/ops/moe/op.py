"""A top-k mixture of SwiGLU experts with given routing, on the grouped matrix products of `aoe`."""

from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import check_alike, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.moe import reference
from vot_kernels.ops.parts.experts.slots import Slots


@autocasts("x", "w_gate_up", "w_down")
def moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum over the chosen experts i of w_i · (SiLU(x W_gateᵢᵀ) ⊙ x W_upᵢᵀ) W_downᵢᵀ.

    Args:
        x: `[tokens, dim]`, float64, float32, bfloat16 or float16.
        w_gate_up: `[experts, 2 * hidden, dim]`: the rows of W_gate, then those of W_up; dtype and device of `x`.
        w_down: `[experts, dim, hidden]`, like `w_gate_up`.
        topk_idx: int32 or int64 `[tokens, k]`, the experts of each token. An id that is not from 0 to experts - 1
            adds nothing; with experts spread over ranks, such an id belongs to another rank.
        topk_weights: `[tokens, k]`, their weights in any floating dtype, used unchanged.
        backend: "auto", "triton", "cpp", "torch" or "reference". "torch" reads the experts' loads on the host.

    Returns:
        `[tokens, dim]` in the dtype of `x`, summed in float32 or wider in the order of the choices,
        and differentiable in everything but `topk_idx`. An expert without tokens gets a gradient of zeros.

    Raises:
        TypeError: a tensor is missing, `topk_idx` is not int32 or int64, another tensor is not floating, or a weight
            matrix has another dtype than `x`.
        ValueError: a tensor does not have the shape above or lies on another device than `x`; an unknown
            `backend`, or one that cannot serve these inputs.

    The weights have the layout of the experts in transformers 5 (`gate_up_proj`, `down_proj`); see
    `vot_kernels.integrations.transformers`.
    """
    _validate(x, w_gate_up, w_down, topk_idx, topk_weights)
    chosen = select("moe", backend, x)
    if chosen == "reference":
        return reference.moe(x, w_gate_up, w_down, topk_idx, topk_weights)
    leaves = (x, w_gate_up, w_down, topk_weights)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    return _moe_fwd(x, w_gate_up, w_down, topk_idx, topk_weights, save, chosen)[0]


@custom_op("vot_kernels::moe_fwd")
def _moe_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and what the backward reads: (projected, order, places, offsets), the last three as in `Slots`.

    `projected` `[slots, 2 * hidden]` = x W_gate_upᵀ in the order of places ("cpp": its halves, in panels); it has no
    rows unless `save`.is true.
    """
    with torch.autocast(x.device.type, enabled=False):
        y, projected, slots = load("moe", backend).forward(x, w_gate_up, w_down, topk_idx, topk_weights, save)
    return y, projected, slots.order, slots.places, slots.offsets


@_moe_fwd.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots = x.shape[0] * topk_idx.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(slots if save else 0, w_gate_up.shape[1]),
        x.new_empty(slots, dtype=torch.int32),
        x.new_empty(slots if backend != "torch" else 0, dtype=torch.int32),
        x.new_empty(w_down.shape[0] + 1, dtype=torch.int32),
    )


@custom_op("vot_kernels::moe_bwd")
def _moe_bwd(
    d_y: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    projected: Tensor,
    order: Tensor,
    places: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d_x, d_w_gate_up, d_w_down and d_topk_weights."""
    slots = Slots(order, places, offsets, topk_weights.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        return load("moe", backend).backward(d_y, x, w_gate_up, w_down, topk_weights, projected, slots)


@_moe_bwd.register_fake
def _(
    d_y: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x, d_w_gate_up, d_w_down, d_weights = (
        t.new_empty(t.shape) for t in (x, w_gate_up, w_down, topk_weights)
    )
    return d_x, d_w_gate_up, d_w_down, d_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_gate_up, w_down, _, topk_weights, _, backend = inputs
    ctx.save_for_backward(x, w_gate_up, w_down, topk_weights, *output[1:])
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return (None,) * 7
    d_x, d_w_gate_up, d_w_down, d_topk_weights = _moe_bwd(d_y, *ctx.saved_tensors, ctx.backend)
    return d_x, d_w_gate_up, d_w_down, None, d_topk_weights, None, None


_moe_fwd.register_autograd(_backward, setup_context=_setup_context)


def _validate(x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> None:
    check_tensor("x", x, ["tokens", "dim"])
    check_floating("x", x)
    check_tensor("w_down", w_down, ["experts", x.shape[1], "hidden"])
    check_tensor("w_gate_up", w_gate_up, [w_down.shape[0], 2 * w_down.shape[2], x.shape[1]])
    check_alike("x", x, w_gate_up=w_gate_up, w_down=w_down)
    check_tensor("topk_idx", topk_idx, [x.shape[0], "k"])
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_idx must be int32 or int64, got {topk_idx.dtype}.")
    check_tensor("topk_weights", topk_weights, list(topk_idx.shape))
    check_floating("topk_weights", topk_weights)
    check_device("x", x, topk_idx=topk_idx, topk_weights=topk_weights)
