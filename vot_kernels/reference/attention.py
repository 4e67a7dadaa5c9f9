"""Hybrid, packed and linear attention by their definition: dense masks, one segment at a time, autograd.

The kernel matrix is built entry by entry,

    kappa[i, j] = exp(scale * q_i.k_j)              j in near(i)
                = exp(beta) * phi(q_i).phi(k_j)     j in far(i)
                = 0                                 otherwise,

and o = kappa v / Z with Z = sum_j kappa[i, j], lse = log Z. Every row is divided by exp(pivot) before the
sums so that nothing overflows. Half precision is computed in float32 and rounded once at the end.
"""

import torch
from torch import Tensor

from vot_kernels.packing import PackedLayout

FEATURE_MAPS = ("softmax", "elu", "relu")
CAUSAL_MODES = (None, "group", "token")

Window = int | tuple[int, int] | None


def window_sides(window: Window, causal: str | None) -> tuple[int | None, int | None]:
    """Groups that are near on the left and on the right; None means all of them.

    An int counts for both sides, or for the left side alone when attention is causal.

    Raises:
        ValueError: not an int >= 0, a pair of them or None, or a causal window that looks right.
    """
    if window is None:
        return None, (None if causal is None else 0)
    if isinstance(window, bool):
        sides: list[object] = []
    elif isinstance(window, int):
        sides = [window, window if causal is None else 0]
    else:
        sides = list(window) if isinstance(window, (tuple, list)) else []
    left, right = sides if len(sides) == 2 else (None, None)
    if not _is_count(left) or not _is_count(right):
        raise ValueError(
            f"window must be an int >= 0, a pair (left, right) of them, or None for all, got {window!r}."
        )
    if causal is not None and right != 0:
        raise ValueError(f"A causal window looks left only: give an int or (left, 0), got {window!r}.")
    return left, right  # type: ignore[return-value]


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
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[tokens, heads, head_dim]` and lse `[tokens, heads]`; see the op of the same name."""
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


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention within each segment: output and lse."""
    return hybrid_attention(q, k, v, layout, window=None, causal="token" if causal else None, scale=scale)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    feature_map: str = "softmax",
    causal: bool = False,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised linear attention within each segment: output and log normaliser.

    log_decay: `[heads]`, at most 0, causal only: key j weighs exp(log_decay * (i - j)) times as much to query i.
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


def _bounds(layout: PackedLayout) -> list[int]:
    """First rows of the segments; an empty one in front ties even an empty result to its inputs."""
    return [0, *layout.host_cu_seqlens.tolist()]


def _normalised(
    scores: Tensor, near: Tensor, similarity: Tensor, far: Tensor, beta: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """kappa v / Z and log Z of one segment: scores and similarity `[heads, n, n]`, value `[heads, n, d]`.

    beta: log of the weight of far keys, `[heads, 1, 1]` or one per pair `[heads, n, n]`.
    """
    pivot = _pivot(scores, near, similarity, far, beta)
    kappa = (scores - pivot).masked_fill(~near, -torch.inf).exp()
    kappa = kappa + torch.where(far, beta - pivot, -torch.inf).exp() * similarity
    total = kappa.sum(-1, keepdim=True)
    found = total != 0  # NaN is found: it must show
    total = torch.where(found, total, 1)
    out = torch.where(found, kappa @ value / total, 0)
    return out, torch.where(found, pivot + total.log(), -torch.inf)[..., 0]


@torch.no_grad()
def _pivot(scores: Tensor, near: Tensor, similarity: Tensor, far: Tensor, beta: Tensor) -> Tensor:
    """The largest log kappa of each row, a constant that cancels; 0 where a row sees nothing."""
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
    """Which keys are near and which far for each query of a segment, both `[n, n]`."""
    left, right = sides
    distance = groups[None, :] - groups[:, None]  # of the key's group from the query's
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


def _log_weight(log_decay: Tensor | None, query: Tensor) -> Tensor:
    """log_decay * (i - j) `[heads, n, n]` for j < i and 0 elsewhere, or 0 `[heads, 1, 1]` without a decay."""
    if log_decay is None:
        return query.new_zeros(query.shape[0], 1, 1)
    place = torch.arange(query.shape[1], device=query.device)
    distance = place[:, None] - place
    weight = log_decay.to(query.dtype)[:, None, None] * distance
    return torch.where(distance > 0, weight, 0)  # -inf * 0 is 0 here: a token always sees itself


def _features(x: Tensor, name: str, given: Tensor | None = None, begin: int = 0, end: int = 0) -> Tensor:
    """Features of one segment, heads first: phi of `x`, or rows begin:end of the ones given."""
    return feature_map(x, name) if given is None else given[begin:end].to(x.dtype).transpose(0, 1)


def _assemble(pieces: list[Tensor], like: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """The segments' rows one after another, then rows of `fill` where the buffer has slack."""
    used = sum(piece.shape[0] for piece in pieces)
    slack = torch.full((like.shape[0] - used, *like.shape[1:]), fill, device=like.device, dtype=dtype)
    return torch.cat([*(piece.to(dtype) for piece in pieces), slack])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def aligned_mask(
    rows: int, keys: int, left: int | None, right: int | None, device: torch.device | None = None
) -> Tensor:
    """Which keys each row sees, `[rows, keys]`: from `left` before to `right` after the key of its own place.

    Places are counted from the end: the last row and the last key are at one place. None is no limit.
    """
    place = torch.arange(rows, device=device)[:, None] + (keys - rows)
    key = torch.arange(keys, device=device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    return seen


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one segment's rows to its keys, and lse `[rows, heads]`; see `aligned_mask`.

    q `[rows, heads, head_dim]`; k, v `[keys, kv_heads, head_dim]`.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[1] // k.shape[1]
    query = q.to(compute).transpose(0, 1)
    key, value = (x.to(compute).transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
    near = aligned_mask(q.shape[0], k.shape[0], left, right, q.device)
    nothing = torch.zeros_like(near)
    similarity = torch.zeros_like(query @ key.transpose(1, 2))
    scores = scale * (query @ key.transpose(1, 2))
    out, lse = _normalised(scores, near, similarity, nothing, query.new_zeros(q.shape[1], 1, 1), value)
    return out.transpose(0, 1).to(q.dtype), lse.transpose(0, 1)
