"""Attention by its definition over the whole packed buffer with an n x n mask, the simplest way to write it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.attention import Attention


class Masks(NamedTuple):
    """Which token sees which, both `[tokens, tokens]`: by a softmax score, by a product of features."""

    near: Tensor | None
    far: Tensor | None


def build_masks(problem: Attention, dtype: torch.dtype, device: torch.device) -> Masks:
    """Return the masks of a problem."""
    layout = problem.layout(device)
    seen = layout.token_segments[:, None] == layout.token_segments
    if problem.causal:
        seen = seen.tril()
    if problem.kind == "packed_attention":
        return Masks(seen, None)
    if problem.kind == "linear_attention":
        return Masks(None, seen)
    left, right = problem.sides()
    distance = layout.token_groups - layout.token_groups[:, None]
    within = (distance >= -left) & (distance <= right)
    return Masks(seen & within, seen & ~within)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Tensor | None,
    far: Tensor | None,
    beta: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute all scores at once; products in the inputs' dtype, exponentials and sums in float32.

    Args:
        q: `[tokens, heads, head_dim]`.
        k, v: `[tokens, kv_heads, head_dim]`.
        near, far: `[tokens, tokens]`, which keys a query sees by a score and by a product of features.
        beta: `[heads]`, log of the weight of far keys.
        scale: factor on the scores.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    query = q.transpose(0, 1)
    key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
    weights = None
    if near is not None:
        scores = (query @ key.transpose(1, 2)).to(compute) * scale
        scores = scores.masked_fill(~near, -torch.inf)
        if far is None:
            return (scores.softmax(-1).to(v.dtype) @ value).transpose(0, 1)
        pivot = scores.detach().amax(-1, keepdim=True)
        weights = (scores - pivot).exp()
    similarity = (query.softmax(-1) @ key.softmax(-1).transpose(1, 2)).to(compute).masked_fill(~far, 0)
    if weights is not None:
        similarity = (beta[:, None, None] - pivot).exp() * similarity + weights
    weights = similarity / similarity.sum(-1, keepdim=True)
    return (weights.to(v.dtype) @ value).transpose(0, 1)


def _naive(problem: Attention, masks: Masks, q: Tensor, k: Tensor, v: Tensor, *beta: Tensor) -> Tensor:
    return dense(q, k, v, *masks, beta[0] if beta else None, problem.head_dim**-0.5)


def available_memory() -> int:
    """Return the bytes that a CPU process can still allocate before the machine swaps."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30


def score_matrices(
    problem: Any, dtype: torch.dtype, rows: int, count: int, device: torch.device
) -> str | None:
    """Return why `count` matrices of scores over `rows` tokens do not fit into the memory of a CPU, else None.

    A GPU raises an error itself; on a CPU the process would be killed.
    """
    if device.type != "cpu":
        return None
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    needed, available = count * problem.heads * rows**2 * itemsize, available_memory()
    if needed <= available / 2:
        return None
    return (
        f"{count} score matrices of {problem.heads} x {rows:,} x {rows:,} take {needed / 2**30:.1f} GiB, "
        f"more than half of the {available / 2**30:.1f} GiB available"
    )


def refuses_quadratic(
    rows: Callable[[Any], int], problem: Any, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    """Return a `refuses` for providers that write the scores over `rows(problem)` tokens to memory."""
    held = {"packed_attention": 3, "linear_attention": 4, "hybrid_attention": 6}[problem.kind]
    return score_matrices(problem, dtype, rows(problem), held * (1 if direction == "forward" else 2), device)


def _refuses(problem: Any, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    return refuses_quadratic(lambda p: p.size, problem, dtype, device, direction)


PROVIDERS = (
    Provider(
        "naive",
        ("softmax", "linear", "hybrid"),
        _naive,
        prepare=build_masks,
        refuses=_refuses,
        quick_size=1024,
    ),
)
