"""Launchers of the Triton kernels of the hidden layer of gated experts, forward and backward.

Rows of the results lie in place order, see `Slots`; those from offsets[-1] on are uninitialized. Nothing here asks
the device for a number.
"""

from math import gcd
from typing import Any, overload

import torch
from torch import Tensor

from vot_kernels.ops.launch import ceil_div, find_config, launch, matrices_contiguous, rows_contiguous
from vot_kernels.ops.parts.experts.slots import Slots
from vot_kernels.tuning import Config

OP = "expert_hidden"
_VECTOR = 8  # numbers of 16 bits in the widest load


def expert_hidden(
    x: Tensor, w_value: Tensor, gate: tuple[Tensor, Tensor] | Tensor, slots: Slots, save: bool
) -> tuple[Tensor, Tensor | None]:
    """hidden = SiLU(pre) * value, with value = x W_valueᵀ of each place's token and expert.

    Args:
        x: `[tokens, dim]`, float16, bfloat16 or float32.
        w_value: `[experts, hidden, dim]`, any strides.
        gate: (cache `[slots, rank]` in place order, w_up `[experts, hidden, rank]`): pre = cache W_upᵀ; or
            w_gate `[experts, hidden, dim]`: pre = x W_gateᵀ.
        slots: which token and expert are at each place.
        save: also return what the backward reads.

    Returns:
        hidden `[slots, hidden]`, and with `save` value `[slots, hidden]`, or with w_gate pre and value side by
        side `[slots, 2 * hidden]`; else None. All in the dtype of x.
    """
    from vot_kernels.kernels.experts.hidden import _expert_hidden_kernel

    cache, w_gate = gate if isinstance(gate, tuple) else (None, gate)
    x, cache = rows_contiguous(x), None if cache is None else rows_contiguous(cache)
    w_value, w_gate = matrices_contiguous(w_value), matrices_contiguous(w_gate)
    places, (experts, width, dim) = slots.order.shape[0], w_value.shape
    hidden = x.new_empty(places, width)
    saved = x.new_empty(places, 2 * width if cache is None else width) if save else None
    strides = _strides({"x": x, "cache": cache}, {"w_value": w_value, "w_gate": w_gate})
    launch(
        _expert_hidden_kernel,
        lambda blocks: (_programs(slots, width, blocks["BLOCK_M"], blocks["BLOCK_N"]),),
        _config("fwd", x, cache, gcd(strides["STRIDE_UNIT"], width)),
        x_ptr=x,
        w_value_ptr=w_value,
        cache_ptr=cache,
        w_gate_ptr=w_gate,
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        hidden_ptr=hidden,
        saved_ptr=saved,
        **strides,
        experts=experts,
        slots=places,
        top_k=slots.top_k,
        DIM=dim,
        RANK=0 if cache is None else cache.shape[1],
        HIDDEN=width,
    )
    return hidden, saved


@overload
def hidden_backward(
    grad_y: Tensor, w_out: Tensor, saved: Tensor, gate: tuple[Tensor, Tensor], weights: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def hidden_backward(
    grad_y: Tensor, w_out: Tensor, saved: Tensor, gate: None, weights: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor]: ...


def hidden_backward(
    grad_y: Tensor,
    w_out: Tensor,
    saved: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    slots: Slots,
) -> tuple[Tensor, ...]:
    """Gradients through y[t] = Σ_j weights[t, j] · hidden[place of slot (t, j)] W_out.

    Args:
        grad_y: `[tokens, dim]`.
        w_out: `[experts, hidden, dim]`, any strides.
        saved: as the forward returned it.
        gate: (cache, w_up) of the forward, from which pre is computed again; None where it had w_gate.
        weights: float32 `[tokens, top_k]`.
        slots: those of the forward.

    Returns:
        grad_pre and grad_value `[slots, hidden]`, or where there is no cache the two side by side, one tensor
        `[slots, 2 * hidden]`; weighted `[slots, hidden]`, the mixing weight times hidden; these in the dtype of
        `saved`. Last, partials float32 `[blocks, slots]`: their sum over the blocks of columns is the gradient of
        each place's mixing weight.
    """
    from vot_kernels.kernels.experts.hidden import _expert_hidden_bwd_kernel

    cache, w_up = (None, None) if gate is None else (rows_contiguous(gate[0]), matrices_contiguous(gate[1]))
    grad_y, w_out, saved = rows_contiguous(grad_y), matrices_contiguous(w_out), saved.contiguous()
    places, (experts, width, dim) = slots.order.shape[0], w_out.shape
    if cache is None:
        grads = [saved.new_empty(places, 2 * width)]
        grad_pre, grad_value = grads[0].chunk(2, dim=1)
    else:
        grads = [grad_pre, grad_value] = [saved.new_empty(places, width) for _ in range(2)]
    weighted = saved.new_empty(places, width)
    strides = _strides({"grad": grad_y, "cache": cache}, {"w_out": w_out, "w_gate": w_up})
    config = _config("bwd", saved, cache, gcd(strides["STRIDE_UNIT"], width))
    # A tile and not a block: tuning leaves it alone, so that `partials` has the rows of any candidate.
    partials = saved.new_empty(ceil_div(width, config.blocks["TILE_N"]), places, dtype=torch.float32)
    launch(
        _expert_hidden_bwd_kernel,
        lambda blocks: (_programs(slots, width, blocks["BLOCK_M"], blocks["TILE_N"]),),
        config,
        grad_ptr=grad_y,
        w_out_ptr=w_out,
        saved_ptr=saved,
        cache_ptr=cache,
        w_gate_ptr=w_up,
        weights_ptr=weights.contiguous(),
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        grad_pre_ptr=grad_pre,
        grad_value_ptr=grad_value,
        weighted_ptr=weighted,
        partials_ptr=partials,
        **strides,
        experts=experts,
        slots=places,
        top_k=slots.top_k,
        DIM=dim,
        RANK=0 if cache is None else cache.shape[1],
        HIDDEN=width,
    )
    return *grads, weighted, partials


def _config(kernel: str, x: Tensor, cache: Tensor | None, vector: int) -> Config:
    """vector: how many numbers lie side by side wherever a load or a store begins, 8 at most."""
    key = {"bits": 8 * x.dtype.itemsize, "cached": int(cache is not None), "vector": vector}
    return find_config(OP, kernel, x.device, **key)


def _programs(slots: Slots, width: int, rows: int, columns: int) -> int:
    """One per tile; every expert has a tile more than it may need."""
    places, experts = slots.order.shape[0], slots.offsets.shape[0] - 1
    return (places // rows + experts) * ceil_div(width, columns) if places else 0


def _strides(rows: dict[str, Tensor | None], weights: dict[str, Tensor | None]) -> dict[str, Any]:
    """`NAME_stride` of all, `NAME_expert_stride` and `NAME_TRANSPOSED` of the weights, and `STRIDE_UNIT`.

    The stride of a weight is that of its last two dimensions which is not 1; transposed is a weight whose last
    dimension has it. None has 0. Strides are in units of `STRIDE_UNIT` numbers: Triton asks of an argument whether
    it is a multiple of 16, and that of 8 is enough for the widest loads.
    """
    strides = {f"{name}_stride": 0 if x is None else x.stride(0) for name, x in rows.items()}
    transposed = {
        f"{name.upper()}_TRANSPOSED": w is not None and w.stride(2) != 1 for name, w in weights.items()
    }
    for name, w in weights.items():
        strides[f"{name}_expert_stride"] = 0 if w is None else w.stride(0)
        strides[f"{name}_stride"] = 0 if w is None else w.stride(2 if w.stride(2) != 1 else 1)
    unit = gcd(_VECTOR, *strides.values())
    return {name: stride // unit for name, stride in strides.items()} | transposed | {"STRIDE_UNIT": unit}
