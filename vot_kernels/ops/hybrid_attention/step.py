"""Hybrid attention over a stream, one group at a time, with a state of constant size."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vot_kernels.ops.attention_options import window_sides
from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import check_alike, check_options, check_qkv, check_scale
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.hybrid_attention.geometry import Inputs
from vot_kernels.ops.parts.attention import Options


class NearGroup(NamedTuple):
    """A group that is still in the window: copies of its k and v, and of its k_features if they were given."""

    k: Tensor
    v: Tensor
    k_features: Tensor | None


@dataclass(frozen=True)
class HybridAttentionState:
    """What a stream keeps: the groups in the window, and the sum over all groups before them.

    Attributes:
        near: the last groups, at most as many as the window holds.
        far: `[kv_heads, width, head_dim + 1]`, sum of phi(k) [v, 1]^T, float32 (float64 for float64 inputs);
            None until a group has left the window.
    """

    near: tuple[NearGroup, ...] = ()
    far: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensors in bytes, which does not grow with the stream."""
        tensors = [x for group in self.near for x in group if x is not None]
        tensors += [] if self.far is None else [self.far]
        return sum(x.numel() * x.element_size() for x in tensors)


@autocasts("q", "k", "v", "q_features", "k_features")
def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: HybridAttentionState | None = None,
    *,
    window: int | tuple[int, int] = 1,
    beta: Tensor | None = None,
    feature_map: str = "softmax",
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, HybridAttentionState]:
    """Attend from the next group of a stream; the result equals its rows of `hybrid_attention(causal="group")`.

    The state is not changed; the returned one replaces it and shares no memory with the inputs. This function is for
    inference only. There are C++ kernels for it and no Triton kernels.

    Args:
        q, k, v: one group, shaped as for `hybrid_attention`.
        state: the state that the previous step returned, or None at the beginning of a stream.
        window, beta, feature_map, q_features, k_features, scale: as for `hybrid_attention`, and the same at every
            step of a stream. The window cannot be None, because the state would grow without bound.
        backend: "auto", "cpp" or "torch"; it may change from step to step.

    Returns:
        The output `[tokens, heads, head_dim]` in the dtype of q, and the next state.

    Raises:
        TypeError: an argument that must be a tensor is not one, q is not floating point, dtypes differ from each other
            or from the earlier groups of the stream (with a window of 0, of which only a sum is kept, float64 alone is
            told from the others), or `state` is not a HybridAttentionState.
        ValueError: shapes or devices do not fit together or do not fit the earlier groups, `feature_map` or `window`
            is not allowed, or no such backend can serve the inputs.
        RuntimeError: gradients are required.
    """
    check_qkv(q, k, v)
    check_options(q, k, beta, feature_map, q_features, k_features)
    if window is None:
        raise ValueError(
            "window must be an int >= 0 for a stream, because with None the state would grow without bound, got None."
        )
    left, _ = window_sides(window, "group")
    scale = check_scale("scale", scale, q.shape[2])
    state = HybridAttentionState() if state is None else state
    _check_state(k, k_features, state)
    tensors = (q, k, v, beta, q_features, k_features)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            "hybrid_attention_step is for inference: call it under torch.no_grad(), "
            'and train with hybrid_attention(causal="group").'
        )
    kernels = load("hybrid_attention", select("hybrid_attention_step", backend, q, features=q_features))
    options = Options(feature_map, scale)
    groups = (*state.near, NearGroup(k, v, k_features))
    near_k, near_v = (torch.cat(parts) for parts in zip(*((x.k, x.v) for x in groups), strict=True))
    out = kernels.forward_step(Inputs(q, near_k, near_v, beta, q_features, None), state.far, options)
    far = state.far
    leaving = max(0, len(groups) - (left or 0))
    for group in groups[:leaving]:
        added = kernels.state_of_group(*group, feature_map)
        far = added if far is None else far + added
    near = groups[leaving:]
    if near:  # the caller may write into the tensors of the newest group
        own = NearGroup(k.clone(), v.clone(), None if k_features is None else k_features.clone())
        near = (*near[:-1], own)
    return out, HybridAttentionState(near, far)


def _check_state(k: Tensor, k_features: Tensor | None, state: object) -> None:
    if not isinstance(state, HybridAttentionState):
        raise TypeError(f"state must be a HybridAttentionState or None, got {type(state).__name__}.")
    for group in state.near[:1]:
        if group.k.shape[1:] != k.shape[1:]:
            raise ValueError(
                f"k must have the shape [tokens, {group.k.shape[1]}, {group.k.shape[2]}] of the stream's "
                f"earlier groups, got {list(k.shape)}."
            )
        check_alike("the stream's earlier k", group.k, k=k)
        width, earlier = (None if x is None else x.shape[2] for x in (k_features, group.k_features))
        if width != earlier:
            raise ValueError(
                f"k_features must have the width of the stream's earlier groups, {earlier}, got {width}."
            )
    if state.far is not None:
        _check_far(k, k_features, state.far)


def _check_far(k: Tensor, k_features: Tensor | None, far: Tensor) -> None:
    """With a window of 0 the state has no group to compare with, but the sum over all of them."""
    width = (k if k_features is None else k_features).shape[2]
    expected = [k.shape[1], width, k.shape[2] + 1]
    if list(far.shape) != expected:
        raise ValueError(
            f"k and k_features must have the heads and widths of the stream's earlier groups: their state has the "
            f"shape {list(far.shape)}, and these make one of {expected}."
        )
    if far.device != k.device:
        raise ValueError(
            f"k must be on the device of the stream's earlier groups, {far.device}, got {k.device}."
        )
    if (far.dtype == torch.float64) != (k.dtype == torch.float64):
        raise TypeError(
            f"k must have the dtype of the stream's earlier groups: their state is in {far.dtype}, and k in {k.dtype}."
        )
