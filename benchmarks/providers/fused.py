"""The memory-bound ops: ours, plain PyTorch, PyTorch written to be fast, and torch.compile of it.

DenseFormer's mixing step is measured beside them. It is written anew for this suite from its description (Pagliardini
et al., NeurIPS 2024), including its way of storing the states.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.fused import (
    DenseResidual,
    DenseResidualNorm,
    NormalisePatches,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)
from vot_kernels.ops.dense_residual import dense_residual
from vot_kernels.ops.dense_residual.reference import dense_residual as dense_residual_reference
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.ops.pack_patches import pack_patches
from vot_kernels.ops.pack_patches.reference import pack_patches as pack_patches_reference
from vot_kernels.ops.rope_qk_norm import rope_qk_norm
from vot_kernels.ops.rope_qk_norm.reference import rope_qk_norm as rope_qk_norm_reference
from vot_kernels.ops.size_aware_embedding import size_aware_embedding, size_features
from vot_kernels.ops.size_aware_embedding.reference import (
    size_aware_embedding as size_aware_embedding_reference,
)
from vot_kernels.packing import PackedLayout

Problem = DenseResidual | RopeQkNorm | SizeAwareEmbedding | PackPatches
Results = Tensor | Sequence[Tensor]


# --- ours ---------------------------------------------------------------------------------------------------


def _layout(problem: Problem, dtype: torch.dtype, device: torch.device) -> PackedLayout | None:
    return problem.layout(device) if isinstance(problem, RopeQkNorm | SizeAwareEmbedding) else None


def _ours(backend: str, problem: Problem, layout: PackedLayout | None, *inputs: Tensor) -> Results:
    match problem:
        case DenseResidualNorm():
            *states, weights, norm = inputs
            return dense_residual(states, weights, norm_weight=norm, eps=problem.eps, backend=backend)
        case DenseResidual():
            return dense_residual(inputs[:-1], inputs[-1], backend=backend)
        case RopeQkNorm():
            q, k, q_weight, k_weight = inputs
            return rope_qk_norm(
                q,
                k,
                layout.positions,
                q_weight=q_weight,
                k_weight=k_weight,
                theta=problem.theta,
                eps=problem.eps,
                backend=backend,
            )
        case SizeAwareEmbedding():
            return size_aware_embedding(inputs[0], layout, *inputs[1:], backend=backend)
        case NormalisePatches():
            options = {"mean": problem.mean, "std": problem.std, "dtype": inputs[-1].dtype}
            return pack_patches(inputs[:-2], problem.patch_size, backend=backend, **options)[0]
        case PackPatches():
            return pack_patches(inputs, problem.patch_size, backend=backend)[0]


def _backend_refuses(
    backend: str, problem: Problem, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    return "; ".join(describe_backends(device, dtype)[problem.op][backend]) or None


# --- plain PyTorch: the reference ---------------------------------------------------------------------------


def _plain(problem: Problem, layout: PackedLayout | None, *inputs: Tensor) -> Results:
    match problem:
        case DenseResidualNorm():
            return problem.oracle(inputs, None)
        case DenseResidual():
            return dense_residual_reference(inputs[:-1], inputs[-1])
        case RopeQkNorm():
            q, k, q_weight, k_weight = inputs
            return rope_qk_norm_reference(
                q,
                k,
                layout.positions,
                q_weight=q_weight,
                k_weight=k_weight,
                theta=problem.theta,
                sections=problem.sections,
                eps=problem.eps,
            )
        case SizeAwareEmbedding():
            features = size_features(layout.sizes, octaves=problem.octaves)
            return size_aware_embedding_reference(inputs[0], layout.cu_seqlens, features, *inputs[1:])
        case NormalisePatches():
            return problem.oracle(inputs, None)
        case PackPatches():
            return pack_patches_reference(inputs, problem.patch_size, temporal_patch_size=1)[0]


# --- PyTorch written to be fast -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """The data that depend only on the packing: rotary tables, or sizes and owners of the tokens."""

    first: Tensor
    second: Tensor


def _tables(problem: Problem, dtype: torch.dtype, device: torch.device) -> _Tables | None:
    if isinstance(problem, RopeQkNorm):
        positions = problem.layout(device).positions
        columns = [
            positions[:, axis, None] * problem.theta ** (-torch.arange(n, device=device) / max(n, 1))
            for axis, n in enumerate(problem.sections)
        ]
        angles = torch.cat(columns * 2, dim=1)[:, None]
        return _Tables(angles.cos(), angles.sin())
    if isinstance(problem, SizeAwareEmbedding):
        layout = problem.layout(device)
        return _Tables(size_features(layout.sizes, octaves=problem.octaves), layout.token_segments)
    return None


def _fast_dense_residual(*inputs: Tensor) -> Tensor:
    """The sum in float32, one state after the other."""
    *states, weights = inputs
    total = states[0] * weights[0]
    for state, weight in zip(states[1:], weights[1:].unbind(), strict=True):
        total = total.addcmul_(state, weight)
    return total.to(states[0].dtype)


def _fast_dense_residual_norm(eps: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    *summed, norm = inputs
    total = _fast_dense_residual(*summed)
    return total, F.rms_norm(total.float(), norm.shape, norm, eps).to(total.dtype)


def _fast_rope_qk_norm(
    eps: float, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Tables made once and halves rotated, as in language models."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)
        a, b = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def _fast_size_aware_embedding(
    features: Tensor, owners: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    hidden = F.silu(F.linear(features, w1.float(), b1.float()))
    embedding = F.linear(hidden, w2.float(), b2.float())
    return (x + embedding.index_select(0, owners)).to(x.dtype)


def _fast_pack_patches(p: int, *images: Tensor) -> Tensor:
    cut = []
    for image in images:
        channels, height, width = image.shape
        grid = image.reshape(channels, height // p, p, width // p, p)
        cut.append(grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * p * p))
    return torch.cat(cut)


def _fast_normalise_patches(p: int, *inputs: Tensor) -> Tensor:
    """Pack the bytes, then normalise all patches at once."""
    *frames, mean, std = inputs
    packed = _fast_pack_patches(p, *frames)
    scale = (1 / (255 * std.float())).repeat_interleave(p * p)
    shift = (mean.float() / std.float()).repeat_interleave(p * p)
    return (packed * scale - shift).to(mean.dtype)


def _fast(wrap: Callable[[Any], Any], problem: Problem, tables: _Tables | None, *inputs: Tensor) -> Results:
    match problem:
        case DenseResidualNorm():
            return wrap(_fast_dense_residual_norm)(problem.eps, *inputs)
        case DenseResidual():
            return wrap(_fast_dense_residual)(*inputs)
        case RopeQkNorm():
            return wrap(_fast_rope_qk_norm)(problem.eps, tables.first, tables.second, *inputs)
        case SizeAwareEmbedding():
            return wrap(_fast_size_aware_embedding)(tables.first, tables.second, *inputs)
        case NormalisePatches():
            return wrap(_fast_normalise_patches)(problem.patch_size, *inputs)
        case PackPatches():
            return wrap(_fast_pack_patches)(problem.patch_size, *inputs)


@cache
def _compiled(function: Any) -> Any:
    """Compile for each shape anew, which is the best case; the default limit falls back to eager after eight."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler; there is no {compiler}"


# --- DenseFormer --------------------------------------------------------------------------------------------


class _StoredStates(torch.autograd.Function):
    """The buffer that already has the states, without a copy."""

    @staticmethod
    def forward(ctx: Any, *states: Tensor) -> Tensor:
        first = states[0]
        return first.as_strided((len(states), *first.shape), (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


def _denseformer(stored: bool, problem: DenseResidual, prepared: None, *inputs: Tensor) -> Tensor:
    *states, weights = inputs
    stack = _StoredStates.apply(*states) if stored else torch.stack(states)
    return torch.tensordot(weights.to(stack.dtype), stack, dims=1)


def _not_dense_residual(
    problem: Problem, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    plain = isinstance(problem, DenseResidual) and not isinstance(problem, DenseResidualNorm)
    return None if plain else "DenseFormer has dense residuals alone"


SUITE = ("fused",)

PROVIDERS = (
    *(
        Provider(
            name=f"vot-kernels {backend}",
            suites=SUITE,
            prepare=_layout,
            run=partial(_ours, backend),
            refuses=partial(_backend_refuses, backend),
            ours=True,
        )
        for backend in ("triton", "cpp", "torch")
    ),
    Provider("plain PyTorch", SUITE, _plain, prepare=_layout),
    Provider("fast PyTorch", SUITE, partial(_fast, lambda function: function), prepare=_tables),
    Provider(
        "torch.compile",
        SUITE,
        partial(_fast, _compiled),
        prepare=_tables,
        missing=_no_compiler,
        quick_size=0,
    ),
    Provider(
        "DenseFormer in torch stacked now",
        SUITE,
        partial(_denseformer, False),
        refuses=_not_dense_residual,
    ),
    Provider(
        "DenseFormer in torch stored stacked",
        SUITE,
        partial(_denseformer, True),
        refuses=_not_dense_residual,
    ),
)
