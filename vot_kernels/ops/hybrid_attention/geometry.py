"""Near and far groups, and the tensors that every backend takes, except the reference."""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vot_kernels.ops.attention_options import Window, window_sides
from vot_kernels.ops.parts.plans import keep_with
from vot_kernels.ops.parts.range_attention.triton import KeyRanges
from vot_kernels.packing import PackedLayout


class Inputs(NamedTuple):
    """The tensors of `hybrid_attention`, or the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None
    q_features: Tensor | None = None
    k_features: Tensor | None = None


class Saved(NamedTuple):
    """What the backward reads: the inputs and the results of the forward."""

    inputs: Inputs
    out: Tensor
    lse: Tensor


class Geometry(NamedTuple):
    """The groups of a packing that are near each other and those that are far.

    Attributes:
        cu_seqlens, cu_groups, segment_groups: int32, as in `PackedLayout`, on the device.
        host_cu_seqlens, host_cu_groups, host_segment_groups: the same on the host.
        left, right: near groups on either side, None for all; 0 on the right if causal.
        causal: None, "group" or "token".
    """

    cu_seqlens: Tensor
    cu_groups: Tensor
    segment_groups: Tensor
    host_cu_seqlens: Tensor
    host_cu_groups: Tensor
    host_segment_groups: Tensor
    left: int | None
    right: int | None
    causal: str | None

    @classmethod
    def of(cls, layout: PackedLayout, window: Window, causal: str | None) -> "Geometry":
        """Return the geometry of `layout`. A malformed window raises the ValueError of `window_sides`."""
        return cls(
            layout.cu_seqlens,
            layout.cu_groups,
            layout.segment_groups,
            layout.host_cu_seqlens,
            layout.host_cu_groups,
            layout.host_segment_groups,
            *window_sides(window, causal),
            causal,
        )

    @property
    def all_near(self) -> bool:
        """Whether groups play no part: a token sees its whole segment, or all of it up to itself, as near."""
        return self.left is None and self.causal != "group"

    @property
    def lags(self) -> tuple[int | None, int | None]:
        """The distances in groups, back and ahead, at which far groups begin; None for a side without far groups."""
        behind = None if self.left is None else self.left + 1
        ahead = None if self.right is None or self.causal is not None else self.right + 1
        return behind, ahead

    @property
    def has_far(self) -> bool:
        """Whether any group is far from another one of its segment."""
        lags = [lag for lag in self.lags if lag is not None]
        if not lags:
            return False
        bounds = self.host_segment_groups
        most = keep_with(bounds, "most groups", lambda: int(np.diff(bounds.numpy()).max(initial=0)))
        return most > min(lags)

    @staticmethod
    def weighs(beta: Tensor | None) -> bool:
        """Whether far groups may have a weight: False if all are known to be 0. Those on a GPU are not read."""
        return beta is None or beta.device.type != "cpu" or bool((beta != -math.inf).any())

    def needs_far(self, beta: Tensor | None) -> bool:
        """`has_far`, unless the weights are known to be 0."""
        return self.has_far and self.weighs(beta)

    def key_ranges(self) -> KeyRanges:
        """The near keys of each row, as the kernels take them."""
        tokens_right = 0 if self.causal == "token" else None
        if self.all_near:
            return KeyRanges.of_segments(
                self.cu_seqlens, self.cu_seqlens, tokens_right=tokens_right, of_layout=True
            )
        groups = self.cu_groups, self.cu_groups, self.segment_groups
        sides = self.left, self.right
        return KeyRanges(self.cu_seqlens, self.cu_seqlens, *groups, *sides, None, tokens_right, True)

    def near_ranges(self) -> np.ndarray:
        """The near keys on the host: int64 `[groups, 4]`, begin and end of each group, begin and end of its near keys.

        If all is near, each segment is one group. With token causality, a group ends where its near keys end, and no
        row sees a key after itself.
        """
        segments, groups, first = (
            bounds.numpy().astype(np.int64)
            for bounds in (self.host_cu_seqlens, self.host_cu_groups, self.host_segment_groups)
        )
        if self.all_near:
            return np.stack([segments[:-1], segments[1:]] * 2, axis=1)
        counts, index = np.diff(first), np.arange(len(groups) - 1)
        low, high = np.repeat(first[:-1], counts), np.repeat(first[1:] - 1, counts)
        low = low if self.left is None else np.maximum(low, index - self.left)
        high = high if self.right is None else np.minimum(high, index + self.right)
        return np.stack([groups[:-1], groups[1:], groups[low], groups[high + 1]], axis=1)

    def near_rows(self) -> np.ndarray:
        """The near keys of each row on the host: int64 `[2, rows]`, begin and end."""
        begin, end, low, high = self.near_ranges().T
        low, high = (np.repeat(side, end - begin) for side in (low, high))
        return np.stack([low, np.arange(len(low)) + 1 if self.causal == "token" else high])
