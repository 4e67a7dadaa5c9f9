"""The functions of the flash-attn package, computed by this package's kernels: a drop-in for code that imports them.

Arguments, their order and their defaults are those of flash-attn 2. Options that are not supported (dropout, softcap,
ALiBi, paged keys) raise an error and are never ignored. q and k may differ in length; causal attention and windows
are then aligned to the last tokens, as in flash-attn 2.1 and later.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import (
    check_alike,
    check_choice,
    check_device,
    check_floating,
    check_scale,
    check_tensor,
)
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.flash_attention import reference
from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.packing import MAX_TOKENS, brief

Window = tuple[int, int]


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor: ...


@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    return_attn_probs: Literal[True],
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, None]: ...


@autocasts("q", "k", "v")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Softmax attention of packed queries to packed keys, segment by segment.

    Args:
        q: `[total_q, heads, head_dim]`, float16, bfloat16, float32 or float64.
        k, v: `[total_k, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        cu_seqlens_q, cu_seqlens_k: int32 `[segments + 1]`, cumulative lengths, on the device of q. Rows past
            the last of them are slack: they are never read, and their output and gradient are 0.
        max_seqlen_q, max_seqlen_k: accepted for compatibility and not used.
        dropout_p, softcap: must be 0; alibi_slopes, block_table: must be None.
        softmax_scale: factor on q.k, by default head_dim ** -0.5.
        causal: query i of a segment sees no key after i + (keys - queries of the segment).
        window_size: keys seen before and after that position; -1 means no limit.
        deterministic: whether the same inputs must give bitwise equal gradients. If False, they still do, unless a
            GPU's config table selects a faster backward, and always under `torch.use_deterministic_algorithms(True)`.
        return_attn_probs: also return lse, and None in place of the probabilities.
        backend: "auto", "triton", "cpp", "torch" or "reference".
            All but "triton" read the lengths on the host.

    Returns:
        `[total_q, heads, head_dim]`, which is 0 for a query that sees no key; with `return_attn_probs` also lse
        `[heads, total_q]`, float32 (float64 for float64 inputs), which is -inf for such a query and has no gradient.

    Raises:
        TypeError: q, k, v or the cumulative lengths are not tensors, q is not floating point, the dtypes of q, k and
            v differ, or the cumulative lengths are not int32.
        ValueError: shapes or devices do not fit together, the cumulative lengths do not ascend within the rows
            (checked by "cpp" and "torch" alone), an option is malformed or not supported, `backend` is not one of
            the values above, or no such backend can serve the inputs.

    Source: Dao, FlashAttention-2, 2023 (arXiv 2307.08691).
    """
    check_tensor("q", q, ["total_q", "heads", "head_dim"])
    check_tensor("k", k, ["total_k", "kv_heads", q.shape[2]])
    check_tensor("v", v, ["total_k", "kv_heads", q.shape[2]])
    check_floating("q", q)
    check_alike("q", q, k=k, v=v)
    if not q.shape[2]:
        raise ValueError("head_dim must be at least 1, got 0.")
    if k.shape != v.shape or not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "k and v must have the same shape, and the heads of q must be a multiple of theirs, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}."
        )
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, bounds, ["segments + 1"])
        if bounds.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {bounds.dtype}.")
        check_device("q", q, **{name: bounds})
        readable = bounds.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and bounds.shape[0] and bounds.numpy()[0] != 0:
            raise ValueError(
                f"{name} must begin with 0, because it holds cumulative lengths, got {int(bounds[0])}."
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape or not cu_seqlens_q.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both have one entry more than there are segments, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]} entries."
        )
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, block_table=block_table)
    for name, flag in (
        ("causal", causal),
        ("deterministic", deterministic),
        ("return_attn_probs", return_attn_probs),
    ):
        check_choice(name, flag, (False, True))
    left, right = _window(window_size, causal)
    scale = check_scale("softmax_scale", softmax_scale, q.shape[2])
    backend = select("flash_attn_varlen_func", backend, q)
    inputs, geometry = Inputs(q, k, v), Geometry(cu_seqlens_q, cu_seqlens_k, left, right)
    if backend == "reference":
        out, lse = reference.flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale)
    else:
        out, lse = _flash_attention_fwd(*inputs, *geometry, scale, bool(deterministic), backend)
    return (out, lse.t(), None) if return_attn_probs else out


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: Literal[False] = False,
    *,
    backend: str = "auto",
) -> Tensor: ...


@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    return_attn_probs: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, None]: ...


@autocasts("q", "k", "v")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Softmax attention for a batch in which all sequences have the same length.

    Args:
        q: `[batch, seqlen_q, heads, head_dim]`.
        k, v: `[batch, seqlen_k, kv_heads, head_dim]`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
            backend: as in `flash_attn_varlen_func`.

    Returns:
        `[batch, seqlen_q, heads, head_dim]`; with `return_attn_probs` also lse `[batch, heads, seqlen_q]` and
        None.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`, for tensors of four dimensions.
    """
    check_tensor("q", q, ["batch", "seqlen_q", "heads", "head_dim"])
    check_tensor("k", k, [q.shape[0], "seqlen_k", "kv_heads", "head_dim"])
    check_tensor("v", v, [q.shape[0], "seqlen_k", "kv_heads", "head_dim"])
    check_choice("return_attn_probs", return_attn_probs, (False, True))
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    index = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse, _ = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        index * rows,
        index * keys,
        rows,
        keys,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs=True,
        backend=backend,
    )
    out = out.unflatten(0, (batch, rows))
    return (out, lse.unflatten(1, (batch, rows)).transpose(0, 1), None) if return_attn_probs else out


def _refuse(**options: object) -> None:
    """Refuse the options of flash-attn that this package does not support."""
    for name, value in options.items():
        if value is not None and not (isinstance(value, (int, float)) and value == 0):
            allowed = "0" if isinstance(value, (int, float)) else "None"
            raise ValueError(f"{name} is not supported: it must be {allowed}, got {brief(value)}.")


def _window(window_size: Window, causal: bool) -> tuple[int | None, int | None]:
    """Return how many keys are seen before and after the aligned position; None means no limit."""
    sides = list(window_size) if isinstance(window_size, (tuple, list)) else []
    if len(sides) != 2 or not all(type(side) is int and side >= -1 for side in sides):
        raise ValueError(f"window_size must be a pair of ints >= -1, got {brief(window_size)}.")
    left, right = (None if side == -1 else min(side, MAX_TOKENS) for side in sides)
    return left, 0 if causal else right


@custom_op("vot_kernels::flash_attention_fwd", ("cu_seqlens_q", "cu_seqlens_k"))
@without_autocast
def _flash_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output and lse `[total_q, heads]`."""
    geometry, options = Geometry(cu_seqlens_q, cu_seqlens_k, left, right), Options(scale=scale)
    return load("flash_attention", backend).forward(Inputs(q, k, v), geometry, options)


@_flash_attention_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@custom_op("vot_kernels::flash_attention_bwd", ("cu_seqlens_q", "cu_seqlens_k"))
@without_autocast
def _flash_attention_bwd(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    saved = Saved(Inputs(q, k, v), out, lse)
    geometry = Geometry(cu_seqlens_q, cu_seqlens_k, left, right)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    options = Options(scale=scale, deterministic=deterministic)
    return load("flash_attention", backend).backward(saved, Grads(d_out), geometry, options)


@_flash_attention_bwd.register_fake
def _(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 10
    return (*_flash_attention_bwd(d_out, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


_flash_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
