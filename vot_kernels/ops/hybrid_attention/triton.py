"""Hybrid attention on the Triton kernels: states of groups, their sums over the far ones, and range attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vot_kernels.ops.launch import rows_contiguous
from vot_kernels.ops.parts.group_states.triton import Rows, group_states, scan_states
from vot_kernels.ops.parts.range_attention.triton import (
    FarPart,
    KeyRanges,
    fuses_backward,
    range_attention_backward,
    range_attention_forward,
    range_attention_keys_backward,
    range_attention_rows_backward,
)


@dataclass(frozen=True, eq=False)
class Geometry:
    """What is near and what is far in one packing, from the arguments of `hybrid_attention`.

    Attributes:
        cu_seqlens, cu_groups, segment_groups: int32, as in `PackedLayout`, on the device.
        host_segment_groups: the last of them on the host.
        left, right: near groups on either side, None for all.
        causal: "none", "group" or "token".
    """

    cu_seqlens: Tensor
    cu_groups: Tensor
    segment_groups: Tensor
    host_segment_groups: Tensor
    left: int | None
    right: int | None
    causal: str

    @property
    def ranges(self) -> KeyRanges:
        """The near part."""
        groups = self.cu_groups, self.segment_groups
        return KeyRanges.of_groups(self.cu_seqlens, *groups, self.left, self.right, self.causal)

    @property
    def lags(self) -> tuple[int | None, int | None]:
        """How many groups back and ahead the far ones begin; None for no such side."""
        behind = None if self.left is None else self.left + 1
        ahead = None if self.right is None or self.causal != "none" else self.right + 1
        return behind, ahead

    @property
    def has_far(self) -> bool:
        """Whether any group is far from another one of its segment, judged on the host."""
        lags = [lag for lag in self.lags if lag is not None]
        counts = self.host_segment_groups.diff()
        return bool(lags) and counts.numel() > 0 and int(counts.max()) > min(lags)

    def far_states(self, rows: Rows, kv_heads: int, feature_map: str, *, mirrored: bool = False) -> Tensor:
        """For each group the sum of the states of the groups far from it; mirrored: from which it is far."""
        behind, ahead = reversed(self.lags) if mirrored else self.lags
        states = group_states(rows, self.cu_groups, kv_heads, feature_map)
        sums = None
        if behind is not None:
            sums = scan_states(states, self.segment_groups, lag=behind)
        if ahead is not None:
            sums = scan_states(states, self.segment_groups, lag=ahead, reverse=True, out=sums)
        return torch.zeros_like(states) if sums is None else sums


def hybrid_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    geometry: Geometry,
    feature_map: str,
    scale: float,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse, float32 `[tokens, heads]`; the arguments are those of `hybrid_attention`."""
    if not geometry.has_far:
        return range_attention_forward(q, k, v, geometry.ranges, scale, variant=variant)
    v = _compact(v)
    queries, keys, name = _features(q, k, q_features, k_features, feature_map)
    states = geometry.far_states(Rows(keys, v), k.shape[1], name)
    far = FarPart(states, queries, name, beta)
    return range_attention_forward(q, k, v, geometry.ranges, scale, far, variant=variant)


def hybrid_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    geometry: Geometry,
    feature_map: str,
    scale: float,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, beta, q_features and k_features; None for these where there is no far part.

    The far states are made again instead of kept: small groups have larger states than inputs.
    """
    ranges = geometry.ranges
    if not geometry.has_far:
        saved = (out, lse, q, k, v, ranges, scale)
        return *range_attention_backward(d_out, d_lse, *saved, variant=variant), None, None, None
    d_out, v = _compact(d_out), _compact(v)  # a gradient may be expanded, as that of a sum is
    near = (q, k, v, ranges, scale)
    queries, keys, name = _features(q, k, q_features, k_features, feature_map)
    states = geometry.far_states(Rows(keys, v), k.shape[1], name)
    far = FarPart(states, queries, name, beta)
    fused = fuses_backward(q, variant, far=True)
    rows = range_attention_rows_backward(d_out, d_lse, out, lse, *near, far, fused=fused)
    gradients = Rows(queries, d_out, rows.far_weight, -rows.delta)
    states = geometry.far_states(gradients, k.shape[1], name, mirrored=True)
    far, dq = FarPart(states, keys, name), rows.dq if fused else None
    dk, dv, d_keys = range_attention_keys_backward(d_out, lse, rows.delta, *near, far, dq=dq)
    d_beta = None if beta is None or rows.d_beta is None else rows.d_beta.sum(0).to(beta.dtype)
    return rows.dq.to(q.dtype), dk, dv, d_beta, rows.d_features, d_keys


def _features(
    q: Tensor, k: Tensor, q_features: Tensor | None, k_features: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, str]:
    """What phi is made of on either side, and the feature map that is still to be applied."""
    if q_features is None or k_features is None:
        return _compact(q), _compact(k), feature_map
    return _compact(q_features), _compact(k_features), "none"


def _compact(x: Tensor) -> Tensor:
    return rows_contiguous(x, compact=True)
