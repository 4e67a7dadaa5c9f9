"""Autonomy-of-Experts and plain mixtures of experts."""

from collections.abc import Iterator

import torch

from benchmarks.core import Workload
from benchmarks.problems.experts import AoE, MoE

K = 1024

# Two shapes of Lv et al. (732M and 4B parameters: SwiGLU experts of width 4 · dim) and one with many small
# experts at two ranks. The equal-parameter widths D are 3840, 6472 (the exact 6469.2, to a multiple of 8), 768
# and 1048 (1044.5).
_MANY = AoE(64 * K, dim=1536, experts=64, top_k=8, rank=512, d_ffn=768)
_SMALL = AoE(64 * K, dim=768, experts=8, top_k=2, rank=256, d_ffn=3072)
_AOE = (
    _MANY,
    AoE(64 * K, dim=1536, experts=64, top_k=8, rank=128, d_ffn=768),
    _SMALL,
    AoE(64 * K, dim=1280, experts=8, top_k=2, rank=400, d_ffn=5120),
)
_QWEN3 = {"dim": 2048, "hidden": 768, "experts": 128, "top_k": 8}  # the experts of Qwen3-30B-A3B
_SERIES = (4 * K, 8 * K, 16 * K, 32 * K, 64 * K)


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of both suites."""
    yield from _cuda() if device == "cuda" else _cpu()


def _cuda() -> Iterator[Workload]:
    for problem in _AOE:
        yield Workload("aoe", _name(problem), problem, torch.bfloat16, "cuda")
    for shape in (_MANY, _SMALL):
        for tokens in _SERIES:
            if tokens != shape.tokens:
                problem = AoE(tokens, shape.dim, shape.experts, shape.top_k, shape.rank, shape.d_ffn)
                yield Workload("aoe", _name(problem), problem, torch.bfloat16, "cuda", ("forward", "both"))
    few = MoE(32 * K, dim=2048, hidden=4096, experts=8, top_k=2)
    skewed = MoE(32 * K, **_QWEN3, skew=0.5)
    yield Workload("moe", _name(MoE(32 * K, **_QWEN3)), MoE(32 * K, **_QWEN3), torch.bfloat16, "cuda")
    yield Workload("moe", _name(few), few, torch.bfloat16, "cuda")
    yield Workload("moe", _name(skewed), skewed, torch.bfloat16, "cuda", ("forward", "both"))
    for tokens in (64, *_SERIES):
        if tokens != 32 * K:
            problem = MoE(tokens, **_QWEN3)
            directions = ("forward", "both") if tokens >= K else ("forward",)
            yield Workload("moe", _name(problem), problem, torch.bfloat16, "cuda", directions)


def _cpu() -> Iterator[Workload]:
    directions = ("forward", "both")
    for problem, quick in (
        (AoE(K, dim=256, experts=8, top_k=2, rank=64, d_ffn=256), directions),
        (AoE(2 * K, dim=512, experts=16, top_k=2, rank=64, d_ffn=512), ("forward",)),
        (AoE(8 * K, dim=512, experts=16, top_k=2, rank=64, d_ffn=512), ()),
    ):
        yield Workload("aoe", _name(problem), problem, torch.float32, "cpu", directions, quick)
    for plain, quick in (
        (MoE(64, dim=K, hidden=768, experts=32, top_k=4), ("forward",)),
        (MoE(K, dim=256, hidden=256, experts=8, top_k=2), directions),
        (MoE(4 * K, dim=512, hidden=256, experts=32, top_k=4, skew=0.5), ()),
    ):
        yield Workload("moe", _name(plain), plain, torch.float32, "cpu", directions, quick)


def _name(problem: AoE | MoE) -> str:
    tokens = f"{problem.tokens // K}k" if problem.tokens >= K else str(problem.tokens)
    shape = f"{tokens}-d{problem.dim}-n{problem.experts}-k{problem.top_k}"
    if isinstance(problem, AoE):
        return f"{shape}-r{problem.rank}"
    return f"{shape}-h{problem.hidden}" + ("-skewed" if problem.skew else "")
