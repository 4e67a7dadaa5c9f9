"""The weighted sum of past states, which is the mixing step of DenseFormer, without a stacked copy of them."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import (
    check_alike,
    check_device,
    check_floating,
    check_no_tangent,
    check_number,
    check_tensor,
)
from vot_kernels.ops.dense_residual import reference
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.eager import custom_op
from vot_kernels.packing import brief


@overload
def dense_residual(
    states: Sequence[Tensor],
    weights: Tensor,
    *,
    norm_weight: None = ...,
    eps: float = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def dense_residual(
    states: Sequence[Tensor], weights: Tensor, *, norm_weight: Tensor, eps: float = ..., backend: str = ...
) -> tuple[Tensor, Tensor]: ...


@autocasts(widest=("states",))
def dense_residual(
    states: Sequence[Tensor],
    weights: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Σ weights[i] · states[i], summed in float32 (float64 for float64 states), and on demand its RMS norm.

    It is differentiable in states and weights, and saves only these for the backward; with a norm, the sum too.

    Args:
        states: tensors of one shape, dtype and device; any floating dtype.
        weights: `[len(states)]`, floating, same device.
        norm_weight: `[width]`, floating, same device, where `width` is the last dimension of the states; asks for the
            norm of the next block, which costs no second reading of the sum on a GPU.
        eps: added to the mean square of the norm.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        The sum y, in the shape, dtype and device of each state; with `norm_weight` (y, normed), where normed is
        y / sqrt(mean(y²) + eps) · norm_weight over the last dimension of y as returned, computed in float32.

    Raises:
        TypeError: a state or a weight is not floating, or a state differs from the first in dtype.
        ValueError: there are no states, a state differs from the first in shape, the weights are not one number per
            state, norm_weight is not one per element of a state's last dimension, `eps` is not >= 0, a tensor is on
            another device than the first state, or `backend` is unknown or cannot serve these inputs.

    Source: Pagliardini et al., DenseFormer, NeurIPS 2024 (arXiv 2402.02622), equation 2.
    """
    if not isinstance(states, (list, tuple)) or not all(isinstance(state, Tensor) for state in states):
        raise TypeError(f"states must be a list of tensors, got {brief(states)}.")
    states = list(states)
    _validate(states, weights)
    if norm_weight is not None:
        eps = _checked_norm(norm_weight, eps, states[0])
    given = () if norm_weight is None else ("norm_weight",)
    chosen = select("dense_residual", backend, states[0], given=given)
    if norm_weight is None:
        if chosen == "reference":
            return reference.dense_residual(states, weights)
        return _dense_residual_fwd(states, weights, chosen)
    if chosen == "reference":
        return reference.dense_residual_norm(states, weights, norm_weight, eps)
    return _dense_residual_norm_fwd(states, weights, norm_weight, eps, chosen)


@custom_op("vot_kernels::dense_residual_fwd")
def _dense_residual_fwd(states: Sequence[Tensor], weights: Tensor, backend: str) -> Tensor:
    """Compute the sum; see `dense_residual`."""
    return load("dense_residual", backend).forward(states, weights)


@_dense_residual_fwd.register_fake
def _(states: Sequence[Tensor], weights: Tensor, backend: str) -> Tensor:
    return states[0].new_empty(states[0].shape)


@custom_op("vot_kernels::dense_residual_bwd")
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


@custom_op("vot_kernels::dense_residual_norm_fwd")
def _dense_residual_norm_fwd(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Compute the sum and its norm; see `dense_residual`."""
    return load("dense_residual", backend).forward_norm(states, weights, norm_weight, eps)


@_dense_residual_norm_fwd.register_fake
def _(
    states: Sequence[Tensor], weights: Tensor, norm_weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return states[0].new_empty(states[0].shape), states[0].new_empty(states[0].shape)


@custom_op("vot_kernels::dense_residual_norm_bwd")
@without_autocast
def _dense_residual_norm_bwd(
    d_out: Tensor,
    d_normed: Tensor,
    states: Sequence[Tensor],
    weights: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    eps: float,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return d_states, d_weights and d_norm_weight."""
    arguments = (d_out, d_normed, states, weights, norm_weight, out, eps)
    return load("dense_residual", backend).backward_norm(*arguments)


@_dense_residual_norm_bwd.register_fake
def _(
    d_out: Tensor,
    d_normed: Tensor,
    states: Sequence[Tensor],
    weights: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    eps: float,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    d_states = [state.new_empty(state.shape) for state in states]
    return d_states, weights.new_empty(weights.shape), norm_weight.new_empty(norm_weight.shape)


def _setup_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, weights, norm_weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*states, weights, norm_weight, output[0])


def _norm_backward(ctx: Any, d_out: Tensor, d_normed: Tensor) -> tuple[Any, ...]:
    *states, weights, norm_weight, out = ctx.saved_tensors
    arguments = (d_out, d_normed, states, weights, norm_weight, out, ctx.eps, ctx.backend)
    d_states, d_weights, d_norm_weight = _dense_residual_norm_bwd(*arguments)
    return d_states, d_weights, d_norm_weight, None, None


_dense_residual_norm_fwd.register_autograd(_norm_backward, setup_context=_setup_norm_context)


def _checked_norm(norm_weight: Tensor, eps: float, state: Tensor) -> float:
    if not state.ndim or not state.shape[-1]:
        raise ValueError(f"A norm needs states with a last dimension, got states of {list(state.shape)}.")
    check_tensor("norm_weight", norm_weight, [state.shape[-1]])
    check_floating("norm_weight", norm_weight)
    check_device("states[0]", state, norm_weight=norm_weight)
    if not (number := check_number("eps", eps)) >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}.")
    return number


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
