"""Autonomy-of-Experts and plain mixtures of experts: this package's ops, and PyTorch compositions.

Routing, sorting and index building are inside `run`: they depend on the data, so nothing is prepared.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import Provider
from benchmarks.problems.experts import AoE, MoE
from vot_kernels.ops.aoe import aoe
from vot_kernels.ops.aoe.reference import aoe as aoe_reference
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.ops.moe import moe
from vot_kernels.ops.moe.reference import moe as moe_reference

COMPILED_EXPERTS = 8  # the loop over experts is unrolled when the reference is compiled
SELECTION_ELEMENTS = 2**27  # elements of caches in memory at once for the selection alone


def _ours_aoe(backend: str, problem: AoE, prepared: None, *inputs: Tensor) -> Tensor:
    return aoe(*inputs, problem.top_k, backend=backend)


def _ours_moe(backend: str, problem: MoE, prepared: None, *inputs: Tensor) -> Tensor:
    return moe(*inputs, backend=backend)


def _refuses(
    backend: str, problem: AoE | MoE, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    backends = describe_backends(device, dtype)[problem.op]
    if backend == "auto":
        return None if any(not reasons for reasons in backends.values()) else "no backend serves it"
    return "; ".join(backends[backend]) or None


def masked_aoe(
    problem: AoE, prepared: None, x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor
) -> Tensor:
    """Every expert computes every token, and a mask keeps the selected results."""
    cache = torch.einsum("td,nrd->tnr", x, w_down)
    top = _norms(cache).topk(problem.top_k, dim=-1)
    weights = (
        top.values.new_zeros(cache.shape[:2]).scatter(1, top.indices, top.values.softmax(-1)).to(x.dtype)
    )
    y = torch.zeros_like(x)
    for c, up, p, o, w in zip(cache.unbind(1), w_up, w_p, w_o, weights.unbind(1), strict=True):
        y = y + w[:, None] * ((F.silu(c @ up.T) * (x @ p.T)) @ o)
    return y


def gathered_aoe(
    problem: AoE, prepared: None, x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor
) -> Tensor:
    """Every expert computes its own tokens; autograd differentiates the cache of all experts."""
    cache = torch.einsum("td,nrd->tnr", x, w_down)
    top = _norms(cache).topk(problem.top_k, dim=-1)
    weights = top.values.softmax(-1)
    y = x.new_zeros(x.shape, dtype=weights.dtype)
    for i, (c, up, p, o) in enumerate(zip(cache.unbind(1), w_up, w_p, w_o, strict=True)):
        token, rank = (top.indices == i).nonzero(as_tuple=True)
        hidden = F.silu(c[token] @ up.T) * (x[token] @ p.T)
        y.index_add_(0, token, weights[token, rank, None] * (hidden @ o))
    return y.to(x.dtype)


def stored_aoe(
    problem: AoE, prepared: None, x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor
) -> Tensor:
    """The dataflow that Lv et al. describe: one product stores the cache of every expert for every token,
    norms and top-k read it, the selected part is gathered, grouped products do the rest."""
    experts, rank, _ = w_down.shape
    cache = (x @ w_down.flatten(0, 1).T).view(-1, experts, rank)
    top = _norms(cache).topk(problem.top_k, dim=-1)
    order, offsets = group(top.indices, experts)
    token = order // problem.top_k
    slot = token * experts + top.indices.flatten()[order]
    selected = cache.flatten(0, 1).index_select(0, slot)
    out = _bodies(x.index_select(0, token), selected, w_up, w_p, w_o, offsets)
    return combine(out, order, top.values.softmax(-1))


def grouped_aoe(
    problem: AoE, prepared: None, x: Tensor, w_down: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor
) -> Tensor:
    """Selects on temporary blocks of the cache and computes the selected caches again, so that nothing of the size of
    all caches is stored and only selected experts have a backward."""
    with torch.no_grad():
        indices = _select(x, w_down, problem.top_k)
    order, offsets = group(indices, problem.experts)
    rows = x.index_select(0, order // problem.top_k)
    cache = torch._grouped_mm(rows, w_down.transpose(1, 2), offs=offsets)
    norms = _norms(cache).index_select(0, inverse(order)).view(indices.shape)
    out = _bodies(rows, cache, w_up, w_p, w_o, offsets)
    return combine(out, order, norms.softmax(-1))


def masked_moe(
    problem: MoE, prepared: None, x: Tensor, w_gate_up: Tensor, w_down: Tensor, idx: Tensor, weights: Tensor
) -> Tensor:
    """Every expert computes every token, and a mask keeps the selected results."""
    dense = weights.new_zeros(x.shape[0], problem.experts).scatter_add(1, idx, weights)
    y = torch.zeros_like(x)
    for gate_up, down, weight in zip(w_gate_up, w_down, dense.unbind(1), strict=True):
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        y = y + weight[:, None] * ((F.silu(gate) * up) @ down.T)
    return y


def gathered_moe(
    problem: MoE, prepared: None, x: Tensor, w_gate_up: Tensor, w_down: Tensor, idx: Tensor, weights: Tensor
) -> Tensor:
    """Every expert computes its own tokens."""
    y = torch.zeros_like(x)
    for i, (gate_up, down) in enumerate(zip(w_gate_up, w_down, strict=True)):
        token, rank = (idx == i).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up.T).chunk(2, dim=-1)
        y.index_add_(0, token, weights[token, rank, None] * ((F.silu(gate) * up) @ down.T))
    return y


def grouped_moe(
    problem: MoE, prepared: None, x: Tensor, w_gate_up: Tensor, w_down: Tensor, idx: Tensor, weights: Tensor
) -> Tensor:
    """Tokens sorted by expert, two grouped products, and a weighted sum in the order of the tokens."""
    order, offsets = group(idx, problem.experts)
    rows = x.index_select(0, order // problem.top_k)
    gate, up = torch._grouped_mm(rows, w_gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=offsets)
    return combine(out, order, weights)


def group(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return slots `[tokens * k]` in the order of their experts, and the int32 end of each expert, without a sync."""
    ordered, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ordered.device), right=True)
    return order, ends.to(torch.int32)


def inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def combine(out: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum `[tokens, dim]` of the results `[tokens * k, dim]` in the order of experts."""
    slots = out.index_select(0, inverse(order)).view(*weights.shape, -1)
    return torch.bmm(weights[:, None].to(out.dtype), slots)[:, 0]


def _bodies(rows: Tensor, cache: Tensor, w_up: Tensor, w_p: Tensor, w_o: Tensor, offsets: Tensor) -> Tensor:
    hidden = F.silu(torch._grouped_mm(cache, w_up.transpose(1, 2), offs=offsets))
    hidden = hidden * torch._grouped_mm(rows, w_p.transpose(1, 2), offs=offsets)
    return torch._grouped_mm(hidden, w_o, offs=offsets)


def _norms(cache: Tensor) -> Tensor:
    return torch.linalg.vector_norm(cache, dim=-1, dtype=torch.promote_types(cache.dtype, torch.float32))


def _select(x: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    experts, rank, _ = w_down.shape
    matrix = w_down.flatten(0, 1).T
    blocks = x.split(max(1, SELECTION_ELEMENTS // (experts * rank)))
    norms = torch.cat([_norms((block @ matrix).view(-1, experts, rank)) for block in blocks])
    return norms.topk(top_k, dim=-1).indices


def no_grouped_mm() -> str | None:
    """Return why `torch._grouped_mm` is missing."""
    return None if hasattr(torch, "_grouped_mm") else f"PyTorch {torch.__version__} has no torch._grouped_mm"


def refuses_grouped(
    problem: AoE | MoE, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    """`torch._grouped_mm` needs rows of a multiple of 16 bytes, at most 32 bits per element, and sm_80."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch._grouped_mm does not take {dtype}"
    widths = [problem.dim, problem.hidden, *([problem.rank] if isinstance(problem, AoE) else [])]
    if any(width * dtype.itemsize % 16 for width in widths):
        return "torch._grouped_mm needs rows of a multiple of 16 bytes"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch._grouped_mm needs sm_80 or newer"
    return None


@cache
def _compiled(op: str) -> Any:
    """Compile once for all sizes; fail rather than silently fall back to the interpreter."""
    return torch.compile(aoe_reference if op == "aoe" else moe_reference, dynamic=True, fullgraph=True)


def _run_compiled(problem: AoE | MoE, prepared: None, *inputs: Tensor) -> Tensor:
    # Without it every expert's list of tokens, whose length depends on the data, would break the graph.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        if isinstance(problem, AoE):
            return _compiled("aoe")(*inputs, problem.top_k)[0]
        return _compiled("moe")(*inputs)


def _refuses_compiled(
    problem: AoE | MoE, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    if problem.experts > COMPILED_EXPERTS:
        return f"unrolls the loop over experts: compiled up to {COMPILED_EXPERTS}, not {problem.experts}"
    return None


_PLAIN = "a plain MoE with as many parameters, its routing given"

PROVIDERS: tuple[Provider, ...] = (
    *(
        Provider(
            f"vot-kernels {backend}",
            (suite,),
            partial(run, backend),
            refuses=partial(_refuses, backend),
            ours=True,
        )
        for suite, run in (("aoe", _ours_aoe), ("moe", _ours_moe))
        for backend in ("triton", "cpp", "torch")
    ),
    Provider("masked loop", ("aoe",), masked_aoe),
    Provider("masked loop", ("moe",), masked_moe),
    Provider("gathered loop", ("aoe",), gathered_aoe),
    Provider("gathered loop", ("moe",), gathered_moe),
    Provider(
        "authors' dataflow (our writing)",
        ("aoe",),
        stored_aoe,
        missing=no_grouped_mm,
        refuses=refuses_grouped,
    ),
    Provider("torch._grouped_mm", ("aoe",), grouped_aoe, missing=no_grouped_mm, refuses=refuses_grouped),
    Provider("torch._grouped_mm", ("moe",), grouped_moe, missing=no_grouped_mm, refuses=refuses_grouped),
    Provider(
        "torch.compile of the reference",
        ("aoe", "moe"),
        _run_compiled,
        refuses=_refuses_compiled,
        quick_size=0,
    ),
    Provider(
        "equal-parameter MoE (vot-kernels)",
        ("aoe",),
        partial(_ours_moe, "auto"),
        refuses=partial(_refuses, "auto"),
        solves=AoE.plain,
        instead=_PLAIN,
        ours=True,
    ),
    Provider(
        "equal-parameter MoE (torch._grouped_mm)",
        ("aoe",),
        grouped_moe,
        missing=no_grouped_mm,
        refuses=refuses_grouped,
        solves=AoE.plain,
        instead=_PLAIN,
    ),
)
