"""RMS norm of queries and keys, then rotary positions over (t, y, x)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import check_alike, check_device, check_floating, check_number, check_tensor
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.rope_qk_norm import reference
from vot_kernels.packing import brief


@autocasts(widest=("q", "k"))
def rope_qk_norm(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    theta: float = 10000.0,
    sections: Sequence[int] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise each head of q and k, then rotate it by the token's position in time and space.

    With `q_weight`, q becomes q / sqrt(mean(q²) + eps) · q_weight over head_dim; without it, q is not
    normalised at all (plain rotary); the same for k. Then the pair of channels (i, i + head_dim / 2) turns by
    positions[:, axis] · theta^(-j / n): the first `sections[0]` pairs belong to t, the next to y and the last
    to x, and j counts the n pairs of a section, so that every axis has the whole range of frequencies.
    All is computed in float32 (float64 for float64 inputs). With a weight, a head whose mean(q²) overflows there, as
    with entries of 1e19 and more, becomes 0.

    Args:
        q: `[tokens, heads, head_dim]`, floating.
        k: `[tokens, kv_heads, head_dim]`, dtype and device of q.
        positions: `[packed tokens, 3]` of (t, y, x), integer or floating; no more rows than q has. Rows of q
            and k beyond these become zero. It gets no gradient.
        q_weight, k_weight: `[head_dim]`, floating, or None.
        theta: base of the frequencies.
        sections: pairs of (t, y, x), summing to head_dim / 2. By default, y and x have a third each and t the rest.
        eps: added to the mean square.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        (q, k) in the shapes and dtype of the inputs.

    Raises:
        TypeError: q or a weight is not floating, k has another dtype than q, or positions are bool or complex.
        ValueError: a tensor does not have the shape above or lies on another device than q; `head_dim` is odd or 0;
            `positions` has more rows than q; `sections` are not three numbers >= 0 that sum to head_dim / 2;
            `theta` is not > 0 or `eps` not >= 0; `backend` is unknown or cannot serve these inputs.

    Source: Su et al., RoFormer (arXiv 2104.09864); sections as in Qwen2-VL (arXiv 2409.12191), section 2.1.
    """
    _validate(q, k, positions, q_weight, k_weight, theta, eps)
    pairs = q.shape[-1] // 2
    split = default_sections(pairs) if sections is None else _checked_sections(sections, pairs)
    chosen = select("rope_qk_norm", backend, q)
    if chosen == "reference":
        return reference.rope_qk_norm(
            q, k, positions, q_weight=q_weight, k_weight=k_weight, theta=theta, sections=split, eps=eps
        )
    return _rope_qk_norm_fwd(q, k, positions, q_weight, k_weight, theta, split, eps, chosen)


def default_sections(pairs: int) -> list[int]:
    """Return the pairs of (t, y, x): y and x equal and as near to a third as possible, t the rest."""
    space = (pairs + 1) // 3
    return [pairs - 2 * space, space, space]


@custom_op("vot_kernels::rope_qk_norm_fwd")
def _rope_qk_norm_fwd(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `rope_qk_norm`."""
    arguments = (q, k, positions, q_weight, k_weight, theta, sections, eps)
    return load("rope_qk_norm", backend).forward(*arguments)


@_rope_qk_norm_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op("vot_kernels::rope_qk_norm_bwd")
@without_autocast
def _rope_qk_norm_bwd(
    d_q_out: Tensor,
    d_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, d_q_weight and d_k_weight; the last two are empty without a weight."""
    arguments = (d_q_out, d_k_out, q, k, positions, q_weight, k_weight, theta, sections, eps)
    return load("rope_qk_norm", backend).backward(*arguments)


@_rope_qk_norm_bwd.register_fake
def _(
    d_q_out: Tensor,
    d_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def weight_like(weight: Tensor | None) -> Tensor:
        return q.new_empty(0) if weight is None else weight.new_empty(weight.shape)

    return q.new_empty(q.shape), k.new_empty(k.shape), weight_like(q_weight), weight_like(k_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, positions, q_weight, k_weight, *ctx.options = inputs
    ctx.save_for_backward(q, k, positions, q_weight, k_weight)


def _backward(ctx: Any, d_q_out: Tensor, d_k_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: with checkpointing, each access computes the forward again
    _, _, _, q_weight, k_weight = saved
    dq, dk, d_q_weight, d_k_weight = _rope_qk_norm_bwd(d_q_out, d_k_out, *saved, *ctx.options)
    d_weights = (
        None if q_weight is None else d_q_weight,
        None if k_weight is None else d_k_weight,
    )
    return dq, dk, None, *d_weights, *(None for _ in ctx.options)


_rope_qk_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _checked_sections(sections: Sequence[int], pairs: int) -> list[int]:
    split = list(sections) if isinstance(sections, (list, tuple)) else []
    counts = all(isinstance(count, int) and count >= 0 for count in split)
    if len(split) != 3 or not counts or sum(split) != pairs:
        raise ValueError(
            f"sections must be three ints >= 0 (t, y, x) that sum to head_dim / 2 = {pairs}, "
            f"got {brief(sections)}."
        )
    return split


def _validate(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    eps: float,
) -> None:
    check_tensor("q", q, ["tokens", "heads", "head_dim"])
    check_floating("q", q)
    tokens, _, head_dim = q.shape
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}.")
    check_tensor("k", k, ["tokens", "kv_heads", head_dim])
    check_alike("q", q, k=k)
    if k.shape[0] != tokens:
        raise ValueError(f"k must have the {tokens} tokens of q, got {k.shape[0]}.")
    check_tensor("positions", positions, ["packed tokens", 3])
    check_device("q", q, positions=positions)
    if positions.shape[0] > tokens:
        raise ValueError(f"positions has {positions.shape[0]} rows, more than the {tokens} of q.")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be integer or floating, got {positions.dtype}.")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, [head_dim])
            check_floating(name, weight)
            check_device("q", q, **{name: weight})
    if not check_number("theta", theta) > 0 or not check_number("eps", eps) >= 0:
        raise ValueError(f"theta must be > 0 and eps >= 0, got theta={theta}, eps={eps}.")
