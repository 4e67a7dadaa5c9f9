"""Checks shared by the public ops. Each error is one sentence: what was given and what is allowed."""

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from vot_kernels.ops.attention_options import FEATURE_MAPS, Causal, Window
from vot_kernels.packing import PackedLayout, brief

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Check that `value` is one of `allowed`."""
    if isinstance(value, (Tensor, np.ndarray)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {brief(value)}.")


def check_number(name: str, value: object) -> float:
    """Return `value`, which must be a real number; a tensor is refused, because its gradient would be lost."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {brief(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be a number within the range of float64, got {brief(value)}."
        ) from None


def check_size(name: str, value: object, least: int = 1) -> int:
    """Return `value`, which must be an int not below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {brief(value)}.")
    return int(value)


def check_scale(name: str, value: object, head_dim: int) -> float:
    """Return `value`, which must be a number, or head_dim ** -0.5 for None."""
    return head_dim**-0.5 if value is None else check_number(name, value)


def check_causal(causal: Causal, modes: Sequence[str | None]) -> str | None:
    """Return `causal`, which must be one of `modes` or a bool, with True as "token" and False as None."""
    check_choice("causal", causal, (*modes, False, True))
    if isinstance(causal, str) or causal is None:
        return causal
    return "token" if causal else None


def check_tensor(name: str, value: object, dims: Sequence[str | int]) -> None:
    """Check that `value` is a tensor with the named dimensions; an int among `dims` is an exact size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {_shape(dims)}, got {type(value).__name__}.")
    shape = value.shape
    fits = len(shape) == len(dims)
    if fits:
        for size, dim in zip(shape, dims, strict=True):  # a generator would take twice as long
            fits = fits and (isinstance(dim, str) or size == dim)
    if not fits:
        advice = _advice(name, value, dims)
        raise ValueError(f"{name} must have the shape {_shape(dims)}, got {list(shape)}{advice}.")
    check_no_tangent(name, value)


def check_width(name: str, value: object, width: int) -> None:
    """Check that `value` is a tensor `[..., width]`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {brief(value)}.")
    if value.ndim == 0 or value.shape[-1] != width:
        raise ValueError(f"{name} must have the shape [..., {width}], got {list(value.shape)}.")


def _advice(name: str, value: Tensor, dims: Sequence[str | int]) -> str:
    """Suggest the right call where a batch was given in place of packed tokens, or the reverse."""
    more, first = value.ndim - len(dims), dims[0] if dims else ""
    if more == 1 and first in ("total_q", "total_k"):
        return "; flash_attn_func takes a batch [batch, seqlen, heads, head_dim]"
    if more == -1 and first == "batch":
        return "; flash_attn_varlen_func takes packed tokens [total, heads, head_dim]"
    if more != 1 or first != "tokens":
        return ""
    if len(dims) == 2:
        batch, length = value.shape[:2]
        layout = f"PackedLayout.from_lengths([{length}] * {batch})"
        flat = f"flatten a batch with {name}.flatten(0, 1), whose layout is {layout}"
    else:
        flat = (
            f"flatten a batch [B, T, H, D] with {name}.flatten(0, 1) or [B, H, T, D] with "
            f"{name}.transpose(1, 2).flatten(0, 1), whose layout is PackedLayout.from_lengths([T] * B)"
        )
    return f"; {flat}, or pack it with PackedLayout.from_mask if it has padding"


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Check that `tensor` has no tangent of forward-mode differentiation, which the ops would lose."""
    if not torch.compiler.is_compiling() and unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} has a tangent, but the ops have no forward-mode derivative; use reverse mode (backward)."
        )


def _shape(dims: Sequence[str | int]) -> str:
    """Format dimensions for messages, and only for these: a compiled graph cannot print a symbolic size."""
    return f"[{', '.join(map(str, dims))}]"


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that `tensor` is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")


def check_alike(reference_name: str, reference: Tensor, **others: Tensor) -> None:
    """Check that every tensor of `others` has the dtype and device of `reference`."""
    for name, tensor in others.items():
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {reference_name}, {reference.dtype}, got {tensor.dtype}."
            )
    check_device(reference_name, reference, **others)


def check_device(reference_name: str, reference: Tensor, **others: Tensor) -> None:
    """Check that every tensor of `others` is on the device of `reference`."""
    device = reference.device
    for name, tensor in others.items():
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {device}, got {tensor.device}."
            )


def check_groups(layout: PackedLayout, window: Window, causal: str | None) -> None:
    """Check that `layout` has groups if the options need them; without groups, each segment would be one near group."""
    if layout.grouped or (window is None and causal != "group"):
        return
    asked = f"window={brief(window)} counts" if window is not None else 'causal="group" orders'
    raise ValueError(
        f"{asked} groups, but the layout has none; give it group_size or cu_groups "
        "(or window=None for attention to the whole segment)."
    )


def check_layout(name: str, tensor: Tensor, layout: object) -> None:
    """Check that `layout` is on the device of `tensor` and that its tokens fit into the rows of `tensor`.

    It compares shapes only, so that it neither waits for the device nor breaks a compiled graph.
    """
    if not isinstance(layout, PackedLayout):
        raise TypeError(
            "layout must be a PackedLayout, as from_lengths, from_cu_seqlens, from_mask or from_grid_thw makes it, "
            f"got {type(layout).__name__}."
        )
    if layout.positions.device != tensor.device:
        raise ValueError(
            f"layout is on {layout.positions.device} but {name} on {tensor.device}; use layout.to(...)."
        )
    if tensor.shape[0] < layout.positions.shape[0]:
        tokens = layout.positions.shape[0]
        transposed = tensor.ndim == 3 and tensor.shape[1] >= tokens
        advice = f"; [heads, tokens, head_dim] fits after {name}.transpose(0, 1)" if transposed else ""
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows, fewer than the {tokens} tokens of layout{advice}."
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q `[tokens, heads, head_dim]` and k, v `[tokens, kv_heads, head_dim]` fit, heads being a multiple."""
    check_tensor("q", q, ["tokens", "heads", "head_dim"])
    check_floating("q", q)
    check_tensor("k", k, ["tokens", "kv_heads", "head_dim"])
    check_tensor("v", v, ["tokens", "kv_heads", "head_dim"])
    check_alike("q", q, k=k, v=v)
    (tokens, heads, head_dim), (key_tokens, kv_heads, key_dim) = q.shape, k.shape
    if k.shape != v.shape or key_tokens != tokens or key_dim != head_dim:
        raise ValueError(
            "q, k and v must agree in tokens and head_dim, and k and v in heads, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"The {heads} heads of q must be a multiple of the {kv_heads} heads of k and v.")
    if head_dim == 0:
        raise ValueError("head_dim must be at least 1, got 0.")


def check_packed(q: Tensor, k: Tensor, v: Tensor, layout: object) -> None:
    """Check that q, k and v fit together and `layout` fits them."""
    check_qkv(q, k, v)
    check_layout("q", q, layout)


def check_per_head(name: str, values: Tensor | None, q: Tensor) -> None:
    """Check that `values` is None or a floating-point tensor `[heads]`."""
    if values is not None:
        check_tensor(name, values, [q.shape[1]])
        check_device("q", q, **{name: values})
        if not values.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {values.dtype}.")


def check_options(
    q: Tensor,
    k: Tensor,
    beta: Tensor | None,
    feature_map: str,
    q_features: Tensor | None,
    k_features: Tensor | None,
    far_weight: Tensor | None = None,
) -> None:
    """Check the far part: a weight `[heads]`, a known feature map, and both features or neither."""
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_per_head("beta", beta, q)
    check_per_head("far_weight", far_weight, q)
    if beta is not None and far_weight is not None:
        raise ValueError("Give either beta or far_weight, which is exp(beta), not both.")
    if (q_features is None) != (k_features is None):
        raise ValueError("q_features and k_features must be given together, got one of them.")
    if q_features is not None and k_features is not None:
        check_tensor("q_features", q_features, [q.shape[0], q.shape[1], "width"])
        check_tensor("k_features", k_features, [k.shape[0], k.shape[1], q_features.shape[2]])
        check_alike("q", q, q_features=q_features, k_features=k_features)
