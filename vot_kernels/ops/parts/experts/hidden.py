"""Launchers of the Triton kernels of the hidden layer of gated experts, forward and backward.

Rows of the results are in the order of places, see `Slots`; those from offsets[-1] on are uninitialized. No function
here waits for the device.
"""

from math import gcd
from typing import overload

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, matrices_contiguous, rows_contiguous, strides
from vot_kernels.ops.parts.experts.slots import Slots

_FWD = Kernel("experts", "hidden_fwd", "experts.hidden:_expert_hidden_kernel")
_BWD = Kernel("experts", "hidden_bwd", "experts.hidden:_expert_hidden_bwd_kernel")


def expert_hidden(
    x: Tensor, w_value: Tensor, gate: tuple[Tensor, Tensor] | Tensor, slots: Slots, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute hidden = SiLU(pre) * value, with value = x W_valueᵀ for the token and expert of each place.

    Args:
        x: `[tokens, dim]`, float16, bfloat16 or float32.
        w_value: `[experts, hidden, dim]`, any strides.
        gate: either (cache `[slots, rank]` in the order of places, w_up `[experts, hidden, rank]`) for pre = cache
            W_upᵀ, or w_gate `[experts, hidden, dim]` for pre = x W_gateᵀ.
        slots: which token and expert are at each place.
        save: also return what the backward reads.

    Returns:
        hidden `[slots, hidden]`, and None or with `save` what the backward reads: value `[slots, hidden]`, or with
        w_gate pre and value side by side `[slots, 2 * hidden]`. All have the dtype of x.
    """
    cache, w_gate = gate if isinstance(gate, tuple) else (None, gate)
    x, cache = rows_contiguous(x), None if cache is None else rows_contiguous(cache)
    w_value, w_gate = matrices_contiguous(w_value), matrices_contiguous(w_gate)
    places, (experts, width, dim) = slots.order.shape[0], w_value.shape
    hidden = x.new_empty(places, width)
    saved = x.new_empty(places, 2 * width if cache is None else width) if save else None
    told = strides({"w_value": w_value, "w_gate": w_gate}, x=x, cache=cache)
    _FWD.launch(
        lambda blocks: (_programs(slots, width, blocks["BLOCK_M"], blocks["BLOCK_N"]),),
        key=_key(x, cache, gcd(told["STRIDE_UNIT"], width)),
        x_ptr=x,
        w_value_ptr=w_value,
        cache_ptr=cache,
        w_gate_ptr=w_gate,
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        hidden_ptr=hidden,
        saved_ptr=saved,
        **told,
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
    d_y: Tensor, w_out: Tensor, saved: Tensor, gate: tuple[Tensor, Tensor], weights: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def hidden_backward(
    d_y: Tensor, w_out: Tensor, saved: Tensor, gate: None, weights: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor]: ...


def hidden_backward(
    d_y: Tensor,
    w_out: Tensor,
    saved: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    slots: Slots,
) -> tuple[Tensor, ...]:
    """Compute the gradients through y[t] = Σ_j weights[t, j] · hidden[place of slot (t, j)] W_out.

    Args:
        d_y: `[tokens, dim]`.
        w_out: `[experts, hidden, dim]`, any strides.
        saved: what the forward returned for the backward.
        gate: (cache, w_up) of the forward, from which pre is recomputed; None if it had w_gate.
        weights: float32 `[tokens, top_k]`.
        slots: those of the forward.

    Returns:
        d_pre and d_value `[slots, hidden]`, or without a cache the two side by side in one tensor
        `[slots, 2 * hidden]`; weighted `[slots, hidden]`, the mixing weight times hidden; all of the dtype of `saved`.
        Last, partials float32 `[blocks, slots]`, whose sum over the blocks of columns is the gradient of the mixing
        weight of each place.
    """
    cache, w_up = (None, None) if gate is None else (rows_contiguous(gate[0]), matrices_contiguous(gate[1]))
    d_y, w_out, saved = rows_contiguous(d_y), matrices_contiguous(w_out), saved.contiguous()
    places, (experts, width, dim) = slots.order.shape[0], w_out.shape
    d_pre = saved.new_empty(places, 2 * width if cache is None else width)
    d_value = None if cache is None else torch.empty_like(d_pre)
    weighted = saved.new_empty(places, width)
    told = strides({"w_out": w_out, "w_gate": w_up}, d_y=d_y, cache=cache)
    config = _BWD.config(saved.device, _key(saved, cache, gcd(told["STRIDE_UNIT"], width)))
    partials = saved.new_empty(ceil_div(width, config.blocks["TILE_N"]), places, dtype=torch.float32)
    _BWD.launch(
        lambda blocks: (_programs(slots, width, blocks["BLOCK_M"], blocks["TILE_N"]),),
        config=config,
        d_y_ptr=d_y,
        w_out_ptr=w_out,
        saved_ptr=saved,
        cache_ptr=cache,
        w_gate_ptr=w_up,
        weights_ptr=weights.contiguous(),
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        d_pre_ptr=d_pre,
        d_value_ptr=d_value,
        weighted_ptr=weighted,
        partials_ptr=partials,
        **told,
        experts=experts,
        slots=places,
        top_k=slots.top_k,
        DIM=dim,
        RANK=0 if cache is None else cache.shape[1],
        HIDDEN=width,
    )
    return (d_pre, weighted, partials) if d_value is None else (d_pre, d_value, weighted, partials)


def _key(x: Tensor, cache: Tensor | None, vector: int) -> dict[str, int]:
    """Return `vector`, the number of contiguous elements at the start of every load or store, at most 8."""
    return {"bits": 8 * x.dtype.itemsize, "cached": int(cache is not None), "vector": vector}


def _programs(slots: Slots, width: int, rows: int, columns: int) -> int:
    """Return one program per tile; every expert has one tile more than it may need."""
    places, experts = slots.order.shape[0], slots.offsets.shape[0] - 1
    return (places // rows + experts) * ceil_div(width, columns) if places else 0
