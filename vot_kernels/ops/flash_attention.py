"""The functions of the flash-attn package, over this package's kernels: a drop-in for code that imports them.

The arguments, their order and their defaults are those of flash-attn 2. What is not supported (dropout, softcap,
ALiBi, paged keys) is refused in words, never ignored. q and k may be of different lengths; causal attention and
windows are aligned at the last tokens, as flash-attn 2.1 and later have it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops._range_triton import KeyRanges, range_attention_backward, range_attention_forward
from vot_kernels.ops._validation import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select
from vot_kernels.reference.attention import aligned_mask, cross_attention

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
        deterministic: taken for compatibility; the gradients always are.
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
        out, lse = _by_segment(cross_attention, *arguments)
    else:
        out, lse = _flash_attention_fwd(*arguments, chosen)
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
) -> tuple[Tensor, Tensor]:
    """The output and lse `[total_q, heads]`."""
    if backend == "triton":
        ranges = KeyRanges.of_segments(cu_seqlens_q, cu_seqlens_k, left, right)
        return range_attention_forward(q, k, v, ranges, scale)
    return _by_segment(_sdpa, q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if backend == "triton":
        ranges = KeyRanges.of_segments(cu_seqlens_q, cu_seqlens_k, left, right)
        return range_attention_backward(grad, None, out, lse, q, k, v, ranges, scale)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        parts = (grad[rows], out[rows], lse[rows], q[rows], k[keys], v[keys])
        dq[rows], dk[keys], dv[keys] = _sdpa_backward(*parts, left, right, scale)
    return dq, dk, dv


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
        return (None,) * 9
    return (*_flash_attention_bwd(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 6)


_flash_attention_fwd.register_autograd(_differentiate, setup_context=_save)


def _segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and keys of every segment that has both."""
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(rows) - 1):
        if rows[i] < rows[i + 1] and keys[i] < keys[i + 1]:
            yield slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])


def _by_segment(
    attend: Callable[..., tuple[Tensor, Tensor]],
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
    for rows, keys in _segments(cu_seqlens_q, cu_seqlens_k):
        out[rows], lse[rows] = attend(q[rows], k[keys], v[keys], left, right, scale)
    return out, lse


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One segment by PyTorch's attention, and lse from the scores."""
    mask = aligned_mask(q.shape[0], k.shape[0], left, right, q.device)
    seen = mask.any(1)
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    # A row that sees nothing would be NaN: let it see everything, and drop what comes of it.
    allowed = None if left is None and right is None else mask | ~seen[:, None]
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=gqa)
    out = torch.where(seen[:, None, None], out[0].transpose(0, 1), 0)
    return out, torch.cat(
        [_scores(q, k, head, mask, scale).logsumexp(1)[:, None] for head in range(q.shape[1])], 1
    )


def _sdpa_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one segment, a head at a time: no more than one matrix of scores is held."""
    mask = aligned_mask(q.shape[0], k.shape[0], left, right, q.device)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        do, o, key, value = (
            x.to(lse.dtype) for x in (grad[:, head], out[:, head], k[:, kv_head], v[:, kv_head])
        )
        pivot = lse[:, head, None].masked_fill(lse[:, head, None] == -torch.inf, 0)
        weights = (_scores(q, k, head, mask, scale) - pivot).exp_()
        d_scores = weights * (do @ value.T - (do * o).sum(1, keepdim=True)) * scale
        dq[:, head] = d_scores @ key
        dk[:, kv_head] += d_scores.T @ q[:, head].to(lse.dtype)
        dv[:, kv_head] += weights.T @ do
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, head: int, mask: Tensor, scale: float) -> Tensor:
    """`[rows, keys]` of one head, -inf where the mask hides the key; float32 at least."""
    compute = torch.promote_types(q.dtype, torch.float32)
    key = k[:, head * k.shape[1] // q.shape[1]].to(compute)
    return (q[:, head].to(compute) @ key.T * scale).masked_fill(~mask, -torch.inf)
