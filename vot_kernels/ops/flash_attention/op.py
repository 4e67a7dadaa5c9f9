"""The functions of the flash-attn package, over this package's kernels: a drop-in for code that imports them.

The arguments, their order and their defaults are those of flash-attn 2. What is not supported (dropout, softcap,
ALiBi, paged keys) is refused in words, never ignored. q and k may be of different lengths; causal attention and
windows are aligned at the last tokens, as flash-attn 2.1 and later have it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.checks import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.flash_attention.reference import cross_attention
from vot_kernels.ops.parts.range_attention.blocks import (
    fold_heads,
    head_chunks,
    repeat_heads,
    to_heads,
    to_tokens,
)
from vot_kernels.ops.parts.range_attention.torch import Pass, plan_pass, plan_windows, range_attention
from vot_kernels.ops.parts.range_attention.torch import range_attention_backward as passes_backward
from vot_kernels.ops.parts.range_attention.triton import (
    KeyRanges,
    range_attention_backward,
    range_attention_forward,
)

Window = tuple[int, int]


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
            the last of them are slack: never read, output and gradient 0.
        max_seqlen_q, max_seqlen_k: taken for compatibility, and not needed.
        dropout_p, softcap: must be 0; alibi_slopes, block_table: must be None.
        softmax_scale: factor on q.k, by default head_dim ** -0.5.
        causal: query i of a segment sees no key after i + (its keys - its queries).
        window_size: keys seen before and after that place; -1 is no limit.
        deterministic: the gradients have the same bits whenever the inputs have; if False, they have unless the
            table of the GPU says otherwise, as with None in `packed_attention`.
        return_attn_probs: also return lse and None in place of the probabilities.
        backend: "auto", "triton", "torch" or "reference". All but "triton" read the lengths on the host.

    Returns:
        `[total_q, heads, head_dim]`, 0 for a query that sees no key; with `return_attn_probs` also lse
        `[heads, total_q]`, float32 (float64 for float64 inputs), -inf for such a query, without gradient.

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.

    Source: Dao, FlashAttention-2, 2023 (arXiv 2307.08691).
    """
    check_tensor("q", q, ["total_q", "heads", "head_dim"])
    check_tensor("k", k, ["total_k", "kv_heads", q.shape[2]])
    check_tensor("v", v, ["total_k", "kv_heads", q.shape[2]])
    check_floating("q", q)
    check_alike("q", q, k=k, v=v)
    if k.shape != v.shape or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "k and v must have the same shape, and the heads of q be a multiple of theirs, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}."
        )
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, bounds, ["segments + 1"])
        if bounds.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {bounds.dtype}.")
        check_device("q", q, **{name: bounds})
    if cu_seqlens_q.shape != cu_seqlens_k.shape or not cu_seqlens_q.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have an entry more than there are segments, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]} entries."
        )
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes, block_table=block_table)
    check_choice("causal", causal, (False, True))
    left, right = _window(window_size, causal)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale)
    chosen = select("packed_attention", backend, q)
    if chosen == "reference":
        out, lse = _by_reference(*arguments)
    else:
        out, lse = _flash_attention_fwd(*arguments, chosen, True if deterministic else None)
    return (out, lse.t(), None) if return_attn_probs else out


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
    """The same for a batch of equal lengths.

    Args:
        q: `[batch, seqlen_q, heads, head_dim]`.
        k, v: `[batch, seqlen_k, kv_heads, head_dim]`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
            backend: as in `flash_attn_varlen_func`.

    Returns:
        `[batch, seqlen_q, heads, head_dim]`; with `return_attn_probs` also lse `[batch, heads, seqlen_q]` and
        None.

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.
    """
    check_tensor("q", q, ["batch", "seqlen_q", "heads", "head_dim"])
    check_tensor("k", k, [q.shape[0], "seqlen_k", "kv_heads", "head_dim"])
    check_tensor("v", v, [q.shape[0], "seqlen_k", "kv_heads", "head_dim"])
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    index = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    found = flash_attn_varlen_func(
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
        return_attn_probs,
        backend=backend,
    )
    if isinstance(found, Tensor):
        return found.unflatten(0, (batch, rows))
    out, lse, _ = found
    return out.unflatten(0, (batch, rows)), lse.unflatten(1, (batch, rows)).transpose(0, 1), None


def _refuse(**options: object) -> None:
    """What flash-attn has and this package has not."""
    for name, value in options.items():
        if value is not None and not (isinstance(value, (int, float)) and value == 0):
            allowed = "0" if isinstance(value, (int, float)) else "None"
            raise ValueError(f"{name} is not supported: it must be {allowed}, got {_brief(value)}.")


def _brief(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _window(window_size: Window, causal: bool) -> tuple[int | None, int | None]:
    """Keys before and after the aligned place; None for no limit."""
    sides = list(window_size) if isinstance(window_size, (tuple, list)) else []
    if len(sides) != 2 or not all(type(side) is int and side >= -1 for side in sides):
        raise ValueError(f"window_size must be a pair of ints >= -1, got {window_size!r}.")
    left, right = (None if side == -1 else side for side in sides)
    return left, 0 if causal else right


@torch.library.custom_op("vot_kernels::flash_attention_fwd", mutates_args=())
def _flash_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    backend: str,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and lse `[total_q, heads]`."""
    if backend == "triton":
        ranges = KeyRanges.of_segments(cu_seqlens_q, cu_seqlens_k, left, right)
        return range_attention_forward(q, k, v, ranges, scale)
    return _batched_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale)


@_flash_attention_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=compute)


@torch.library.custom_op("vot_kernels::flash_attention_bwd", mutates_args=())
def _flash_attention_bwd(
    grad: Tensor,
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
    backend: str,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if backend == "triton":
        ranges = KeyRanges.of_segments(cu_seqlens_q, cu_seqlens_k, left, right)
        return range_attention_backward(
            grad, None, out, lse, q, k, v, ranges, scale, deterministic=bool(deterministic)
        )
    saved = (grad, out, lse, q, k, v)
    return _batched_backward(*saved, cu_seqlens_q, cu_seqlens_k, left, right, scale)


@_flash_attention_bwd.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    return (*_flash_attention_bwd(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


_flash_attention_fwd.register_autograd(_differentiate, setup_context=_save)


def _batched_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The torch backend: equal segments as one batch, a few heads at a time."""
    plan = _make_plan(q, k, cu_seqlens_q, cu_seqlens_k, left, right)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, kv_heads in head_chunks(q, k, 0):
        query = to_heads(q[:, heads], plan.rows)
        key, value = (to_heads(x[:, kv_heads], plan.keys) for x in (k, v))
        repeats = query.shape[0] // key.shape[0]
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
        part, part_lse = range_attention(query, key, value, plan.passes, scale)
        to_tokens(part, out[:, heads])
        to_tokens(part_lse, lse[:, heads, None], fill=-math.inf)
    return out, lse


def _batched_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _make_plan(q, k, cu_seqlens_q, cu_seqlens_k, left, right)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for heads, kv_heads in head_chunks(q, k, 0):
        do, o, query = (to_heads(x[:, heads], plan.rows) for x in (grad, out, q))
        joint = to_heads(lse[:, heads, None], plan.rows)
        key, value = (to_heads(x[:, kv_heads], plan.keys) for x in (k, v))
        repeats = query.shape[0] // key.shape[0]
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
        parts = passes_backward(do, None, query, key, value, o, joint, plan.passes, scale)
        to_tokens(parts[0], dq[:, heads])
        for part, total in zip(parts[1:], (dk, dv), strict=True):
            to_tokens(fold_heads(part, repeats), total[:, kv_heads])
    return dq, dk, dv


@dataclass(frozen=True, eq=False)
class _Plan:
    """Packed rows and keys, and what the rows see: each pass has at most one key range per row."""

    rows: int
    keys: int
    passes: tuple[Pass, ...]


def _make_plan(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, left: int | None, right: int | None
) -> _Plan:
    """The plan of a packing, remembered by its contents: layers of one model share a packing."""
    rows = _host_bounds("cu_seqlens_q", cu_seqlens_q, "q", q)
    keys = _host_bounds("cu_seqlens_k", cu_seqlens_k, "k", k)
    return _plan(tuple(rows), tuple(keys), left, right, q.device)


@lru_cache(maxsize=32)
def _plan(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    left: int | None,
    right: int | None,
    device: torch.device,
) -> _Plan:
    """Ranges of rows and keys that need no mask, unless there is a limit on the left.

    In the frame of a segment row i sees the keys before i + shift + 1. So the rows that see some but not all
    keys are a causal square whose first key is the one they start at, and see all keys before that.
    """
    row, row_end, key, key_end = segments = np.array([rows[:-1], rows[1:], keys[:-1], keys[1:]], np.int64)
    if left is not None:
        passes = [plan_windows(segments.T, left, right, device)]
        return _Plan(rows[-1], keys[-1], tuple(blocks for blocks in passes if blocks))
    shift = key_end - key if right is None else key_end - key - (row_end - row) + right
    first = np.clip(row - shift, row, row_end)
    last = np.clip(row + key_end - key - shift, first, row_end)
    offset = key - row + shift
    squares = np.stack([first, last, first + offset, last + offset], axis=1)
    before = np.stack([first, last, key, first + offset], axis=1)
    whole = np.stack([last, row_end, key, key_end], axis=1)
    others = np.stack([before, whole], axis=1).reshape(-1, 4)
    passes = [plan_pass(squares, True, device), plan_pass(others, False, device)]
    return _Plan(rows[-1], keys[-1], tuple(blocks for blocks in passes if blocks))


def _host_bounds(name: str, bounds: Tensor, owner: str, x: Tensor) -> list[int]:
    """The cumulative lengths as numbers."""
    numbers = bounds.tolist()
    for before, number in pairwise([0, *numbers]):
        if not before <= number <= x.shape[0]:
            raise ValueError(
                f"{name} must ascend from 0 to at most the {x.shape[0]} rows of {owner}, "
                f"got {number} after {before}."
            )
    return numbers


def _by_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and lse of all segments; 0 and -inf in rows that belong to none or see nothing."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row, row_end, key, key_end in zip(*(x[i:] for x in bounds for i in (0, 1)), strict=False):
        if row < row_end and key < key_end:
            rows, keys = slice(row, row_end), slice(key, key_end)
            out[rows], lse[rows] = cross_attention(q[rows], k[keys], v[keys], left, right, scale)
    return out, lse
