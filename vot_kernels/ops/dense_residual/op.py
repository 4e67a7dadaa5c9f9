"""The weighted sum of past states, which is the mixing step of DenseFormer, without a stacked copy of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import check_alike, check_device, check_floating, check_no_tangent, check_tensor
from vot_kernels.ops.dense_residual import reference
from vot_kernels.ops.dispatch import load, select
from vot_kernels.packing import brief


@autocasts(widest=("states",))
def dense_residual(states: Sequence[Tensor], weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Σ weights[i] · states[i], summed in float32 (float64 for float64 states).

    It is differentiable in states and weights, and saves only these for the backward.

    Args:
        states: tensors of one shape, dtype and device; any floating dtype.
        weights: `[len(states)]`, floating, same device.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        A tensor of the shape, dtype and device of each state.

    Raises:
        TypeError: a state or the weights are not floating, or a state differs from the first in dtype.
        ValueError: there are no states, a state differs from the first in shape, the weights are not one number per
            state, a tensor is on another device than the first state, or `backend` is unknown or cannot serve these
            inputs.

    Source: Pagliardini et al., DenseFormer, NeurIPS 2024 (arXiv 2402.02622), equation 2.
    """
    if not isinstance(states, (list, tuple)) or not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"states must be a list of tensors, got {brief(states)}.")
    states = list(states)
    _validate(states, weights)
    chosen = select("dense_residual", backend, states[0])
    if chosen == "reference":
        return reference.dense_residual(states, weights)
    return _dense_residual_fwd(states, weights, chosen)


@torch.library.custom_op("vot_kernels::dense_residual_fwd", mutates_args=())
def _dense_residual_fwd(states: Sequence[Tensor], weights: Tensor, backend: str) -> Tensor:
    """Compute the sum; see `dense_residual`."""
    return load("dense_residual", backend).forward(states, weights)


@_dense_residual_fwd.register_fake
def _(states: Sequence[Tensor], weights: Tensor, backend: str) -> Tensor:
    return states[0].new_empty(states[0].shape)


@torch.library.custom_op("vot_kernels::dense_residual_bwd", mutates_args=())
@without_autocast
def _dense_residual_bwd(
    d_out: Tensor, states: Sequence[Tensor], weights: Tensor, backend: str
) -> tuple[list[Tensor], Tensor]:
    """Return d_states and d_weights."""
    return load("dense_residual", backend).backward(d_out, states, weights)


@_dense_residual_bwd.register_fake
def _(d_out: Tensor, states: Sequence[Tensor], weights: Tensor, backend: str) -> tuple[list[Tensor], Tensor]:
    return [state.new_empty(state.shape) for state in states], weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, weights, ctx.backend = inputs
    ctx.save_for_backward(*states, weights)


def _backward(ctx: Any, d_out: Tensor) -> tuple[list[Tensor], Tensor, None]:
    *states, weights = ctx.saved_tensors
    d_states, d_weights = _dense_residual_bwd(d_out, states, weights, ctx.backend)
    return d_states, d_weights, None


_dense_residual_fwd.register_autograd(_backward, setup_context=_setup_context)


def _validate(states: list[Tensor], weights: Tensor) -> None:
    if not states:
        raise ValueError("dense_residual needs at least one state, got none.")
    check_tensor("weights", weights, [len(states)])
    check_floating("weights", weights)
    check_floating("states[0]", states[0])
    check_device("states[0]", states[0], weights=weights)
    for i, state in enumerate(states):
        if state.shape != states[0].shape:
            raise ValueError(
                f"states[{i}] must be {list(states[0].shape)} like states[0], got {list(state.shape)}."
            )
        check_alike("states[0]", states[0], **{f"states[{i}]": state})
        check_no_tangent(f"states[{i}]", state)
