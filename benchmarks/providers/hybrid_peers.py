"""Hybrid attention by other means: the composite of existing kernels, and SLA.

The composite is the obvious way to write it today: near attention by a softmax kernel over the groups' windows, far
attention by group states in plain PyTorch, merged through the log-sum-exp. No kernel returns a gradient of its
log-sum-exp, but none is needed: a flash backward that is given the merged output and the joint log-sum-exp returns
the gradients of the merged function.

SLA (Zhang et al., arXiv 2509.24006, github.com/thu-ml/SLA) is imported from the folder that the environment
variable VOT_BENCH_SLA names. It computes another function: softmax attention to the best blocks of keys, plus
a projection of linear attention to all of them.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.attention import Attention
from benchmarks.providers.pytorch_attention import needs_gpu
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_attention_reference
from vot_kernels.ops.packed_attention import reference
from vot_kernels.packing import PackedLayout

# --- the composite ---


class Plan(NamedTuple):
    """The indices that depend only on the packing.

    Attributes:
        groups: first row of each group, then the number of tokens.
        windows: rows `[begin, end)` of the keys near each group.
        segments: groups `[begin, end)` of each segment.
        cu_queries, cu_keys: int32 bounds of the groups, and of their concatenated windows.
        rows: int64, the keys' rows of the concatenated windows.
        blocks: int64 `[groups, longest group]`, rows of each group, past the end of the buffer where there is none;
            None if all groups are equally long.
    """

    groups: list[int]
    windows: list[tuple[int, int]]
    segments: list[tuple[int, int]]
    cu_queries: Tensor
    cu_keys: Tensor
    rows: Tensor
    blocks: Tensor | None

    @property
    def longest_query(self) -> int:
        return max(end - begin for begin, end in zip(self.groups, self.groups[1:], strict=False))

    @property
    def longest_key(self) -> int:
        return max(end - begin for begin, end in self.windows)


def plan(problem: Attention, dtype: torch.dtype, device: torch.device) -> Plan:
    """Return the windows of all groups, and the indices that lay them out."""
    layout = problem.layout()
    left, right = problem.sides()
    groups, first = layout.host_cu_groups.tolist(), layout.host_segment_groups.tolist()
    segments = list(zip(first, first[1:], strict=False))
    windows = [
        (groups[max(g - left, begin)], groups[min(g + right + 1, end)])
        for begin, end in segments
        for g in range(begin, end)
    ]
    keys = torch.tensor([0, *(end - begin for begin, end in windows)]).cumsum(0)
    rows = torch.cat([torch.arange(begin, end) for begin, end in windows])
    return Plan(
        groups,
        windows,
        segments,
        layout.host_cu_groups.to(device),
        keys.to(device, torch.int32),
        rows.to(device),
        _blocks(layout, device),
    )


def _blocks(layout: PackedLayout, device: torch.device) -> Tensor | None:
    lengths = layout.host_cu_groups.diff().long()
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return None
    within = torch.arange(longest)
    rows = layout.host_cu_groups[:-1].long()[:, None] + within
    return rows.masked_fill(within >= lengths[:, None], layout.num_tokens).to(device)


class Near(Protocol):
    """A softmax kernel over the windows of all groups."""

    def forward(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return output `[tokens, heads, head_dim]` and log-sum-exp `[tokens, heads]`."""

    def backward(
        self, plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v for this output and this log-sum-exp."""


class _Gathered(ABC):
    """Kernels for packed sequences; the windows overlap, so the keys are concatenated first."""

    def forward(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self._attend(plan, q, k[plan.rows], v[plan.rows])
        return out, lse.transpose(0, 1)

    def backward(
        self, plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = lse.transpose(0, 1).contiguous()
        dq, *windows = self._gradients(plan, grad, q, k[plan.rows], v[plan.rows], out, lse)
        dk, dv = (
            torch.zeros_like(x, dtype=torch.float32).index_add_(0, plan.rows, dx.float()).to(x.dtype)
            for x, dx in zip((k, v), windows, strict=True)
        )
        return dq, dk, dv

    @abstractmethod
    def _attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp `[heads, tokens]` for concatenated keys and values."""

    @abstractmethod
    def _gradients(self, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q and of such keys and values, given grad, q, k, v, out and log-sum-exp."""


class VarlenNear(_Gathered):
    """The FlashAttention 2 inside PyTorch."""

    def _attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            plan.cu_queries,
            plan.cu_keys,
            plan.longest_query,
            plan.longest_key,
            0.0,  # dropout
            False,  # causal
            return_debug_mask=False,
        )
        return out, lse

    def _gradients(self, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = tensors[0].device
        return torch.ops.aten._flash_attention_backward(
            *tensors,
            plan.cu_queries,
            plan.cu_keys,
            plan.longest_query,
            plan.longest_key,
            0.0,  # dropout
            False,  # causal
            torch.zeros(2, dtype=torch.uint64, device=device),  # random state of the dropout
            torch.empty(0, device=device),
        )


class FlashAttn2Near(_Gathered):
    """The package flash-attn 2.8.3."""

    def _attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            plan.cu_queries,
            plan.cu_keys,
            plan.longest_query,
            plan.longest_key,
            return_attn_probs=True,
        )
        return out, lse

    def _gradients(self, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        gradients = tuple(torch.empty_like(x) for x in tensors[1:4])
        _flash_attn_varlen_backward(
            *tensors,
            *gradients,
            plan.cu_queries,
            plan.cu_keys,
            plan.longest_query,
            plan.longest_key,
            0.0,  # dropout
            tensors[1].shape[-1] ** -0.5,
            False,  # causal
            -1,
            -1,  # no window within a group's keys
            0.0,  # softcap
            None,  # alibi slopes
            False,  # deterministic
        )
        return gradients


class SdpaNear:
    """PyTorch's CPU kernel, one call per group on a slice of the keys."""

    def forward(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for rows, keys in self._slices(plan):
            query, key, value = self._batch(q[rows], k[keys], v[keys])
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)

    def backward(
        self, plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        share = q.shape[1] // k.shape[1]
        for rows, keys in self._slices(plan):
            do, query, key, value, o = self._batch(grad[rows], q[rows], k[keys], v[keys], out[rows])
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, query, key, value, o, lse[rows].transpose(0, 1)[None], 0.0, False
            )
            part_q, part_k, part_v = (x[0].transpose(0, 1) for x in gradients)
            dq[rows] = part_q
            dk[keys] += part_k.unflatten(1, (-1, share)).sum(2)
            dv[keys] += part_v.unflatten(1, (-1, share)).sum(2)
        return dq, dk, dv

    def _slices(self, plan: Plan) -> list[tuple[slice, slice]]:
        bounds = zip(plan.groups, plan.groups[1:], plan.windows, strict=False)
        return [(slice(begin, end), slice(*window)) for begin, end, window in bounds]

    def _batch(self, first: Tensor, *others: Tensor) -> list[Tensor]:
        """Return `[1, heads, tokens, head_dim]`, with as many heads as the first."""
        heads = first.shape[1]
        full = [first, *(x.repeat_interleave(heads // x.shape[1], 1) for x in others)]
        return [x.transpose(0, 1)[None] for x in full]


class _Merge(torch.autograd.Function):
    """Near attention joined with the far sums: numerator `[tokens, heads, d]`, total `[tokens, heads]`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        numerator: Tensor,
        total: Tensor,
        beta: Tensor,
        plan: Plan,
        near: Near,
    ) -> Tensor:
        near_out, near_lse = near.forward(plan, q, k, v)
        lse = torch.logaddexp(near_lse.float(), beta + total.log())
        near_weight, far_weight = (near_lse - lse).exp(), (beta - lse).exp()
        out = (near_weight[..., None] * near_out + far_weight[..., None] * numerator).to(q.dtype)
        ctx.save_for_backward(q, k, v, numerator, total, beta, out, lse)
        ctx.plan, ctx.near = plan, near
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, numerator, total, beta, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.near.backward(ctx.plan, grad.contiguous(), q, k, v, out, lse)
        weight = (beta - lse).exp()
        dnumerator = weight[..., None] * grad
        dtotal = -weight * (grad.float() * out).sum(-1)
        dbeta = ((dnumerator * numerator).sum(-1) + dtotal * total).sum(0)
        return dq, dk, dv, dnumerator.to(numerator.dtype), dtotal.to(total.dtype), dbeta, None, None


@dataclass(frozen=True)
class Composite:
    """Hybrid attention of a near kernel and group states in PyTorch."""

    near: Near

    def __call__(
        self, problem: Attention, plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor
    ) -> Tensor:
        numerator, total = self._far(problem, plan, q, k, v)
        return _Merge.apply(q, k, v, numerator, total, beta, plan, self.near)

    def _far(self, problem: Attention, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi(q) times the states of the far groups: numerator and total, without beta."""
        share = problem.heads // problem.kv_heads
        key = _grouped(k.softmax(-1), plan)
        states = key.transpose(2, 3) @ _grouped(v, plan)
        totals = key.float().sum(2)
        states, totals = (_far_sums(x.float(), plan, problem.sides()) for x in (states, totals))
        states, totals = (x.repeat_interleave(share, 1) for x in (states, totals))
        query = _grouped(q.softmax(-1), plan)
        numerator = _packed(query @ states.to(q.dtype), q, plan)
        total = _packed(query.float() @ totals[..., None], q, plan)[..., 0]
        return numerator, total


def _grouped(x: Tensor, plan: Plan) -> Tensor:
    """Return `[groups, heads, longest group, d]`, zero past the end of a group."""
    if plan.blocks is None:
        return x.unflatten(0, (len(plan.windows), -1)).transpose(1, 2)
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[plan.blocks].transpose(1, 2)


def _packed(x: Tensor, like: Tensor, plan: Plan) -> Tensor:
    """Invert `_grouped`."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if plan.blocks is None else rows[plan.blocks.flatten() < like.shape[0]]


def _far_sums(states: Tensor, plan: Plan, sides: tuple[int, int]) -> Tensor:
    """Return for each group the sum over the groups of its segment outside its window."""
    left, right = sides
    sums = []
    for begin, end in plan.segments:
        own, count = states[begin:end], end - begin
        none = own.new_zeros(1, *own.shape[1:])
        before = torch.cat([none, own.cumsum(0)])  # [i]: groups 0 to i - 1
        after = torch.cat([own.flip(0).cumsum(0).flip(0), none])  # [i]: groups i to the last
        group = torch.arange(count, device=states.device)
        sums.append(before[(group - left).clamp(min=0)] + after[(group + right + 1).clamp(max=count)])
    return torch.cat(sums)


def _refuses_sdpa(problem: Attention, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    return None if device.type == "cpu" else "its kernel is for CPUs; on a GPU varlen_attn takes its place"


# --- SLA ---

SLA_BLOCK = 64  # tokens, for queries and keys


@dataclass(frozen=True)
class SlaProblem(Attention):
    """The function that SLA computes, on inputs for which its choice of blocks is unambiguous.

    SLA picks for every block of queries the blocks of keys with the largest product of means. Each cluster of
    `group_size` tokens gets a direction of its own here, added to its queries and keys, so that a block's best
    blocks are those of its cluster whatever the rounding. With the identity as its projection,
    o = softmax attention within the cluster + linear attention to the whole segment.
    """

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return q, k, v."""
        q, k, v, *_ = super().inputs(torch.float32, device, seed)
        directions = _orthogonal_signs(self.head_dim).to(device)
        cluster = _clusters(self).token_groups.to(device) % self.head_dim
        q, k = (0.5 * directions[cluster][:, None] + x for x in (q, k))
        return tuple(x.to(dtype) for x in (q, k, v))

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        q, k, v = inputs
        device = q.device
        layout, clusters = self.layout(device), _clusters(self).to(device)
        near = PackedLayout.from_cu_seqlens(clusters.host_cu_groups, device=device)
        if rows is None:
            out = reference.packed_attention(q, k, v, near)[0]
            return out + linear_attention_reference(q, k, v, layout)[0]
        return _sla_rows(self, q, k, v, rows, layout, clusters)

    def small(self) -> "SlaProblem":
        """Return four clusters of two blocks."""
        return replace(self, lengths=(512,), group_size=2 * SLA_BLOCK)


def _clusters(problem: Attention) -> PackedLayout:
    return PackedLayout.from_lengths(problem.lengths, problem.group_size)


def _orthogonal_signs(size: int) -> Tensor:
    """Return a matrix of signs with orthogonal rows (Sylvester), for a power of two."""
    signs = torch.ones(1, 1)
    while signs.shape[0] < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def _sla_rows(
    problem: SlaProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    layout: PackedLayout,
    clusters: PackedLayout,
) -> Tensor:
    """Compute some rows of the output by the definition."""
    compute = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.to(compute).transpose(0, 1) for x in (q[rows], k, v))
    near = clusters.token_groups[rows][:, None] == clusters.token_groups
    same = layout.token_segments[rows][:, None] == layout.token_segments
    scores = (query @ key.transpose(1, 2) * problem.head_dim**-0.5).masked_fill(~near, -torch.inf)
    similarity = (query.softmax(-1) @ key.softmax(-1).transpose(1, 2)) * same
    out = scores.softmax(-1) @ value + similarity @ value / similarity.sum(-1, keepdim=True)
    return out.transpose(0, 1).to(q.dtype)


def sla_problem(problem: Attention) -> SlaProblem:
    """Return the same near budget, in clusters of as many tokens as a window has."""
    left, right = problem.sides()
    return SlaProblem(
        problem.kind,
        problem.lengths,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        group_size=(left + right + 1) * problem.group_size,
        window=0,
        causal=problem.causal,
    )


@cache
def _sla_module() -> Any:
    """Return SLA's module class, from the folder that the user names."""
    folder = os.environ["VOT_BENCH_SLA"]
    if folder not in sys.path:
        sys.path.append(folder)
    from sparse_linear_attention.core import SparseLinearAttention

    return SparseLinearAttention


def _no_sla() -> str | None:
    folder = os.environ.get("VOT_BENCH_SLA")
    if not folder:
        return "VOT_BENCH_SLA does not name a folder with a copy of github.com/thu-ml/SLA"
    if not (Path(folder) / "sparse_linear_attention" / "core.py").is_file():
        return f"VOT_BENCH_SLA names {folder}, which holds no sparse_linear_attention/core.py"
    return needs("triton")()


def _build_sla(problem: SlaProblem, dtype: torch.dtype, device: torch.device) -> dict[int, Any]:
    """Build a module for every length of segment, since the share of blocks depends on it."""
    return {length: _sla_for(problem, length, dtype, device) for length in set(problem.lengths)}


def _sla_for(problem: SlaProblem, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    blocks = -(-length // SLA_BLOCK)
    chosen = min(blocks, problem.group_size // SLA_BLOCK)
    share = (chosen + 0.5) / blocks  # SLA rounds share * blocks down
    module = _sla_module()(
        problem.head_dim, share, BLKQ=SLA_BLOCK, BLKK=SLA_BLOCK, use_bf16=dtype == torch.bfloat16
    ).to(device)
    with torch.no_grad():  # it starts at zero, which would disable the linear part
        module.proj_l.weight.copy_(torch.eye(problem.head_dim))
    return module.requires_grad_(False)


def _sla(problem: SlaProblem, modules: dict[int, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call SLA once per segment, because it does not support packing."""
    parts = zip(problem.lengths, *(x.split(list(problem.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat(
        [
            modules[length](*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1)
            for length, *part in parts
        ]
    )


def _refuses_sla(problem: SlaProblem, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if problem.heads != problem.kv_heads:
        return "SLA has no grouped heads"
    if problem.head_dim not in (64, 128):
        return f"SLA takes head_dim 64 and 128, not {problem.head_dim}"
    if problem.group_size % SLA_BLOCK:
        return f"a budget of {problem.group_size} near tokens is no multiple of SLA's blocks of {SLA_BLOCK}"
    uneven = [n for n in problem.lengths if n > problem.group_size and n % problem.group_size]
    if uneven:
        return f"{uneven[0]} tokens are no whole number of clusters of {problem.group_size}"
    if max(problem.lengths) > problem.group_size * problem.head_dim:
        return f"at most {problem.head_dim} clusters of {problem.group_size} tokens can be told apart"
    return needs_gpu(problem, dtype, device, direction)


PROVIDERS = (
    Provider("FA2 of PyTorch + torch linear", ("hybrid",), Composite(VarlenNear()), plan, refuses=needs_gpu),
    Provider(
        "flash-attn 2 + torch linear",
        ("hybrid",),
        Composite(FlashAttn2Near()),
        plan,
        missing=needs("flash_attn", "flash_attn_2_cuda", package="flash-attn"),
        refuses=needs_gpu,
    ),
    Provider("SDPA + torch linear", ("hybrid",), Composite(SdpaNear()), plan, refuses=_refuses_sdpa),
    Provider(
        "SLA",
        ("hybrid",),
        _sla,
        prepare=_build_sla,
        missing=_no_sla,
        refuses=_refuses_sla,
        solves=sla_problem,
        instead="softmax to the best blocks plus projected linear attention to all, two normalisers",
    ),
)
