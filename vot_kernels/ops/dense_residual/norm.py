"""The RMS norm of a sum of states, for the backends that compute it after the sum."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32 or wider."""
    wide = accumulator(x.dtype)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def rms_norm_backward(d_normed: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, in float32 or wider, and that of the weight."""
    wide = accumulator(x.dtype)
    scale = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    unit, d_normed = x.to(wide) * scale, d_normed.to(wide)
    d_weight = (d_normed * unit).flatten(0, -2).sum(0) if x.ndim > 1 else d_normed * unit
    d_normed = d_normed * weight.to(wide)
    d_x = scale * (d_normed - unit * (d_normed * unit).mean(-1, keepdim=True))
    return d_x, d_weight.to(weight.dtype)
