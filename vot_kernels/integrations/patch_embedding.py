"""Patch embeddings as linear layers: a convolution whose kernel equals its stride sees every pixel once.

Qwen-VL hands its convolution one patch per row of the batch; a convolution of PyTorch spends most of that call on other
things than the multiplication. On a CPU the same holds, less so, for whole images and clips.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

FORWARD = "_conv_forward"  # what the forward of a convolution of PyTorch calls with input, weight and bias
_KINDS = (nn.Conv2d, nn.Conv3d)


def patch_embeddings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The convolutions of a model that embed patches, by name.

    Kernel and stride are equal, nothing is padded, dilated or grouped, and a patch has more pixels than channels, which
    tells the first layer of a tower from the downsampling between stages of a convolutional network.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or module.kernel_size != module.stride:
            continue
        plain = not any(module.padding) or module.padding == "valid"
        plain = plain and module.groups == 1 and set(module.dilation) == {1}
        pixels = module.weight[0, 0].numel()
        if plain and pixels > module.in_channels:
            yield name, module


def refusal(convolution: Any) -> str:
    """Why a convolution of `patch_embeddings` has to stay as it is, "" if it has not."""
    kind = type(convolution)
    own = FORWARD in vars(convolution) or getattr(kind, FORWARD) not in [getattr(k, FORWARD) for k in _KINDS]
    if own:
        return "it has a computation of its own"
    if not convolution.weight.is_floating_point():
        return f"its weight is {convolution.weight.dtype}"
    return ""


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of `x` with a stride that equals the kernel.

    One patch per row of the batch is one product of matrices on every device. Whole images and clips are cut into
    patches on a CPU; elsewhere, and where a part of a patch is left over, the convolution computes them.

    Args:
        x: `[batch, channels, ...]` or `[channels, ...]`, with two dimensions of space or three of time and space.
        weight: `[out_channels, channels, ...]`.
        bias: `[out_channels]` or None.

    Returns:
        `[batch, out_channels, ...]`, the patches in each dimension.
    """
    kernel = weight.shape[2:]
    if x.ndim == weight.ndim and x.shape[2:] == kernel and x.shape[1] == weight.shape[1]:
        out = functional.linear(x.flatten(1), weight.flatten(1), bias)
        return out.reshape(*out.shape, *[1] * len(kernel))
    whole = all(size % step == 0 for size, step in zip(x.shape[2:], kernel, strict=False))
    if x.ndim == weight.ndim and x.device.type == "cpu" and whole and x.shape[1] == weight.shape[1]:
        out = functional.linear(_cut(x, kernel), weight.flatten(1), bias)
        return out.movedim(-1, 1)
    convolve = functional.conv2d if len(kernel) == 2 else functional.conv3d
    return convolve(x, weight, bias, stride=tuple(kernel))


def _cut(x: Tensor, kernel: Any) -> Tensor:
    """`[batch, channels, ...]` to `[batch, patches in each dimension, channels * pixels of a patch]`."""
    dims = len(kernel)
    for i, step in enumerate(kernel):
        x = x.unflatten(2 + 2 * i, (x.shape[2 + 2 * i] // step, step))
    patches, pixels = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *patches, 1, *pixels).flatten(1 + dims)
