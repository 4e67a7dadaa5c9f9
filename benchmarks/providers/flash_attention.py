"""Softmax attention of other packages: flash-attn 2, 3 and 4, and xformers.

The calls follow the signatures of flash-attn 2.8.3, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36 and
xformers 0.0.35.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.attention import Attention
from benchmarks.providers.pytorch_attention import Bounds, bounds, needs_gpu, with_exact


def _flash_attn_2(problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, problem, given, q, k, v)


def _flash_attn_3(problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, problem, given, q, k, v)


def _flash_attn_4(problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, problem, given, q, k, v)


def _flash(function: Any, problem: Attention, given: Bounds, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cumulative, longest = given
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=cumulative,
        cu_seqlens_k=cumulative,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=problem.causal,
    )
    return result[0] if isinstance(result, tuple) else result  # version 4 returns the lse too


def _refuses_flash_attn_3(
    problem: Attention, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if direction != "forward":
        return "fa3-fwd is built without a backward"
    if dtype == torch.float16:
        return "fa3-fwd is built without float16"
    return needs_gpu(problem, dtype, device, direction, capability=90)


def _block_diagonal(problem: Attention, dtype: torch.dtype, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(problem.lengths), device=device)
    return mask.make_causal() if problem.causal else mask


def _xformers(problem: Attention, mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if problem.heads == problem.kv_heads:
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    # Grouped heads: [1, tokens, kv_heads, heads per kv_head, head_dim], keys expanded without a copy.
    share = problem.heads // problem.kv_heads
    query = q.unflatten(1, (problem.kv_heads, share))[None]
    key, value = (x[None, :, :, None].expand(-1, -1, -1, share, -1) for x in (k, v))
    return memory_efficient_attention(query, key, value, attn_bias=mask)[0].flatten(1, 2)


PROVIDERS = (
    *with_exact(
        Provider(
            "flash-attn 2",
            ("softmax",),
            _flash_attn_2,
            prepare=bounds,
            missing=needs("flash_attn", "flash_attn_2_cuda", package="flash-attn"),
            refuses=needs_gpu,
        )
    ),
    *with_exact(
        Provider(
            "flash-attn 3",
            ("softmax",),
            _flash_attn_3,
            prepare=bounds,
            missing=needs("fa3_fwd_interface", package="fa3-fwd"),
            refuses=_refuses_flash_attn_3,
        )
    ),
    *with_exact(
        Provider(
            "flash-attn 4",
            ("softmax",),
            _flash_attn_4,
            prepare=bounds,
            missing=needs("flash_attn.cute", "cutlass", package="flash-attn-4"),
            refuses=partial(needs_gpu, capability=90),
        )
    ),
    Provider(
        "xformers",
        ("softmax",),
        _xformers,
        prepare=_block_diagonal,
        missing=needs("xformers"),
        refuses=needs_gpu,
    ),
)
