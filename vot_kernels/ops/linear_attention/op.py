"""Normalised linear attention over packed segments, bidirectional or causal.

    o_i = sum_j phi(q_i).phi(k_j) v_j / Z_i,   Z_i = sum_j phi(q_i).phi(k_j)

summed over all tokens j of the segment, or those up to i (Katharopoulos et al., 2020, eq. 5). The causal form can
decay: each weight is then multiplied by exp(log_decay_h (i - j)), as in retention (Sun et al., 2023), but normalised.
"""

from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.attention_options import FEATURE_MAPS, TOKEN_CAUSAL_MODES, Causal
from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import (
    check_causal,
    check_choice,
    check_device,
    check_packed,
    check_tensor,
)
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.linear_attention import reference
from vot_kernels.ops.linear_attention.geometry import Geometry, Inputs, Options, Saved
from vot_kernels.ops.parts.attention import Grads
from vot_kernels.packing import PackedLayout


@autocasts("q", "k", "v")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    feature_map: str = "softmax",
    causal: Causal = False,
    log_decay: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend linearly from every token to its own segment, with weights normalised to a sum of 1.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64. Sums and exponentials are computed in
            float32 or wider (docs/attention.md says what each backend rounds). Rows past the layout's tokens are
            slack: they are never read, and their output and gradient are 0.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment; its groups play no part.
        feature_map: phi, on q and k as given: "softmax" over head_dim, "elu" (elu + 1) or "relu".
        causal: False or None for no mask; True or "token" if a token sees only itself and the tokens before it.
        log_decay: `[heads]`, at most 0 and differentiable; it needs `causal`. The weight of the token n places back is
            multiplied by exp(n * log_decay): 0 is no decay, as None, and with -inf a token sees only itself. Values
            above 0 are refused where checking them is free: on CPU tensors outside of compiled code.
        backend: "auto", "triton", "cpp" (without log_decay), "torch" or "reference".

    Returns:
        `[tokens, heads, head_dim]` in the dtype of q; 0 where the weights are all 0 (relu).

    Raises:
        TypeError: q, k, v or log_decay is not a tensor, `layout` is not a PackedLayout, q or log_decay is not
            floating point, or the dtypes of q, k and v differ.
        ValueError: shapes or devices do not fit together, the layout has more tokens than q has rows, log_decay is
            positive or given without `causal`, `feature_map`, `causal` or `backend` is not one of the values above,
            or no such backend can serve the inputs.
    """
    check_packed(q, k, v, layout)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    causal = check_causal(causal, TOKEN_CAUSAL_MODES)
    if log_decay is not None:
        _check_decay(log_decay, q, causal)
    given = () if log_decay is None else ("log_decay",)
    backend = select("linear_attention", backend, q, given=given)
    if backend == "reference":
        return reference.linear_attention(
            q, k, v, layout, feature_map=feature_map, causal=causal, log_decay=log_decay
        )[0]
    geometry = Geometry(layout.cu_seqlens, layout.host_cu_seqlens, causal)
    return _linear_attention_fwd(*Inputs(q, k, v, log_decay), *geometry, feature_map, backend)[0]


def _check_decay(log_decay: Tensor, q: Tensor, causal: str | None) -> None:
    """Check that log_decay is `[heads]`, floating point, on the device of q, at most 0, and used with `causal`."""
    check_tensor("log_decay", log_decay, [q.shape[1]])
    check_device("q", q, log_decay=log_decay)
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay must be floating point, got {log_decay.dtype}.")
    if not causal:
        raise ValueError("log_decay needs causal=True, because it acts on earlier tokens, got causal=False.")
    readable = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (log_decay > 0).any():
        raise ValueError(f"log_decay must be at most 0, got {float(log_decay.detach().max()):g}.")


@custom_op("vot_kernels::linear_attention_fwd", ("cu_seqlens", "host_cu_seqlens"))
@without_autocast
def _linear_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor,
    host_cu_seqlens: Tensor,
    causal: str | None,
    feature_map: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward, 1 / Z `[tokens, heads]`, which is 0 where Z is 0."""
    inputs, geometry = Inputs(q, k, v, log_decay), Geometry(cu_seqlens, host_cu_seqlens, causal)
    return load("linear_attention", backend).forward(inputs, geometry, Options(feature_map))


@_linear_attention_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


@custom_op("vot_kernels::linear_attention_bwd", ("cu_seqlens", "host_cu_seqlens"))
@without_autocast
def _linear_attention_bwd(
    d_out: Tensor,
    out: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor,
    host_cu_seqlens: Tensor,
    causal: str | None,
    feature_map: str,
    backend: str,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and d_decay, which is empty without a decay or if its gradient is not needed."""
    saved = Saved(Inputs(q, k, v, log_decay), out, inverse)
    geometry, options = Geometry(cu_seqlens, host_cu_seqlens, causal), Options(feature_map, decay_gradient)
    found = load("linear_attention", backend).backward(saved, Grads(d_out), geometry, options)
    dq, dk, dv, d_decay = (q.new_empty(0) if x is None else x for x in found)
    return dq, dk, dv, d_decay


@_linear_attention_bwd.register_fake
def _(d_out: Tensor, out: Tensor, inverse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, log_decay = arguments[:4]
    dq, dk, dv = (x.new_empty(x.shape) for x in inputs)
    wanted = log_decay is not None and arguments[-1]
    return dq, dk, dv, log_decay.new_empty(log_decay.shape) if wanted else dq.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 9
    wanted = ctx.needs_input_grad[3]
    *grads, d_decay = _linear_attention_bwd(d_out, *ctx.saved_tensors, *ctx.options, wanted)
    return (*grads, d_decay if wanted else None, *(None,) * 5)


_linear_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
