"""Weighted sum of past states, the mixing step of DenseFormer, without a stacked copy of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.ops.checks import check_alike, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select


def dense_residual(states: Sequence[Tensor], weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Σ weights[i] · states[i], summed in float32 (float64 for float64 states).

    Differentiable in states and weights. Nothing but the states themselves is kept for the backward.

    Args:
        states: tensors of one shape, dtype and device; any floating dtype.
        weights: `[len(states)]`, floating, same device.
        backend: "auto", "torch" or "reference".

    Returns:
        A tensor like each state.

    Raises:
        ValueError, TypeError: no states, or states or weights that do not match.

    Source: Pagliardini et al., DenseFormer, NeurIPS 2024 (arXiv 2402.02622), equation 2.
    """
    states = list(states)
    _validate(states, weights)
    if select("dense_residual", backend, states[0]) == "reference":
        from vot_kernels.ops.dense_residual import reference

        return reference.dense_residual(states, weights)
    return dense_residual_fwd(states, weights)


@torch.library.custom_op("vot_kernels::dense_residual_fwd", mutates_args=())
def dense_residual_fwd(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum; see `dense_residual`."""
    accumulate = _accumulator(states[0].dtype)
    scales = weights.to(accumulate)
    total = states[0].new_zeros(states[0].shape, dtype=accumulate)
    for state, scale in zip(states, scales, strict=True):
        total.addcmul_(state, scale)
    return total.to(states[0].dtype, copy=False)


@dense_residual_fwd.register_fake
def _(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    return states[0].new_empty(states[0].shape)


@torch.library.custom_op("vot_kernels::dense_residual_bwd", mutates_args=())
def dense_residual_bwd(
    grad: Tensor, states: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the states and of the weights."""
    accumulate = _accumulator(grad.dtype)
    grad = grad.to(accumulate).contiguous()
    scales = weights.to(accumulate)
    grad_states = [(grad * scale).to(state.dtype) for state, scale in zip(states, scales, strict=True)]
    grad_weights = torch.stack([(grad * state).sum() for state in states])
    return grad_states, grad_weights.to(weights.dtype)


@dense_residual_bwd.register_fake
def _(grad: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    return [grad.new_empty(grad.shape) for _ in states], weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    states, weights = inputs
    ctx.save_for_backward(*states, weights)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    *states, weights = ctx.saved_tensors
    return dense_residual_bwd(grad, states, weights)


dense_residual_fwd.register_autograd(_backward, setup_context=_setup_context)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
