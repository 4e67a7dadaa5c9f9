"""The flash-attn functions, computed by the range attention kernels."""

from torch import Tensor

from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention.triton import range_attention_backward, range_attention_forward


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output and lse, float32 `[total_q, heads]`."""
    return range_attention_forward(*inputs, geometry.key_ranges(), options.scale)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Return the gradients of q, k and v."""
    inputs, out, lse = saved
    ranges = geometry.key_ranges()
    return Inputs(
        *range_attention_backward(
            *grads, out, lse, *inputs, ranges, options.scale, deterministic=options.deterministic
        )
    )
