"""An embedding of a segment's size, shape and frame rate, added to each of its tokens."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.autocast import autocasts, without_autocast
from vot_kernels.ops.checks import (
    check_choice,
    check_device,
    check_floating,
    check_layout,
    check_number,
    check_tensor,
)
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.eager import custom_op
from vot_kernels.ops.size_aware_embedding import reference
from vot_kernels.packing import PackedLayout

QUANTITIES = 6
_LONGEST_PERIOD = 32.0  # octaves of size, so that no two sizes up to 2^16 tokens a side coincide


def size_features(
    sizes: Tensor, fps: Tensor | float | None = None, *, octaves: int = 4, use_frames: bool = True
) -> Tensor:
    """Fourier features of log2 height, width, height / width, height · width, frames and fps.

    Each quantity v gives sin and cos of 2π v 2^o / 32 for o = 0 .. octaves - 1. The features are smooth, so that a
    size that training never saw lies between its neighbours. An unknown quantity (frames without `use_frames`, fps
    None, or any value that is not positive) gives zeros, which no known value gives.

    Args:
        sizes: `[segments, 3]`, (frames, height, width) in tokens.
        fps: frames per second of each segment `[segments]`, one number for all, or None.
        octaves: number of frequencies per quantity.
        use_frames: False if the clip length is not known in advance (streaming); fps is still used.

    Returns:
        float32 `[segments, 12 · octaves]`, without a gradient.

    Raises:
        ValueError: `sizes` or `fps` does not have the shape above.
        TypeError: `fps` is complex.
    """
    if sizes.ndim != 2 or sizes.shape[1] != 3:
        raise ValueError(f"sizes must be [segments, 3], got {list(sizes.shape)}.")
    segments = sizes.shape[0]
    frames, height, width = sizes.to(torch.float32).unbind(1)
    if fps is None:
        rate = torch.zeros_like(frames)
    else:
        if not isinstance(fps, Tensor):
            fps = check_number("fps", fps)
        elif fps.is_complex():
            raise TypeError(f"fps must be real, got {fps.dtype}.")
        rate = torch.as_tensor(fps, dtype=torch.float32, device=sizes.device)
        if rate.ndim > 1 or rate.ndim == 1 and rate.shape[0] != segments:
            raise ValueError(f"fps must be a number or [{segments}], got {list(rate.shape)}.")
        rate = rate.expand(segments)
    length = frames if use_frames else torch.zeros_like(frames)
    aspect = torch.where((height > 0) & (width > 0), height / width, torch.zeros_like(height))
    values = torch.stack([height, width, aspect, height * width, length, rate], dim=1)
    known = (values > 0)[..., None]
    turns = 2.0 ** torch.arange(octaves, device=sizes.device) * (2 * math.pi / _LONGEST_PERIOD)
    angles = torch.where(known, values.clamp_min(1e-30)[..., None].log2() * turns, 0.0)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1) * known
    return waves.reshape(segments, 2 * QUANTITIES * octaves)


@autocasts()
def size_aware_embedding(
    x: Tensor,
    layout: PackedLayout,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    fps: Tensor | float | None = None,
    use_frames: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return x + W2 SiLU(W1 f + b1) + b2 for every token, where f are the `size_features` of its segment.

    The embedding is a function of height, width, aspect ratio, frames and fps, not a table index, so it extends to
    sizes that training never saw. Everything is computed in float32 (float64 for float64 x) and rounded once.

    Args:
        x: `[tokens, dim]`, floating. Rows beyond the layout's tokens become zero.
        layout: its `sizes` are in tokens, and its `cu_seqlens` say which rows they describe.
        w1: `[hidden, 12 · octaves]`, for any number of octaves.
        b1: `[hidden]`.
        w2: `[dim, hidden]`.
        b2: `[dim]`.
        fps: frames per second, `[segments]` or one number; None or entries <= 0 mean unknown.
        use_frames: False leaves the clip length out.
        backend: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        `[tokens, dim]`, in the dtype of x.

    Raises:
        TypeError: `layout` is not a `PackedLayout`, a tensor is missing, or x is not floating.
        ValueError: a tensor does not have the shape above or lies on another device than x; x has fewer rows than
            the layout has tokens; `fps` is neither a number nor `[segments]`; `backend` is unknown or cannot serve
            these inputs.
    """
    _validate(x, layout, w1, b1, w2, b2)
    check_choice("use_frames", use_frames, (False, True))
    octaves = w1.shape[1] // (2 * QUANTITIES)
    features = size_features(layout.sizes, fps, octaves=octaves, use_frames=use_frames)
    chosen = select("size_aware_embedding", backend, x)
    if chosen == "reference":
        return reference.size_aware_embedding(x, layout.cu_seqlens, features, w1, b1, w2, b2)
    dtype = accumulator(x.dtype)
    w1, b1, w2, b2 = (t.to(dtype) for t in (w1, b1, w2, b2))
    embedding = F.linear(F.silu(F.linear(features.to(dtype), w1, b1)), w2, b2)
    return _segment_add_fwd(x, embedding, layout.cu_seqlens, layout.positions.shape[0], chosen)


@custom_op("vot_kernels::segment_add_fwd", ("cu_seqlens",))
def _segment_add_fwd(x: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int, backend: str) -> Tensor:
    """Add to each row of x its segment's row of `embedding` `[segments, dim]`; rows from `tokens` on become zero."""
    return load("size_aware_embedding", backend).forward(x, embedding, cu_seqlens, tokens)


@_segment_add_fwd.register_fake
def _(x: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("vot_kernels::segment_add_bwd", ("cu_seqlens",))
@without_autocast
def _segment_add_bwd(
    d_out: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Return d_x and d_embedding."""
    return load("size_aware_embedding", backend).backward(d_out, embedding, cu_seqlens, tokens)


@_segment_add_bwd.register_fake
def _(
    d_out: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int, backend: str
) -> tuple[Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), embedding.new_empty(embedding.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, embedding, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(embedding, cu_seqlens)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_embedding = _segment_add_bwd(d_out, *ctx.saved_tensors, *ctx.options)
    return d_x, d_embedding, None, None, None


_segment_add_fwd.register_autograd(_backward, setup_context=_setup_context)


def _validate(x: Tensor, layout: PackedLayout, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    check_tensor("x", x, ["tokens", "dim"])
    check_floating("x", x)
    check_layout("x", x, layout)
    check_tensor("w1", w1, ["hidden", "12 * octaves"])
    if w1.shape[1] == 0 or w1.shape[1] % (2 * QUANTITIES):
        raise ValueError(f"w1 must be [hidden, 12 * octaves], got {list(w1.shape)}.")
    check_tensor("b1", b1, [w1.shape[0]])
    check_tensor("w2", w2, [x.shape[1], w1.shape[0]])
    check_tensor("b2", b2, [x.shape[1]])
    check_device("x", x, w1=w1, b1=b1, w2=w2, b2=b2)
