"""This package's ops on each of its backends."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.attention import Attention
from vot_kernels.ops.dispatch import OPS, describe_backends
from vot_kernels.ops.hybrid_attention import _plan as _hybrid_plan
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.linear_attention import _plan as _linear_plan
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.packing import PackedLayout

PLANS = (_hybrid_plan, _linear_plan)
"""What the ops remember of a packing they have seen: all `lru_cache` of `vot_kernels.ops`."""


def forget_packings() -> None:
    """Make the next call of every op plan anew, as for the first layer of a new batch."""
    for plan in PLANS:
        plan.cache_clear()


def _layout(problem: Attention, dtype: torch.dtype, device: torch.device) -> PackedLayout:
    forget_packings()
    return problem.layout(device)


def _attention(backend: str, problem: Attention, layout: PackedLayout, *inputs: Tensor) -> Tensor:
    q, k, v, *beta = inputs
    if problem.kind == "packed_attention":
        return packed_attention(q, k, v, layout, causal=problem.causal, backend=backend)
    if problem.kind == "linear_attention":
        return linear_attention(q, k, v, layout, causal=problem.causal, backend=backend)
    return hybrid_attention(q, k, v, layout, window=problem.window, beta=beta[0], backend=backend)


def _refuses(
    backend: str, problem: Any, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if problem.op not in OPS:
        return f"there is no op {problem.op}"
    return "; ".join(describe_backends(device, dtype)[problem.op][backend]) or None


PROVIDERS = tuple(
    Provider(
        name=f"vot-kernels {backend}",
        suites=("softmax", "linear", "hybrid"),
        prepare=_layout,
        run=partial(_attention, backend),
        refuses=partial(_refuses, backend),
        ours=True,
    )
    for backend in ("triton", "torch")
)
