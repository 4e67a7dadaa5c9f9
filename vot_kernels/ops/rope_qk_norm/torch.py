"""The PyTorch backend of `rope_qk_norm`: blocks of tokens, so that intermediate results stay in a CPU's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.parts.row_blocks import row_blocks


def forward(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return q and k, normalised and rotated."""
    cos, sin = _angles(positions, theta, sections, accumulator(q.dtype))
    return _forward_one(q, q_weight, cos, sin, eps), _forward_one(k, k_weight, cos, sin, eps)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, d_q_weight and d_k_weight; the last two are empty without a weight."""
    cos, sin = _angles(positions, theta, sections, accumulator(q.dtype))
    dq, d_q_weight = _backward_one(d_q_out, q, q_weight, cos, sin, eps)
    dk, d_k_weight = _backward_one(d_k_out, k, k_weight, cos, sin, eps)
    return dq, dk, d_q_weight, d_k_weight


def _angles(
    positions: Tensor, theta: float, sections: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin `[packed tokens, 1, pairs]`."""
    columns = []
    for axis, count in enumerate(sections):
        # A far position multiplies the error of its frequency, so that must not have more than its own rounding.
        exponents = torch.arange(count, dtype=torch.float64, device=positions.device) / -max(count, 1)
        columns.append(positions[:, axis, None].to(dtype) * (theta**exponents).to(dtype))
    angles = torch.cat(columns, dim=1)[:, None]
    return angles.cos(), angles.sin()


def _forward_one(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    tokens, half = cos.shape[0], x.shape[-1] // 2
    weight = None if weight is None else weight.to(cos.dtype)
    out = x.new_empty(x.shape)
    out[tokens:] = 0
    for block in row_blocks(tokens, x.shape[1] * x.shape[2], x.device):
        wide = x[block].to(cos.dtype)
        if weight is not None:
            wide = wide * _rms_scale(wide, eps) * weight
        a, b = wide.chunk(2, dim=-1)
        out[block, :, :half] = a * cos[block] - b * sin[block]
        out[block, :, half:] = a * sin[block] + b * cos[block]
    return out


def _backward_one(
    d_out: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rotate the gradient back, then d_x = s (g - x̂ mean(g x̂)), where x̂ = s x and g = rotated · weight."""
    tokens = cos.shape[0]
    wide_weight = None if weight is None else weight.to(cos.dtype)
    d_x = x.new_empty(x.shape)
    d_x[tokens:] = 0
    d_weights = []  # the contribution of each block
    for block in row_blocks(tokens, x.shape[1] * x.shape[2], x.device):
        a, b = d_out[block].to(cos.dtype).chunk(2, dim=-1)
        rotated = torch.cat([a * cos[block] + b * sin[block], b * cos[block] - a * sin[block]], dim=-1)
        if wide_weight is not None:
            wide = x[block].to(cos.dtype)
            scale = _rms_scale(wide, eps)
            unit = wide * scale
            d_weights.append((rotated * unit).sum((0, 1)))
            rotated = rotated * wide_weight
            rotated = scale * (rotated - unit * (rotated * unit).mean(-1, keepdim=True))
        d_x[block] = rotated
    if weight is None:
        return d_x, x.new_empty(0)
    return d_x, (torch.stack(d_weights).sum(0) if d_weights else torch.zeros_like(weight)).to(weight.dtype)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
