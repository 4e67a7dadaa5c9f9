"""The flash-attn functions on the C++ kernels of range attention."""

from torch import Tensor

from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention.cpp import (
    Plan,
    plan_ranges,
    range_attention_backward,
    range_attention_forward,
)


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse, float32 `[total_q, heads]`."""
    return range_attention_forward(*inputs, _plan(inputs, geometry), options.scale)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of q, k and v."""
    inputs, out, lse = saved
    plan = _plan(inputs, geometry)
    return Inputs(*range_attention_backward(*grads, out, lse, *inputs, plan, options.scale))


def _plan(inputs: Inputs, geometry: Geometry) -> Plan:
    geometry.host_bounds(inputs)  # refuses what would lead beyond the tensors
    return plan_ranges(geometry.key_ranges(), inputs.q.shape[1], inputs.k.shape[1])
