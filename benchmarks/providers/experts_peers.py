"""Plain mixtures of experts by packages that a user may have: each is imported only when it runs.

All get the same weights, `[experts, 2 * hidden, dim]` with the gate first and `[experts, dim, hidden]`, as views if
their own layout differs.
"""

import os
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.experts import MoE
from benchmarks.providers.experts import refuses_grouped

SCATTERMOE = "VOT_BENCH_SCATTERMOE"  # a folder with the package, such as a checkout of the repository
# The most that transformers' batched_mm may gather, a copy of the weights per slot; more takes minutes on a CPU.
GATHERED_BYTES = {"cuda": 2**34, "cpu": 2**26}


def _transformers(problem: MoE, experts: Any, *inputs: Tensor) -> Tensor:
    x, w_gate_up, w_down, idx, weights = inputs
    parameters = {"gate_up_proj": w_gate_up, "down_proj": w_down}
    return torch.func.functional_call(experts, parameters, (x, idx, weights))


def _transformers_experts(
    implementation: str, problem: MoE, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """Return an experts module of transformers without weights of its own, built once per size."""
    sizes = (problem.experts, problem.dim, problem.hidden, problem.top_k)
    return _meta_experts(implementation, *sizes)


@cache
def _meta_experts(implementation: str, experts: int, dim: int, hidden: int, top_k: int) -> torch.nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=experts, hidden_size=dim, moe_intermediate_size=hidden, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def _no_transformers() -> str | None:
    absent = needs("transformers")()
    if absent:
        return absent
    from importlib.metadata import version

    installed = version("transformers")
    return None if int(installed.split(".")[0]) >= 5 else f"transformers {installed} has no experts interface"


def _refuses_batched(problem: MoE, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    gathered = problem.tokens * problem.top_k * 3 * problem.hidden * problem.dim * dtype.itemsize
    if gathered > GATHERED_BYTES[device.type]:
        return f"batched_mm would gather {gathered / 2**30:,.1f} GiB, a copy of the weights for each slot"
    return None


def _liger(problem: MoE, prepared: None, *inputs: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    x, w_gate_up, w_down, idx, weights = inputs
    return LigerFusedMoEFunction.apply(x, w_gate_up, w_down, idx.to(torch.int32), weights)


def _scattermoe(problem: MoE, prepared: None, *inputs: Tensor) -> Tensor:
    package = _import_scattermoe()
    x, w_gate_up, w_down, idx, weights = inputs
    ordered, order, offsets = package.flatten_sort_count(idx, num_experts=problem.experts)
    gate, up = package.parallel_linear(
        x, w_gate_up.transpose(1, 2), problem.top_k, ordered, order, offsets, grouped_out=True
    ).chunk(2, dim=-1)
    return package.parallel_linear(
        F.silu(gate) * up, w_down.transpose(1, 2), 1, ordered, order, offsets, gates=weights, grouped_in=True
    )


def _no_scattermoe() -> str | None:
    folder = os.environ.get(SCATTERMOE)
    if not folder:
        return f"{SCATTERMOE} names no folder with ScatterMoE"
    if not (Path(folder) / "scattermoe" / "parallel_experts.py").is_file():
        return f"{SCATTERMOE}={folder} holds no scattermoe/parallel_experts.py"
    return None


def _import_scattermoe() -> ModuleType:
    if "scattermoe" not in sys.modules:
        with _importable(os.environ[SCATTERMOE]):
            import scattermoe  # noqa: F401
    return sys.modules["scattermoe"]


@contextmanager
def _importable(folder: str):
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _sonicmoe(problem: MoE, prepared: None, *inputs: Tensor) -> Tensor:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    x, w_gate_up, w_down, idx, weights = inputs
    token = torch.arange(problem.tokens, dtype=torch.int32, device=x.device)
    return moe_general_routing_inputs(
        x,
        weights.flatten(),
        token.repeat_interleave(problem.top_k),
        idx.flatten().to(torch.int32),
        w_gate_up.permute(1, 2, 0),
        None,
        w_down.permute(1, 2, 0),
        None,
        E=problem.experts,
        stream_id=torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
        activation_type=ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
    )[0]


def _moe_ops(problem: MoE, prepared: None, *inputs: Tensor) -> Tensor:
    from moe_ops import grouped_gemm, permute, unpermute

    x, w_gate_up, w_down, idx, weights = inputs
    rows, row_id_map, offsets = permute(x, idx.to(torch.int32), E=problem.experts)
    gate, up = grouped_gemm(rows, w_gate_up, offsets, trans_b=True).chunk(2, dim=-1)
    out = grouped_gemm(F.silu(gate) * up, w_down, offsets, trans_b=True)
    return unpermute(out, row_id_map, weights, problem.tokens, problem.top_k)


def refuses_cuda_only(
    capability: tuple[int, int], problem: MoE, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    """Return why a kernel for tensor cores cannot run: it refuses other devices, full precision and old GPUs."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"needs sm_{capability[0]}{capability[1]}, this is sm_{found[0]}{found[1]}"
    return None


def _refuses_moe_ops(problem: MoE, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if problem.experts & (problem.experts - 1):
        return f"moe-ops counts tokens in a block of a power of two experts, not {problem.experts}"
    return refuses_cuda_only((8, 0), problem, dtype, device, direction)


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "transformers grouped_mm",
        ("moe",),
        _transformers,
        prepare=partial(_transformers_experts, "grouped_mm"),
        missing=_no_transformers,
        refuses=refuses_grouped,
    ),
    Provider(
        "transformers batched_mm",
        ("moe",),
        _transformers,
        prepare=partial(_transformers_experts, "batched_mm"),
        missing=_no_transformers,
        refuses=_refuses_batched,
    ),
    Provider(
        "Liger fused MoE",
        ("moe",),
        _liger,
        missing=needs("liger_kernel", package="liger-kernel"),
        refuses=partial(refuses_cuda_only, (8, 0)),
    ),
    Provider(
        "ScatterMoE",
        ("moe",),
        _scattermoe,
        missing=_no_scattermoe,
        refuses=partial(refuses_cuda_only, (8, 0)),
    ),
    Provider(
        "SonicMoE",
        ("moe",),
        _sonicmoe,
        missing=needs("sonicmoe", package="sonic-moe"),
        refuses=partial(refuses_cuda_only, (9, 0)),
    ),
    Provider(
        "moe-ops",
        ("moe",),
        _moe_ops,
        missing=needs("moe_ops", package="moe-ops"),
        refuses=_refuses_moe_ops,
    ),
)
