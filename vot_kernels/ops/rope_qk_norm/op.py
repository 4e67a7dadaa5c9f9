"""RMS norm of queries and keys, then rotary positions over (t, y, x)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.ops.checks import check_alike, check_device, check_floating, check_tensor
from vot_kernels.ops.dispatch import select


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
    positions[:, axis] · theta^(-j / n): the first `sections[0]` pairs belong to t, the next to y, the last
    to x, and j counts the n pairs of a section, so that every axis has the whole range of frequencies.
    float32 inside (float64 for float64 inputs).

    Args:
        q: `[tokens, heads, head_dim]`, floating.
        k: `[tokens, kv_heads, head_dim]`, dtype and device of q.
        positions: `[packed tokens, 3]` of (t, y, x), integer or floating; not more rows than q. Rows of q
            and k beyond them come out zero. No gradient.
        q_weight, k_weight: `[head_dim]`, floating, or None.
        theta: base of the frequencies.
        sections: pairs of (t, y, x), summing to head_dim / 2. Default: a third each for y and x, t the rest.
        eps: added to the mean square.
        backend: "auto", "torch" or "reference".

    Returns:
        (q, k) in their own shapes and dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or sections that do not fit.

    Source: Su et al., RoFormer (arXiv 2104.09864); sections as in Qwen2-VL (arXiv 2409.12191), section 2.1.
    """
    _validate(q, k, positions, q_weight, k_weight, theta, eps)
    pairs = q.shape[-1] // 2
    split = default_sections(pairs) if sections is None else _checked_sections(sections, pairs)
    if select("rope_qk_norm", backend, q) == "reference":
        from vot_kernels.ops.rope_qk_norm import reference

        return reference.rope_qk_norm(
            q, k, positions, q_weight=q_weight, k_weight=k_weight, theta=theta, sections=split, eps=eps
        )
    return rope_qk_norm_fwd(q, k, positions, q_weight, k_weight, theta, split, eps)


def default_sections(pairs: int) -> list[int]:
    """Pairs of (t, y, x): y and x equal and as near to a third as can be, t the rest."""
    space = (pairs + 1) // 3
    return [pairs - 2 * space, space, space]


@torch.library.custom_op("vot_kernels::rope_qk_norm_fwd", mutates_args=())
def rope_qk_norm_fwd(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `rope_qk_norm`."""
    cos, sin = _angles(positions, theta, sections, _accumulator(q.dtype))
    return _forward(q, q_weight, cos, sin, eps), _forward(k, k_weight, cos, sin, eps)


@rope_qk_norm_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("vot_kernels::rope_qk_norm_bwd", mutates_args=())
def rope_qk_norm_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_weight and k_weight (empty where there is no weight)."""
    cos, sin = _angles(positions, theta, sections, _accumulator(q.dtype))
    grad_q, grad_q_weight = _backward_one(grad_q, q, q_weight, cos, sin, eps)
    grad_k, grad_k_weight = _backward_one(grad_k, k, k_weight, cos, sin, eps)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


@rope_qk_norm_bwd.register_fake
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def weight_like(weight: Tensor | None) -> Tensor:
        return q.new_empty(0) if weight is None else weight.new_empty(weight.shape)

    return q.new_empty(q.shape), k.new_empty(k.shape), weight_like(q_weight), weight_like(k_weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.theta, ctx.sections, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
    q, k, positions, q_weight, k_weight = ctx.saved_tensors
    grad_q, grad_k, grad_q_weight, grad_k_weight = rope_qk_norm_bwd(
        grad_q, grad_k, q, k, positions, q_weight, k_weight, ctx.theta, ctx.sections, ctx.eps
    )
    return (
        grad_q,
        grad_k,
        None,
        None if q_weight is None else grad_q_weight,
        None if k_weight is None else grad_k_weight,
        None,
        None,
        None,
    )


rope_qk_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _angles(
    positions: Tensor, theta: float, sections: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[packed tokens, 1, pairs]`."""
    columns = []
    for axis, count in enumerate(sections):
        exponents = torch.arange(count, dtype=dtype, device=positions.device) / -max(count, 1)
        columns.append(positions[:, axis, None].to(dtype) * theta**exponents)
    angles = torch.cat(columns, dim=1)[:, None]
    return angles.cos(), angles.sin()


def _forward(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    tokens = cos.shape[0]
    wide = x[:tokens].to(cos.dtype)
    if weight is not None:
        wide = wide * _rms_scale(wide, eps) * weight.to(cos.dtype)
    a, b = wide.chunk(2, dim=-1)
    out = x.new_empty(x.shape)
    half = a.shape[-1]
    out[:tokens, :, :half] = a * cos - b * sin
    out[:tokens, :, half:] = a * sin + b * cos
    out[tokens:] = 0
    return out


def _backward_one(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Turn the gradient back, then dx = s (g - x̂ mean(g x̂)), where x̂ = s x and g = turned · weight."""
    tokens = cos.shape[0]
    a, b = grad[:tokens].to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
    grad_weight = x.new_empty(0)
    if weight is not None:
        wide = x[:tokens].to(cos.dtype)
        scale = _rms_scale(wide, eps)
        unit = wide * scale
        grad_weight = (turned * unit).sum((0, 1)).to(weight.dtype)
        turned = turned * weight.to(cos.dtype)
        turned = scale * (turned - unit * (turned * unit).mean(-1, keepdim=True))
    grad_x = x.new_empty(x.shape)
    grad_x[:tokens] = turned
    grad_x[tokens:] = 0
    return grad_x, grad_weight


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked_sections(sections: Sequence[int], pairs: int) -> list[int]:
    split = list(sections)
    if len(split) != 3 or any(count < 0 for count in split) or sum(split) != pairs:
        raise ValueError(
            f"sections must be three numbers >= 0 (t, y, x) that sum to head_dim / 2 = {pairs}, got {split}."
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
    if not theta > 0 or not eps >= 0:
        raise ValueError(f"theta must be > 0 and eps >= 0, got theta={theta}, eps={eps}.")
