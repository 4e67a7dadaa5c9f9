"""Linear attention with a softmax feature map: plain PyTorch, flash-linear-attention 0.6.0, and
flash-bidirectional-linear-attention, of which VOT_BENCH_BIDIRECTIONAL names a folder with a copy.

flash-linear-attention is causal. A bidirectional sum is its forward pass plus that over the reversed
tokens, minus the diagonal, which both of them count.
"""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.attention import Attention
from benchmarks.providers.pytorch_attention import Bounds, bounds, needs_gpu

BIDIRECTIONAL = "VOT_BENCH_BIDIRECTIONAL"


def _torch_linear(problem: Attention, prepared: None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Per segment, compute one product for the state, one for the output, and the normaliser."""
    share = problem.heads // problem.kv_heads
    outputs = []
    for query, key, value in zip(*(x.split(list(problem.lengths)) for x in (q, k, v)), strict=True):
        query, key = (x.softmax(-1).transpose(0, 1) for x in (query, key))
        state = (key.transpose(1, 2) @ value.transpose(0, 1)).repeat_interleave(share, 0)
        total = key.sum(1).repeat_interleave(share, 0)
        out = (query @ state) / (query @ total[:, :, None])
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _refuses_causal(
    problem: Attention, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    return "written for bidirectional attention" if problem.causal else None


class Segments(NamedTuple):
    """int64 `[segments + 1]` bounds of the packed tokens and of the reversed ones; the segment of each token."""

    forward: Tensor
    reverse: Tensor
    owner: Tensor


def _segments(problem: Attention, dtype: torch.dtype, device: torch.device) -> Segments:
    forward = torch.tensor((0, *problem.lengths)).cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(problem.lengths)), torch.tensor(problem.lengths))
    reverse = problem.size - forward.flip(0)
    return Segments(*(x.to(device) for x in (forward, reverse, owner)))


def _fla(name: str, problem: Attention, given: Segments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import fla.ops.linear_attn

    function = getattr(fla.ops.linear_attn, name)
    share = problem.heads // problem.kv_heads
    query, key = q.softmax(-1), k.softmax(-1)
    key, value = (x.repeat_interleave(share, 1) if share > 1 else x for x in (key, v))
    if problem.causal:
        return _causal_sum(function, query, key, value, given.forward, normalize=True)
    later = _causal_sum(function, *(x.flip(0) for x in (query, key, value)), given.reverse).flip(0)
    total = _causal_sum(function, query, key, value, given.forward) + later
    total = total - (query * key).sum(-1, keepdim=True) * value
    return (total / _normaliser(query, key, given)).to(q.dtype)


def _causal_sum(
    function: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **options: Any
) -> Tensor:
    inputs = (x[None] for x in (query, key, value))
    return function(*inputs, **({"scale": 1.0, "normalize": False, "cu_seqlens": bounds} | options))[0][0]


def _normaliser(query: Tensor, key: Tensor, given: Segments) -> Tensor:
    """Return phi(q) . sum of phi(k) over the segment, `[tokens, heads, 1]`, float32."""
    totals = query.new_zeros(len(given.forward) - 1, *key.shape[1:], dtype=torch.float32)
    totals = totals.index_add(0, given.owner, key.float())
    return (query * totals[given.owner]).sum(-1, keepdim=True)


def _bidirectional(problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-bidirectional-linear-attention, which takes features and one head of keys per head of queries."""
    package = _import_bidirectional()
    share = problem.heads // problem.kv_heads
    key, value = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k.softmax(-1), v))
    return package.varlen_linear_attention(q.softmax(-1), key, value, *given, eps=0.0)


def _refuses_bidirectional(
    problem: Attention, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if not all(problem.lengths):
        return "it wants segments that are not empty"
    return _refuses_causal(problem, dtype, device, direction) or needs_gpu(problem, dtype, device, direction)


def _no_bidirectional() -> str | None:
    folder = os.environ.get(BIDIRECTIONAL)
    if not folder:
        return f"{BIDIRECTIONAL} names no folder with flash-bidirectional-linear-attention"
    if not (Path(folder) / "flash_bla" / "ops" / "linear_attn" / "varlen.py").is_file():
        return f"{BIDIRECTIONAL}={folder} holds no flash_bla/ops/linear_attn/varlen.py"
    return None


def _import_bidirectional() -> ModuleType:
    folder = os.environ[BIDIRECTIONAL]
    sys.path.insert(0, folder)
    try:
        return import_module("flash_bla.ops.linear_attn.varlen")
    finally:
        sys.path.remove(folder)


PROVIDERS = (
    Provider(
        "flash-bidirectional-linear-attention",
        ("linear",),
        _bidirectional,
        prepare=bounds,
        missing=_no_bidirectional,
        refuses=_refuses_bidirectional,
    ),
    Provider("torch linear", ("linear",), _torch_linear, refuses=_refuses_causal),
    *(
        Provider(
            title,
            ("linear",),
            partial(_fla, name),
            prepare=_segments,
            missing=needs("fla", package="flash-linear-attention"),
            refuses=needs_gpu,
        )
        for title, name in (
            ("flash-linear-attention chunk", "chunk_linear_attn"),
            ("flash-linear-attention fused", "fused_chunk_linear_attn"),
        )
    ),
)
