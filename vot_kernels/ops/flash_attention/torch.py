"""The flash-attn functions in PyTorch operations: equal segments as one batch, a few heads at a time."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.plans import remember
from vot_kernels.ops.parts.range_attention.blocks import (
    cut_heads,
    head_chunks,
    to_heads,
    to_tokens,
)
from vot_kernels.ops.parts.range_attention.torch import (
    RangePass,
    plan_pass,
    plan_windows,
    range_attention,
    range_attention_backward,
)


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse `[total_q, heads]`, at least float32."""
    q, k, v = inputs
    plan = _plan(inputs, geometry)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))
    for heads, kv_heads in head_chunks(q, k, 0):
        query = to_heads(q[:, heads], plan.rows)
        key, value = (to_heads(x[:, kv_heads], plan.keys) for x in (k, v))
        part, part_lse = range_attention(query, key, value, plan.passes, options.scale)
        to_tokens(part, out[:, heads])
        to_tokens(part_lse, lse[:, heads, None], fill=-math.inf)
    return out, lse


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of q, k and v."""
    q, k, v = saved.inputs
    plan = _plan(saved.inputs, geometry)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for heads, kv_heads in head_chunks(q, k, 0):
        d_out, out, query = (to_heads(x[:, heads], plan.rows) for x in (grads.d_out, saved.out, q))
        lse = to_heads(saved.lse[:, heads, None], plan.rows)
        d_lse = cut_heads(grads.d_lse, heads)
        d_lse = None if d_lse is None else to_heads(d_lse[..., None], plan.rows)
        key, value = (to_heads(x[:, kv_heads], plan.keys) for x in (k, v))
        operands = (query, key, value, out, lse, plan.passes, options.scale)
        parts = range_attention_backward(d_out, d_lse, *operands)
        to_tokens(parts[0], dq[:, heads])
        for part, total in zip(parts[1:], (dk, dv), strict=True):
            to_tokens(part, total[:, kv_heads])
    return Inputs(dq, dk, dv)


@dataclass(frozen=True, eq=False)
class Plan:
    """Packed rows and keys, and what the rows see: each pass has at most one key range per row."""

    rows: int
    keys: int
    passes: tuple[RangePass, ...]


def _plan(inputs: Inputs, geometry: Geometry) -> Plan:
    """The plan of a packing on the device of its tensors, once its bounds are on the host and found sound."""
    rows = _host_bounds("cu_seqlens_q", geometry.cu_seqlens_q, "q", inputs.q)
    keys = _host_bounds("cu_seqlens_k", geometry.cu_seqlens_k, "k", inputs.k)
    return make_plan(tuple(rows), tuple(keys), geometry.left, geometry.right, inputs.q.device)


@remember
def make_plan(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    left: int | None,
    right: int | None,
    device: torch.device,
) -> Plan:
    """Ranges of rows and keys that need no mask, unless there is a limit on the left.

    In the frame of a segment row i sees the keys before i + shift + 1. So the rows that see some but not all
    keys are a causal square whose first key is the one they start at, and see all keys before that.
    """
    row, row_end, key, key_end = segments = np.array([rows[:-1], rows[1:], keys[:-1], keys[1:]], np.int64)
    if left is not None:
        passes = [plan_windows(segments.T, left, right, device)]
        return Plan(rows[-1], keys[-1], tuple(blocks for blocks in passes if blocks))
    shift = key_end - key if right is None else key_end - key - (row_end - row) + right
    first = np.clip(row - shift, row, row_end)
    last = np.clip(row + key_end - key - shift, first, row_end)
    offset = key - row + shift
    squares = np.stack([first, last, first + offset, last + offset], axis=1)
    before = np.stack([first, last, key, first + offset], axis=1)
    whole = np.stack([last, row_end, key, key_end], axis=1)
    others = np.stack([before, whole], axis=1).reshape(-1, 4)
    passes = [plan_pass(squares, True, device), plan_pass(others, False, device)]
    return Plan(rows[-1], keys[-1], tuple(blocks for blocks in passes if blocks))


def _host_bounds(name: str, bounds: Tensor, owner: str, x: Tensor) -> list[int]:
    """The cumulative lengths as numbers."""
    numbers = bounds.tolist()
    if numbers[0] != 0:
        raise ValueError(
            f"{name} must begin with 0, got {numbers[0]}: it has cumulative lengths, not lengths."
        )
    for before, number in pairwise([0, *numbers]):
        if not before <= number <= x.shape[0]:
            raise ValueError(
                f"{name} must ascend from 0 to at most the {x.shape[0]} rows of {owner}, "
                f"got {number} after {before}."
            )
    return numbers
