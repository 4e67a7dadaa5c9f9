"""The Triton backend of `rope_qk_norm`: q and k in one launch, their angles computed once per token."""

from collections.abc import Mapping, Sequence
from math import pi
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, contiguous, rows_contiguous, strides
from vot_kernels.ops.parts.plans import remember

_FWD = Kernel("rope_qk_norm", "fwd", "rope_qk_norm.turns:_rope_qk_norm_kernel")
_BWD = Kernel("rope_qk_norm", "bwd", "rope_qk_norm.turns:_rope_qk_norm_bwd_kernel")


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
    q, k = rows_contiguous(q), rows_contiguous(k)
    outs = q.new_empty(q.shape), k.new_empty(k.shape)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (ceil_div(q.shape[0], blocks["BLOCK_T"]),)

    _FWD.launch(
        grid,
        key=_key(q),
        q_ptr=q,
        k_ptr=k,
        q_out_ptr=outs[0],
        k_out_ptr=outs[1],
        **_common(q, k, positions, q_weight, k_weight, theta, sections, eps),
        **strides(q=q, k=k),
    )
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
    """Return dq, dk, d_q_weight and d_k_weight; the last two are empty without a weight.

    The gradients of the weights are sums in two stages without atomics.
    """
    d_q_out, d_k_out, q, k = (rows_contiguous(x) for x in (d_q_out, d_k_out, q, k))
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    config = _BWD.config(q.device, _key(q))
    programs = ceil_div(q.shape[0], config.blocks["TILE"])
    q_partials, k_partials = (
        None if weight is None else q.new_empty(programs, q.shape[-1], dtype=torch.float32)
        for weight in (q_weight, k_weight)
    )
    normed_q, normed_k = None if q_weight is None else q, None if k_weight is None else k
    _BWD.launch(
        (programs,),
        config=config,
        d_q_out_ptr=d_q_out,
        d_k_out_ptr=d_k_out,
        q_ptr=normed_q,
        k_ptr=normed_k,
        dq_ptr=dq,
        dk_ptr=dk,
        q_partials_ptr=q_partials,
        k_partials_ptr=k_partials,
        **_common(q, k, positions, q_weight, k_weight, theta, sections, eps),
        **_strides(d_q_out=d_q_out, d_k_out=d_k_out, q=normed_q, k=normed_k),
    )
    d_q_weight, d_k_weight = (
        q.new_empty(0) if weight is None or partials is None else partials.sum(0).to(weight.dtype)
        for weight, partials in ((q_weight, q_partials), (k_weight, k_partials))
    )
    return dq, dk, d_q_weight, d_k_weight


def _common(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    theta: float,
    sections: Sequence[int],
    eps: float,
) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    return {
        "positions_ptr": positions.contiguous(),
        "frequencies_ptr": _frequencies(theta, tuple(sections), q.device),
        "q_weight_ptr": contiguous(q_weight),
        "k_weight_ptr": contiguous(k_weight),
        "tokens": q.shape[0],
        "packed": positions.shape[0],
        "eps": eps,
        "Q_HEADS": q.shape[1],
        "K_HEADS": k.shape[1],
        "PAIRS": q.shape[2] // 2,
        "T_PAIRS": sections[0],
        "Y_PAIRS": sections[1],
    }


def _strides(**rows: Tensor | None) -> dict[str, Any]:
    """Return the strides of tensors `[tokens, heads, head_dim]`, 0 for None."""
    absent = {f"{name}_head_stride": 0 for name, x in rows.items() if x is None}
    return absent | strides(**rows)


@remember
def _frequencies(theta: float, sections: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the quarter turns per position of every pair of channels, float64 `[head_dim / 2]`."""
    turns = [2 / pi * theta ** (-j / count) for count in sections for j in range(count)]
    return torch.tensor(turns, dtype=torch.float64, device=device)


def _key(q: Tensor) -> dict[str, int]:
    return {"bits": 8 * q.element_size(), "head_dim": q.shape[-1]}
