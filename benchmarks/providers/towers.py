"""Vision towers of transformers after `vot_kernels.patch`, against the attention of transformers itself."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.encoder import served_by
from benchmarks.problems.towers import PATCHED, Tower, apply
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.ops.parts.plans import forget_plans

_OP = "flash_attn_varlen_func"


def _arguments(problem: Tower, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    forget_plans()  # the next call plans anew, as for the first layer of a new batch
    return problem.arguments(device)


def _patched(backend: str, problem: Tower, arguments: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    with served_by(backend):
        return apply(problem, PATCHED, arguments, *inputs)


def _unpatched(attention: str, problem: Tower, arguments: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return apply(problem, attention, arguments, *inputs)


def _refuses(
    backend: str, problem: Tower, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    return "; ".join(describe_backends(device, dtype)[_OP][backend]) or None


def _half_on_cuda(problem: Tower, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return None
    return "it takes half precision on CUDA alone"


_common: dict[str, Any] = {"suites": ("towers",), "missing": needs("transformers"), "prepare": _arguments}

PROVIDERS = (
    *(
        Provider(
            f"vot-kernels {backend}",
            run=partial(_patched, backend),
            refuses=partial(_refuses, backend),
            ours=True,
            **_common,
        )
        for backend in ("triton", "cpp", "torch")
    ),
    *(Provider(name, run=partial(_unpatched, name), **_common) for name in ("sdpa", "eager")),
    Provider(
        "flash_attention_2",
        run=partial(_unpatched, "flash_attention_2"),
        refuses=_half_on_cuda,
        **_common | {"missing": needs("transformers", "flash_attn")},
    ),
)
