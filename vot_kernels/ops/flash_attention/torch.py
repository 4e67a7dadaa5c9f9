"""The flash-attn functions in PyTorch operations: equal segments as one batch, a few heads at a time."""

import math
from typing import NamedTuple

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
from vot_kernels.ops.parts.range_attention.segments import plan_segments, row_width
from vot_kernels.ops.parts.range_attention.torch import (
    RangePass,
    attend_rows,
    attend_rows_backward,
    range_attention,
    range_attention_backward,
)


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


class Plan(NamedTuple):
    """Packed rows and keys, and what the rows see, as in `Passes`."""

    rows: int
    keys: int
    passes: tuple[RangePass, ...]
    views: RangePass | None


def _plan(inputs: Inputs, geometry: Geometry) -> Plan:
    """The plan of a packing on the device of its tensors, once its bounds are on the host and found sound."""
    rows, keys = geometry.host_bounds(inputs)
    return make_plan(
        tuple(rows), tuple(keys), geometry.left, geometry.right, row_width(*inputs), inputs.q.device
    )


@remember
def make_plan(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    left: int | None,
    right: int | None,
    width: int | None,
    device: torch.device,
) -> Plan:
    """The plan of segments with these bounds."""
    segments = np.array([rows[:-1], rows[1:], keys[:-1], keys[1:]], np.int64).T
    return Plan(rows[-1], keys[-1], *plan_segments(segments, left, right, width, device))
