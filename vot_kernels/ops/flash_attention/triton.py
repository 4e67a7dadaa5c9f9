"""The flash-attn functions on the range attention kernels."""

from torch import Tensor

from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention.triton import range_attention_backward, range_attention_forward


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Output and lse, float32 `[total_q, heads]`."""
    return range_attention_forward(*inputs, geometry.key_ranges(), options.scale)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of q, k and v."""
    inputs, out, lse = saved
    ranges = geometry.key_ranges()
    return Inputs(
        *range_attention_backward(
            *grads, out, lse, *inputs, ranges, options.scale, deterministic=options.deterministic
        )
    )
