"""States of groups on the C++ kernels: float32 `[groups, kv_heads, width, row]`, see `csrc/kernels/group_states.h`."""

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels

# Numbers of FeatureMap in csrc/kernels/feature_map.h; "none" is for features as they are.
FEATURE_MAPS = {"softmax": 0, "elu": 1, "relu": 2, "none": 3}


def state_row(head_dim: int) -> int:
    """The length of a row of a state, [values, last] and zeros; `state_row` of csrc/kernels/group_states.h."""
    return (head_dim + 16) // 16 * 16


def group_states(
    features: Tensor,
    values: Tensor,
    ranges: Tensor,
    kv_heads: int,
    feature_map: str,
    weights: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """The state of each group: the sum of phi(features) weights [values, last]^T over its rows and shared heads.

    Args:
        features, values: `[tokens, heads, width]` and `[tokens, heads, head_dim]`, columns side by side.
        ranges: int32 `[2, groups]`, first row of each group and one past the last.
        kv_heads: heads // kv_heads heads add up.
        feature_map: a name of `FEATURE_MAPS`.
        weights, last: float32 `[tokens, heads]`, contiguous, or None for 1.
    """
    shape = (ranges.shape[1], kv_heads, features.shape[2], state_row(values.shape[2]))
    states = values.new_empty(shape, dtype=torch.float32)
    kernels().group_states(features, values, weights, last, ranges, FEATURE_MAPS[feature_map], states)
    return states


def far_states(states: Tensor, bounds: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """For each group the sum of the states of its segment up to its `before`, and of those from its `after` on.

    bounds: int32 `[segments + 1]`, the first group of each segment. before, after: int32 `[groups]`, which do not fall
    along a segment; None leaves a side out, and one of them is given.
    """
    sums = torch.empty_like(states)
    kernels().far_states(states, bounds, before, after, sums)
    return sums
