"""This package's ops on each of its backends."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.attention import Attention
from vot_kernels.ops.dispatch import OPS, describe_backends
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.parts.plans import forget_plans
from vot_kernels.packing import PackedLayout


def _layout(problem: Attention, dtype: torch.dtype, device: torch.device) -> PackedLayout:
    forget_plans()  # the next call plans anew, as for the first layer of a new batch
    return problem.layout(device)


def _attention(
    backend: str, problem: Attention, layout: PackedLayout, *inputs: Tensor, **options: Any
) -> Tensor:
    q, k, v, *beta = inputs
    if problem.kind == "packed_attention":
        return packed_attention(q, k, v, layout, causal=problem.causal, backend=backend, **options)
    if problem.kind == "linear_attention":
        return linear_attention(q, k, v, layout, causal=problem.causal, backend=backend, **options)
    options |= {"window": problem.window, "beta": beta[0]}
    return hybrid_attention(q, k, v, layout, backend=backend, **options)


def _refuses(
    backend: str, problem: Any, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if problem.op not in OPS:
        return f"there is no op {problem.op}"
    return "; ".join(describe_backends(device, dtype)[problem.op][backend]) or None


def _refuses_other_than(
    directions: tuple[str, ...],
    reason: str,
    problem: Any,
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
) -> str | None:
    """Refuse a variant of the Triton backend where it equals the ordinary one, so that nothing is measured twice."""
    return _refuses("triton", problem, dtype, device, direction) or (
        None if direction in directions else f"{reason}: vot-kernels triton is the same"
    )


def _no_gpu(capability: tuple[int, int] = (0, 0)) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= capability:
        return None
    least = f" of compute capability {capability[0]}.{capability[1]} or later" if any(capability) else ""
    return f"there is no GPU{least}"


BACKENDS = tuple(
    Provider(
        name=f"vot-kernels {backend}",
        suites=("softmax", "linear", "hybrid"),
        prepare=_layout,
        run=partial(_attention, backend),
        refuses=partial(_refuses, backend),
        ours=True,
    )
    for backend in ("triton", "cpp", "torch")
)

FUSED = Provider(
    name="vot-kernels triton, fused backward",
    suites=("softmax", "hybrid"),
    prepare=_layout,
    run=partial(_attention, "triton", _variant="fused"),
    missing=_no_gpu,
    refuses=partial(_refuses_other_than, ("backward", "both"), "only the backward differs"),
    ours=True,
)

DESCRIPTORS = tuple(
    Provider(
        name=f"vot-kernels triton, {name}",
        suites=("softmax", "hybrid"),
        prepare=_layout,
        run=partial(_attention, "triton", _variant=variant),
        missing=partial(_no_gpu, (9, 0)),
        refuses=partial(_refuses_other_than, ("forward",), "only the forward differs"),
        ours=True,
    )
    for name, variant in (("TMA", "tma"), ("TMA, warp-specialized", "warp_specialized"))
)

PROVIDERS = (*BACKENDS, FUSED, *DESCRIPTORS)
"""Variants that the config tables do not use by default are measured beside the ordinary one."""
