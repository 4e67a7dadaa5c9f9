"""The flash-attn functions in PyTorch operations: equal segments as one batch, a few heads at a time.

On a CPU torch's kernel reads any strides, so segments are views of the packed tensors where nothing has to be
converted, masked or shared among heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    stretches,
    to_heads,
    to_tokens,
)
from vot_kernels.ops.parts.range_attention.torch import (
    RangePass,
    attend_rows,
    attend_rows_backward,
    plan_pass,
    plan_windows,
    range_attention,
    range_attention_backward,
)

_COPIED = 2**13  # numbers in a run; copying more takes longer than a call of torch's kernel


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse `[total_q, heads]`, at least float32."""
    q, k, v = inputs
    plan = _plan(inputs, geometry)
    if plan.views is not None:
        return attend_rows(q, k, v, plan.views, options.scale)
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
    if plan.views is not None and grads.d_lse is None:
        found = attend_rows_backward(grads.d_out, q, k, v, saved.out, saved.lse, plan.views, options.scale)
        return Inputs(*found)
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
    """Packed rows and keys, and what the rows see: each pass has at most one key range per row.

    `views` is the only pass in blocks that `attend_rows` takes, None if it cannot serve the call.
    """

    rows: int
    keys: int
    passes: tuple[RangePass, ...]
    views: RangePass | None = None


def _plan(inputs: Inputs, geometry: Geometry) -> Plan:
    """The plan of a packing on the device of its tensors, once its bounds are on the host and found sound."""
    rows, keys = geometry.host_bounds(inputs)
    return make_plan(tuple(rows), tuple(keys), geometry.left, geometry.right, _width(inputs), inputs.q.device)


def _width(inputs: Inputs) -> int | None:
    """The numbers of a row if torch's kernel can read it as it lies, else None."""
    q, k, v = inputs
    as_it_lies = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if not as_it_lies or q.shape[1] != k.shape[1] or any(x.stride(2) != 1 for x in inputs):
        return None
    return q.shape[1] * q.shape[2]


@remember
def make_plan(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    left: int | None,
    right: int | None,
    width: int | None,
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
    passes = [blocks for blocks in passes if blocks]
    views = None if width is None or len(passes) > 1 else _as_views(passes, width)
    return Plan(rows[-1], keys[-1], tuple(passes), views)


def _as_views(passes: Sequence[RangePass], width: int) -> RangePass:
    """The blocks of one pass at most, cut into blocks of adjacent runs; runs that are short are rather copied."""
    found = []
    for item in (item for blocks in passes for item in blocks):
        starts = np.stack([item.queries.starts, item.keys.starts], axis=1)
        apart = item.queries.length * width > _COPIED
        lengths = (item.queries.length, item.keys.length)
        for part in stretches(starts, lengths) if apart else [slice(None)]:
            found.append(item.part(part))
    return tuple(found)
