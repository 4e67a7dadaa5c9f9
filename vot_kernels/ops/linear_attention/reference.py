"""Normalised linear attention by its definition: segment by segment, dense masks, autograd.

The weight of key j for query i is phi(q_i).phi(k_j), with a decay times exp(log_decay (i - j)). It is the far part
of `hybrid_attention`; see the reference of that op.
"""

import torch
from torch import Tensor

from vot_kernels.ops.attention_options import Causal
from vot_kernels.ops.hybrid_attention.reference import _assemble, _bounds, _features, _normalised
from vot_kernels.packing import PackedLayout


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    feature_map: str = "softmax",
    causal: Causal = False,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return normalised linear attention within each segment: output and log normaliser.

    log_decay: `[heads]`, at most 0, causal only: the weight of key j for query i is multiplied by
    exp(log_decay * (i - j)).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    bounds = _bounds(layout)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        query, key, value = (x[begin:end].to(compute).transpose(0, 1) for x in (q, k, v))
        query, key = _features(query, feature_map), _features(key, feature_map)
        key, value = (x.repeat_interleave(repeats, 0) for x in (key, value))
        similarity = query @ key.transpose(1, 2)
        everything = torch.ones_like(similarity[0], dtype=torch.bool)
        far = everything.tril() if causal else everything
        log_weight = _log_weight(log_decay, query)
        out, lse = _normalised(similarity, ~everything, similarity, far, log_weight, value)
        outputs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return _assemble(outputs, q, q.dtype, 0.0), _assemble(lses, q[..., 0], compute, -torch.inf)


def _log_weight(log_decay: Tensor | None, query: Tensor) -> Tensor:
    """Return log_decay * (i - j) `[heads, n, n]` for j < i and 0 elsewhere, or 0 `[heads, 1, 1]` without a decay."""
    if log_decay is None:
        return query.new_zeros(query.shape[0], 1, 1)
    place = torch.arange(query.shape[1], device=query.device)
    distance = place[:, None] - place
    weight = log_decay.to(query.dtype)[:, None, None] * distance
    return torch.where(distance > 0, weight, 0)  # -inf * 0 is 0 here: a token always sees itself
