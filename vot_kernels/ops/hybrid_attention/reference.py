"""Hybrid, packed and linear attention by their definition: segment by segment, dense masks, autograd.

The kernel matrix is built entry by entry,

    kappa[i, j] = exp(scale * q_i.k_j)              j in near(i)
                = exp(beta) * phi(q_i).phi(k_j)     j in far(i)
                = 0                                 otherwise,

and o = kappa v / Z with Z = sum_j kappa[i, j], lse = log Z. Every row is divided by exp(pivot) before the
sums so that nothing overflows. Half precision is computed in float32 and rounded once at the end.
"""

import torch
from torch import Tensor

from vot_kernels.ops.attention_options import Window, window_sides
from vot_kernels.packing import PackedLayout


def feature_map(x: Tensor, name: str) -> Tensor:
    """phi(x) >= 0 over the last dimension: "softmax", "elu" (elu + 1) or "relu"."""
    if name == "softmax":
        return x.softmax(-1)
    if name == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # exp(x) - 1 + 1 would lose its digits
    return x.relu()


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    window: Window = 1,
    beta: Tensor | None = None,
    far_weight: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output `[tokens, heads, head_dim]` and lse `[tokens, heads]`; see the op of the same name."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sides = window_sides(window, causal)
    compute = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1]
    repeats = heads // k.shape[1]
    bias = torch.zeros(heads, device=q.device) if beta is None else beta
    groups = layout.token_groups
    outputs, lses = [], []
    bounds = _bounds(layout)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        query, key, value = (x[begin:end].to(compute).transpose(0, 1) for x in (q, k, v))
        query_features = _features(query, feature_map, q_features, begin, end)
        key_features = _features(key, feature_map, k_features, begin, end)
        key, value, key_features = (x.repeat_interleave(repeats, 0) for x in (key, value, key_features))
        near, far = _masks(groups[begin:end], sides, causal)
        similarity = query_features @ key_features.transpose(1, 2)
        if far_weight is not None:
            similarity = far_weight.to(compute)[:, None, None] * similarity
        out, lse = _normalised(
            scale * (query @ key.transpose(1, 2)),
            near,
            similarity,
            far,
            bias.to(compute)[:, None, None],
            value,
        )
        outputs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return _assemble(outputs, q, q.dtype, 0.0), _assemble(lses, q[..., 0], compute, -torch.inf)


def _bounds(layout: PackedLayout) -> list[int]:
    """Return the first row of each segment; an empty segment at the front ties even an empty result to its inputs."""
    return [0, *layout.host_cu_seqlens.tolist()]


def _normalised(
    scores: Tensor, near: Tensor, similarity: Tensor, far: Tensor, beta: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return kappa v / Z and log Z of one segment: scores and similarity `[heads, n, n]`, value `[heads, n, d]`.

    beta: log of the weight of far keys, `[heads, 1, 1]` or one per pair `[heads, n, n]`.
    """
    pivot = _pivot(scores, near, similarity, far, beta)
    kappa = (scores - pivot).masked_fill(~near, -torch.inf).exp()
    kappa = kappa + torch.where(far, beta - pivot, -torch.inf).exp() * similarity
    total = kappa.sum(-1, keepdim=True)
    found = total != 0  # NaN counts as found, so that it propagates
    total = torch.where(found, total, 1)
    out = torch.where(found, kappa @ value / total, 0)
    return out, torch.where(found, pivot + total.log(), -torch.inf)[..., 0]


@torch.no_grad()
def _pivot(scores: Tensor, near: Tensor, similarity: Tensor, far: Tensor, beta: Tensor) -> Tensor:
    """Return the largest log kappa of each row, a constant that cancels; 0 for a row that sees nothing."""
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:-1], 1)
    tiny = torch.finfo(similarity.dtype).tiny
    log_far = beta + similarity.clamp(min=tiny).log()
    largest = torch.maximum(
        scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True),
        log_far.masked_fill(~far, -torch.inf).amax(-1, keepdim=True),
    )
    return largest.masked_fill(largest == -torch.inf, 0)


def _masks(groups: Tensor, sides: tuple[int | None, int | None], causal: str | None) -> tuple[Tensor, Tensor]:
    """Return which keys are near and which are far for each query of a segment, both `[n, n]`."""
    left, right = sides
    distance = groups[None, :] - groups[:, None]  # from the query's group to the key's
    near = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        near &= distance >= -left
    if right is not None:
        near &= distance <= right
    far = ~near
    if causal is not None:
        far &= distance < 0
    if causal == "token":
        near &= torch.ones_like(near).tril()
    return near, far


def _features(x: Tensor, name: str, given: Tensor | None = None, begin: int = 0, end: int = 0) -> Tensor:
    """Return the features of one segment, heads first: phi of `x`, or rows begin:end of the given ones."""
    return feature_map(x, name) if given is None else given[begin:end].to(x.dtype).transpose(0, 1)


def _assemble(pieces: list[Tensor], like: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """Concatenate the rows of the segments, then rows of `fill` where the buffer has slack."""
    used = sum(piece.shape[0] for piece in pieces)
    slack = torch.full((like.shape[0] - used, *like.shape[1:]), fill, device=like.device, dtype=dtype)
    return torch.cat([*(piece.to(dtype) for piece in pieces), slack])
