"""The Triton backend of `dense_residual`: one pass over the states, wherever they lie."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div

_FWD = Kernel("dense_residual", "fwd", "dense_residual.weighted_sum:_weighted_sum_kernel")
_BWD = Kernel("dense_residual", "bwd", "dense_residual.weighted_sum:_weighted_sum_bwd_kernel")
_NORM_FWD = Kernel("dense_residual", "norm_fwd", "dense_residual.weighted_sum:_weighted_sum_norm_kernel")
_NORM_BWD = Kernel("dense_residual", "norm_bwd", "dense_residual.weighted_sum:_weighted_sum_norm_bwd_kernel")


def forward(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum as a contiguous tensor."""
    out = states[0].new_empty(states[0].shape)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (ceil_div(out.numel(), blocks["BLOCK"]),)

    _FWD.launch(
        grid,
        key=_key(states),
        out_ptr=out,
        states=_filled(states),
        weights_ptr=weights.contiguous(),
        numbers=out.numel(),
        count=len(states),
    )
    return out


def backward(d_out: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return d_states, each contiguous, and d_weights, in two stages of sums without atomics."""
    d_states = [state.new_empty(state.shape) for state in states]
    config = _BWD.config(d_out.device, _key(states))
    programs = ceil_div(d_out.numel(), config.blocks["BLOCK"])
    partials = d_out.new_empty(len(states), programs, dtype=torch.float32)
    _BWD.launch(
        (programs,),
        config=config,
        d_out_ptr=d_out.contiguous(),
        states=_filled(states),
        d_states=_filled(d_states),
        weights_ptr=weights.contiguous(),
        partials_ptr=partials,
        numbers=d_out.numel(),
        count=len(states),
    )
    return d_states, partials.sum(1).to(weights.dtype)


def forward_norm(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm, in one pass over the states."""
    out, normed = (states[0].new_empty(states[0].shape) for _ in range(2))
    rows = _rows(out)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (ceil_div(rows, blocks["TILE"]),)

    _NORM_FWD.launch(
        grid,
        key=_key(states) | {"width": out.shape[-1]},
        out_ptr=out,
        normed_ptr=normed,
        states=_filled(states),
        weights_ptr=weights.contiguous(),
        norm_weight_ptr=norm_weight.contiguous(),
        rows=rows,
        count=len(states),
        eps=eps,
        WIDTH=out.shape[-1],
    )
    return out, normed


def backward_norm(
    d_out: Tensor,
    d_normed: Tensor,
    states: Sequence[Tensor],
    weights: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    eps: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return d_states, d_weights and d_norm_weight, the last two in two stages of sums without atomics."""
    d_states = [state.new_empty(state.shape) for state in states]
    rows, width = _rows(out), out.shape[-1]
    config = _NORM_BWD.config(out.device, _key(states) | {"width": width})
    programs, steps = ceil_div(rows, config.blocks["TILE"]), config.blocks["TILE"] // config.blocks["BLOCK_T"]
    partials = out.new_empty(len(states), programs * steps, dtype=torch.float32)
    norm_partials = out.new_empty(programs, width, dtype=torch.float32)
    _NORM_BWD.launch(
        (programs,),
        config=config,
        d_out_ptr=d_out.contiguous(),
        d_normed_ptr=d_normed.contiguous(),
        out_ptr=out.contiguous(),
        states=_filled(states),
        d_states=_filled(d_states),
        weights_ptr=weights.contiguous(),
        norm_weight_ptr=norm_weight.contiguous(),
        partials_ptr=partials,
        norm_partials_ptr=norm_partials,
        rows=rows,
        count=len(states),
        eps=eps,
        WIDTH=width,
    )
    return d_states, partials.sum(1).to(weights.dtype), norm_partials.sum(0).to(norm_weight.dtype)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _filled(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors, contiguous, with the first repeated up to a power of two; the kernel ignores the repeats."""
    found = [x.contiguous() for x in tensors]
    missing = (1 << (len(found) - 1).bit_length()) - len(found)
    return (*found, *found[:1] * missing)


def _key(states: Sequence[Tensor]) -> dict[str, int]:
    return {"bits": 8 * states[0].element_size(), "states": len(states)}
