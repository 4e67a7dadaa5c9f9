"""Linear attention on the C++ kernels: states of segments or tiles, then rows (`csrc/kernels/linear_attention.cpp`)."""

from typing import Any

import torch
from torch import Tensor

from vot_kernels.cpp.library import kernels
from vot_kernels.ops.launch import rows_contiguous
from vot_kernels.ops.linear_attention.geometry import Geometry, Inputs, Options, Saved
from vot_kernels.ops.parts.attention import Grads
from vot_kernels.ops.parts.group_states.cpp import FEATURE_MAPS


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """The output, and 2^-32 / Z float32 `[tokens, heads]`, 0 where Z is 0."""
    q = inputs.q
    out, inverse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    kernels().linear_attention_forward(*_arguments(inputs, geometry, options), out, inverse)
    return out, inverse


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of q, k and v. The states are made again: they may outweigh the inputs."""
    found = Inputs(*(x.new_empty(x.shape) for x in saved.inputs[:3]))
    d_out = rows_contiguous(grads.d_out)
    arguments = _arguments(saved.inputs, geometry, options)
    kernels().linear_attention_backward(d_out, saved.inverse.contiguous(), *arguments, *found[:3])
    return found


def _arguments(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Any, ...]:
    """What both kernels take. Columns lie side by side; tokens and heads may be strided."""
    rows = (rows_contiguous(x) for x in inputs[:3])
    bounds = geometry.host_cu_seqlens.contiguous()
    return *rows, bounds, FEATURE_MAPS[options.feature_map], geometry.causal is not None
