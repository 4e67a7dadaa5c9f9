"""Hybrid attention of short segments in PyTorch: all pairs of rows of a segment at once, near and far ones.

A segment of small groups that needs no states has about as many far pairs as near ones. Here one matrix of weights per
segment and head has both, so that v is multiplied once, and no pass copies rows for the other one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.group_states.torch import far_weight, feature_map, feature_map_backward
from vot_kernels.ops.parts.range_attention.blocks import Blocks

_CHUNK_NUMBERS = {"cpu": 2**18, "other": 2**26}  # a few matrices of so many numbers stay in the cache


@dataclass(frozen=True, eq=False)
class ShortSegments:
    """Segments of one length, whose rows see keys at the same places.

    Attributes:
        rows: a run for each segment.
        near: float32 `[length, length]`, 0 where a row sees a key in this way, else -inf.
        far: the same, 1 where it does, else 0. Sums and products with masks are faster than a choice.
    """

    rows: Blocks
    near: Tensor
    far: Tensor

    def parts(self, heads: int, width: int) -> list[Blocks]:
        """The segments, as many at a time as the budget allows, for rows of so many heads of a width."""
        length, device = self.rows.length, self.rows.device
        budget = _CHUNK_NUMBERS["cpu" if device.type == "cpu" else "other"]
        at_once = max(1, budget // (heads * length * max(length, width)))
        starts = self.rows.starts
        return [Blocks(starts[i : i + at_once], length, device) for i in range(0, len(starts), at_once)]


def plan_short_segments(
    geometry: Geometry, ranges: np.ndarray, segments: np.ndarray, device: torch.device
) -> tuple[ShortSegments, ...]:
    """Plan `segments`, numbers of segments that are not empty; `ranges` are `geometry.near_ranges()`."""
    bounds = geometry.host_segment_groups.numpy().astype(np.int64)
    alike: dict[bytes, list[int]] = {}
    patterns: dict[bytes, np.ndarray] = {}
    for segment in segments:
        groups = ranges[bounds[segment] : bounds[segment + 1]]
        pattern = groups - groups[0, 0]
        alike.setdefault(pattern.tobytes(), []).append(int(groups[0, 0]))
        patterns[pattern.tobytes()] = pattern
    return tuple(_plan(geometry, patterns[name], starts, device) for name, starts in alike.items())


def _plan(geometry: Geometry, groups: np.ndarray, starts: list[int], device: torch.device) -> ShortSegments:
    rows = groups[:, 1] - groups[:, 0]
    low, high = (np.repeat(side, rows)[:, None] for side in groups[:, 2:].T)
    key = np.arange(rows.sum())
    high = key[:, None] + 1 if geometry.causal == "token" else high
    before, after = (lag is not None for lag in geometry.lags)
    near = (low <= key) & (key < high)
    far = (key < low) & before | (key >= high) & after
    masks = (np.where(near, 0, -np.inf), far)
    near_mask, far_mask = (torch.from_numpy(mask.astype(np.float32)).to(device) for mask in masks)
    return ShortSegments(Blocks(np.array(starts), len(key), device), near_mask, far_mask)


def forward(
    inputs: Inputs, segments: tuple[ShortSegments, ...], options: Options, out: Tensor, lse: Tensor
) -> None:
    """Write the rows of `segments` of the output and of lse `[tokens, heads]`."""
    for item in segments:
        for rows in item.parts(*inputs.q.shape[1:]):
            some = _Part.of(inputs, rows, item, options)
            scores, far = some.scores(), some.far_products()
            beta, far_sum = some.log_weights(inputs.beta), far.sum(-1, keepdim=True)
            pivot = torch.maximum(scores.amax(-1, keepdim=True), beta + far_sum.log())
            weights, factor = scores.sub_(pivot).exp_(), far_weight(beta, pivot)
            total = weights.sum(-1, keepdim=True).add_(far_sum.mul_(factor))
            found = weights.addcmul_(far, factor) @ some.v
            some.put_rows(out, found.div_(total))
            some.put_rows(lse[..., None], total.log_().add_(pivot))


def backward(
    saved: Saved, grads: Grads, segments: tuple[ShortSegments, ...], options: Options, found: Inputs
) -> None:
    """Write the rows of `segments` of the gradients, and add to that of beta, in a dtype of at least float32."""
    inputs, out, lse = saved
    for item in segments:
        for rows in item.parts(*inputs.q.shape[1:]):
            some = _Part.of(inputs, rows, item, options)
            g, norm = some.fold(grads.d_out), some.fold(lse[..., None])
            near, far = some.scores().sub_(norm).exp_(), some.far_products()
            factor = far_weight(some.log_weights(inputs.beta), norm)
            weights = torch.addcmul(near, far, factor)
            delta = (g * some.output(weights, out)).sum(-1, keepdim=True)
            if grads.d_lse is not None:
                delta -= some.fold(grads.d_lse[..., None])
            dv = weights.transpose(1, 2) @ g
            d_weights = torch.baddbmm(delta, g, some.v.transpose(1, 2), beta=-1)
            d_scores = near.mul_(d_weights).mul_(options.scale)
            d_far = d_weights.mul_(some.far)
            dq, dk = d_scores @ some.k, d_scores.transpose(1, 2) @ some.q
            d_phi_q = (d_far @ some.k_features).mul_(factor)
            d_phi_k = d_far.transpose(1, 2) @ (some.q_features * factor)
            if found.beta is not None:
                d_beta = (some.q_features * d_phi_q).sum(-1, keepdim=True)
                found.beta.add_(some.heads_of(d_beta).sum((0, 2, 3)))
            if found.q_features is None:
                dq += feature_map_backward(some.q, some.q_features, d_phi_q, options.feature_map)
                dk += feature_map_backward(some.k, some.k_features, d_phi_k, options.feature_map)
            for part, total in ((dq, found.q), (dk, found.k), (dv, found.v)):
                some.put_rows(total, part)
            for part, features in ((d_phi_q, found.q_features), (d_phi_k, found.k_features)):
                if features is not None:
                    some.put_rows(features, part)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some segments of one length: `[segments * kv_heads, rows, width]` each, where heads that share keys are rows."""

    rows: Blocks
    kv_heads: int
    scale: float
    near: Tensor
    far: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Tensor
    k_features: Tensor

    @classmethod
    def of(cls, inputs: Inputs, rows: Blocks, item: ShortSegments, options: Options) -> "_Part":
        kv_heads, repeats = inputs.k.shape[1], inputs.q.shape[1] // inputs.k.shape[1]
        q, k, v = (_fold(x, rows, kv_heads) for x in inputs[:3])
        q_features, k_features = (
            feature_map(x, options.feature_map) if given is None else _fold(given, rows, kv_heads)
            for x, given in zip((q, k), inputs[4:], strict=True)
        )
        near, far = (x.to(q.dtype).repeat(repeats, 1) for x in (item.near, item.far))
        return cls(rows, kv_heads, options.scale, near, far, q, k, v, q_features, k_features)

    def scores(self) -> Tensor:
        """Scaled q.k, -inf where a key is not near."""
        return torch.baddbmm(self.near, self.q, self.k.transpose(1, 2), alpha=self.scale)

    def far_products(self) -> Tensor:
        """phi(q).phi(k), 0 where a key is not far."""
        return (self.q_features @ self.k_features.transpose(1, 2)).mul_(self.far)

    def output(self, weights: Tensor, out: Tensor) -> Tensor:
        """The rows of the output. do.(v - o) cancels, so a narrow one is computed again.

        Their weights need not sum to 1: where rows of other ranks are joined, lse is that of all.
        """
        folded = self.fold(out)
        if out.dtype == folded.dtype:
            return folded
        total = weights.sum(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).tiny)
        return (weights @ self.v).div_(total)

    def fold(self, x: Tensor) -> Tensor:
        """The rows of `[tokens, heads, width]` like those of q."""
        return _fold(x, self.rows, self.kv_heads)

    def log_weights(self, beta: Tensor | None) -> Tensor:
        """Beta `[heads]`, 0 for None, for the rows of q."""
        if beta is None:
            return self.q.new_zeros(1, 1, 1)
        heads = beta.to(self.q.dtype).reshape(self.kv_heads, -1, 1)
        return heads.repeat_interleave(self.rows.length, 1).repeat(len(self.rows), 1, 1)

    def heads_of(self, x: Tensor) -> Tensor:
        """`[segments, heads, length, width]` of the rows of q or of k."""
        return x.reshape(len(self.rows), -1, self.rows.length, x.shape[2])

    def put_rows(self, total: Tensor, part: Tensor) -> None:
        """Write rows like those of q or of k into `[tokens, heads, width]`."""
        self.rows.put_rows(total, self.heads_of(part).to(total.dtype))


def _fold(x: Tensor, rows: Blocks, kv_heads: int) -> Tensor:
    taken = rows.take_rows(x).to(accumulator(x.dtype))
    return taken.reshape(len(rows) * kv_heads, -1, x.shape[2])
