"""The softmax attention functions of PyTorch itself."""

import inspect
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.attention import Attention
from benchmarks.providers.naive_attention import (
    Masks,
    available_memory,
    build_masks,
    dense,
    refuses_quadratic,
)

HALF = (torch.float16, torch.bfloat16)


def exact(problem: Attention) -> Attention:
    """Return softmax over the whole segment in place of a linear or hybrid problem."""
    return replace(problem, kind="packed_attention")


def with_exact(provider: Provider, *suites: str) -> tuple[Provider, Provider]:
    """Return a provider of softmax attention, and the same for context in suites of other functions."""
    context = replace(
        provider,
        name=f"exact {provider.name}",
        suites=suites or ("hybrid",),
        solves=exact,
        instead="exact softmax over the whole segment",
    )
    return provider, context


class Bounds(NamedTuple):
    """The arguments of kernels for packed sequences: int32 `[segments + 1]` and the longest segment."""

    cu_seqlens: Tensor
    longest: int


def bounds(problem: Attention, dtype: torch.dtype, device: torch.device) -> Bounds:
    """Return cumulative lengths on the device."""
    cumulative = torch.tensor((0, *problem.lengths)).cumsum(0).to(device, torch.int32)
    return Bounds(cumulative, max(problem.lengths))


def needs_gpu(
    problem: Attention, dtype: torch.dtype, device: torch.device, direction: str, capability: int = 80
) -> str | None:
    """Return why a half-precision CUDA kernel for `capability` and later cannot run here, None if it can."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    if dtype not in HALF:
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < capability:
        return f"needs sm_{capability} or later, this is sm_{major}{minor}"
    return None


# --- scaled_dot_product_attention ---


def per_segment(problem: Attention, prepared: None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call it once per segment."""
    gqa = problem.heads != problem.kv_heads
    outputs = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part), is_causal=problem.causal, enable_gqa=gqa
        )[0].transpose(0, 1)
        for part in zip(*(x.split(list(problem.lengths)) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _per_segment_cudnn(problem: Attention, prepared: None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return per_segment(problem, prepared, q, k, v)


class Padding(NamedTuple):
    """The packed rows' positions among `[segments * longest]` rows, and which padded keys are real."""

    rows: Tensor
    mask: Tensor | None


def _pad_index(problem: Attention, dtype: torch.dtype, device: torch.device) -> Padding | None:
    """Return None if all segments are equally long, because the packed buffer then is the padded one."""
    longest = max(problem.lengths)
    if min(problem.lengths) == longest:
        return None
    real = torch.arange(longest) < torch.tensor(problem.lengths)[:, None]
    # A causal query never sees the padding after it, so is_causal is a sufficient mask.
    mask = None if problem.causal else real[:, None, None].to(device)
    return Padding(real.flatten().nonzero()[:, 0].to(device), mask)


def _padded(problem: Attention, padding: Padding | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute all segments in one call, each padded to the longest."""
    segments, longest = len(problem.lengths), max(problem.lengths)

    def pad(x: Tensor) -> Tensor:
        if padding is not None:
            x = x.new_zeros(segments * longest, *x.shape[1:]).index_copy(0, padding.rows, x)
        return x.unflatten(0, (segments, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q),
        pad(k),
        pad(v),
        attn_mask=padding.mask if padding else None,
        is_causal=problem.causal,
        enable_gqa=problem.heads != problem.kv_heads,
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out[padding.rows] if padding else out


def _refuses_padding(
    problem: Attention, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    """Return why the padded buffers do not fit into the memory of a CPU, None if they do."""
    rows = len(problem.lengths) * max(problem.lengths)
    buffers = 4 if direction == "forward" else 8
    needed = buffers * rows * problem.heads * problem.head_dim * dtype.itemsize
    available = available_memory()
    if device.type != "cpu" or needed <= available / 2:
        return None
    return (
        f"{buffers} buffers padded from {problem.size:,} to {rows:,} tokens take {needed / 2**30:.1f} GiB, "
        f"more than half of the {available / 2**30:.1f} GiB available"
    )


# --- torch.nn.attention.varlen ---


def _varlen(problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts grouped heads without a flag; later versions need it.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    gqa = {"enable_gqa": True} if told and problem.heads != problem.kv_heads else {}
    cumulative, longest = given
    window = (-1, 0) if problem.causal else (-1, -1)
    return varlen_attn(q, k, v, cumulative, cumulative, longest, longest, window_size=window, **gqa)


def _no_varlen() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


# --- FlexAttention ---


@cache
def _compiled_flex() -> tuple[Any, Any]:
    """Return attention and mask builder, compiled for every shape that occurs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Past the limit PyTorch would silently run the uncompiled function.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _document_mask(problem: Attention, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the block mask of tokens that share a segment."""
    lengths = torch.tensor(problem.lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[query] == document[key]

    def same_and_earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    mask = same_and_earlier if problem.causal else same
    return _compiled_flex()[1](mask, None, None, problem.size, problem.size, device=str(device))


def _flex(problem: Attention, mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    gqa = problem.heads != problem.kv_heads
    return _compiled_flex()[0](query, key, value, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)


def _refuses_flex(problem: Attention, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if device.type == "cpu" and direction != "forward":
        return "FlexAttention has no backward on a CPU"
    return None


# --- torch.compile of the definition ---


@cache
def _compiled_dense(differentiable: bool) -> Any:
    return torch.compile(dense, dynamic=True)


def _segment_masks(problem: Attention, dtype: torch.dtype, device: torch.device) -> list[Masks]:
    return [build_masks(replace(problem, lengths=(n,)), dtype, device) for n in problem.lengths]


def _dense_per_segment(problem: Attention, masks: list[Masks], *inputs: Tensor) -> Tensor:
    """Compute the definition segment by segment, compiled once for any length."""
    qkv, beta = inputs[:3], inputs[3] if len(inputs) > 3 else None
    compiled = _compiled_dense(torch.is_grad_enabled())
    parts = zip(*(x.split(list(problem.lengths)) for x in qkv), masks, strict=True)
    outputs = [compiled(*part[:3], *part[3], beta, problem.head_dim**-0.5) for part in parts]
    return torch.cat(outputs)


PROVIDERS = (
    *with_exact(Provider("SDPA per segment", ("softmax",), per_segment), "linear", "hybrid"),
    Provider("padded SDPA", ("softmax",), _padded, prepare=_pad_index, refuses=_refuses_padding),
    Provider("cuDNN SDPA per segment", ("softmax",), _per_segment_cudnn, refuses=needs_gpu),
    *with_exact(
        Provider("varlen_attn", ("softmax",), _varlen, prepare=bounds, missing=_no_varlen, refuses=needs_gpu),
    ),
    Provider(
        "FlexAttention",
        ("softmax",),
        _flex,
        prepare=_document_mask,
        refuses=_refuses_flex,
        quick_size=0,
    ),
    Provider(
        "torch.compile of naive per segment",
        ("softmax", "linear", "hybrid"),
        _dense_per_segment,
        prepare=_segment_masks,
        refuses=partial(refuses_quadratic, lambda problem: max(problem.lengths)),
        quick_size=0,
    ),
)
