"""The C++ backend of `rope_qk_norm`: a head is read once and written once, its angles computed once per token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.parts.plans import remember


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
    """q and k, normalised and rotated."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    inputs = (_heads(q), _heads(k), _weight(q_weight), _weight(k_weight))
    kernels().rope_qk_norm_forward(*inputs, *_turns(positions, theta, sections), eps, *outs)
    return outs


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
    """dq, dk, d_q_weight and d_k_weight; the last two are empty where there is no weight."""
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    d_weights = [
        x.new_empty(0 if weight is None else x.shape[-1], dtype=torch.float32)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    inputs = (*map(_heads, (d_q_out, d_k_out, q, k)), _weight(q_weight), _weight(k_weight))
    kernels().rope_qk_norm_backward(*inputs, *_turns(positions, theta, sections), eps, dq, dk, *d_weights)
    d_q_weight, d_k_weight = (
        d_weight.to(x.dtype if weight is None else weight.dtype)
        for d_weight, x, weight in zip(d_weights, (q, k), (q_weight, k_weight), strict=True)
    )
    return dq, dk, d_q_weight, d_k_weight


def _heads(x: Tensor) -> Tensor:
    """`x` with the numbers of a head side by side; heads and tokens may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def _turns(positions: Tensor, theta: float, sections: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, and the frequency of each pair of channels and the axis of its positions."""
    return positions.float().contiguous(), *_frequencies(theta, tuple(sections))


@remember
def _frequencies(theta: float, sections: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    frequencies = [theta ** (-j / count) for count in sections for j in range(count)]
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    return torch.tensor(frequencies, dtype=torch.float32), torch.tensor(axes, dtype=torch.int32)
