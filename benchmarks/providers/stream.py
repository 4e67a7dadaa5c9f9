"""A step of hybrid attention over a stream: ours, and the obvious way to write it with PyTorch's own kernels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.stream import HybridStep
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.ops.hybrid_attention.step import HybridAttentionState, NearGroup, hybrid_attention_step

Results = tuple[Tensor, Tensor]


def _refuses(
    backend: str, problem: Any, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if direction != "forward":
        return "a step is for inference"
    return "; ".join(describe_backends(device, dtype)[problem.op][backend]) or None


def _step(backend: str, problem: HybridStep, prepared: None, *inputs: Tensor) -> Results:
    q, k, v, earlier_k, earlier_v, far, beta = inputs
    earlier = zip(earlier_k.split(problem.tokens), earlier_v.split(problem.tokens), strict=True)
    state = HybridAttentionState(tuple(NearGroup(*group, None) for group in earlier), far)
    out, state = hybrid_attention_step(q, k, v, state, window=problem.window, beta=beta, backend=backend)
    assert state.far is not None  # a group has left the window
    return out, state.far


def _refuses_sdpa(problem: Any, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if direction != "forward":
        return "a step is for inference"
    return None if device.type == "cpu" else "its kernel is for CPUs"


def _sdpa(problem: HybridStep, prepared: None, *inputs: Tensor) -> Results:
    """Attend to the window with PyTorch's kernel, and merge the far part through the log-sum-exp."""
    q, k, v, earlier_k, earlier_v, far, beta = inputs
    repeats = problem.heads // problem.kv_heads
    near = [torch.cat(parts).repeat_interleave(repeats, 1) for parts in ((earlier_k, k), (earlier_v, v))]
    query, key, value = (x.transpose(0, 1)[None] for x in (q, *near))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    sums = query[0].float().softmax(-1) @ far.repeat_interleave(repeats, 0)
    share = (beta[:, None] + sums[..., -1].log() - lse[0]).sigmoid()[..., None]
    merged = torch.lerp(out[0].float(), sums[..., :-1] / sums[..., -1:], share)
    old_k, old_v = (x[: problem.tokens].transpose(0, 1).float() for x in (earlier_k, earlier_v))
    phi = old_k.softmax(-1)
    added = torch.cat([phi.transpose(1, 2) @ old_v, phi.sum(1)[..., None]], -1)
    return merged.transpose(0, 1).to(q.dtype), far + added


PROVIDERS = (
    *(
        Provider(
            name=f"vot-kernels {backend}",
            suites=("stream",),
            run=partial(_step, backend),
            refuses=partial(_refuses, backend),
            ours=True,
        )
        for backend in ("triton", "cpp", "torch")
    ),
    Provider("SDPA + torch linear", ("stream",), _sdpa, refuses=_refuses_sdpa),
)
