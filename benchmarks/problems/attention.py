"""Packed softmax, linear and hybrid attention at one size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import counters
from benchmarks.core import Work
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_attention_reference
from vot_kernels.ops.packed_attention.reference import packed_attention as packed_attention_reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor

ROWS = 48  # rows of the output that are verified at full size


@dataclass(frozen=True)
class Attention:
    """One attention call.

    Attributes:
        kind: "packed_attention", "linear_attention" or "hybrid_attention".
        lengths: tokens of each segment.
        group_size: tokens of a group; groups matter only for the hybrid.
        heads, kv_heads, head_dim: as in q `[tokens, heads, head_dim]`.
        window: near groups on each side, or a pair (left, right); hybrid only.
        causal: whether no token sees a later one (not for the hybrid, which is bidirectional here).
    """

    kind: str
    lengths: tuple[int, ...]
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64
    group_size: int = 256
    window: int | tuple[int, int] = 1
    causal: bool = False

    @property
    def op(self) -> str:
        return self.kind

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def describe(self) -> str:
        segments = f"{len(self.lengths)} segments" if len(self.lengths) > 1 else "1 segment"
        heads = (
            f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads} heads"
        )
        parts = [f"{self.size:,} tokens in {segments}", f"{heads} of {self.head_dim}"]
        if self.kind == "hybrid_attention":
            parts.append(f"groups of {self.group_size}, window {self.window}")
        return ", ".join([*parts, *(["causal"] if self.causal else [])])

    def layout(self, device: torch.device | str = "cpu") -> PackedLayout:
        """Build the packing anew."""
        group_size = self.group_size if self.kind == "hybrid_attention" else None
        return PackedLayout.from_lengths(self.lengths, group_size, device)

    def sides(self) -> tuple[int, int]:
        """The numbers of near groups on the left and on the right."""
        return (self.window, self.window) if isinstance(self.window, int) else self.window

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return q, k, v, and for the hybrid beta `[heads]`."""
        shapes = [(self.size, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        generator = torch.Generator(device).manual_seed(seed)
        qkv = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
        if self.kind != "hybrid_attention":
            return tuple(qkv)
        return *qkv, make_tensor(self.heads, dtype=torch.float32, device=device, seed=seed)

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Return first and last rows of segments (spread ones and the longest), and rows spread over all."""
        if self.size <= 1024:
            return None
        layout = self.layout()
        bounds = layout.host_cu_seqlens.long()
        some = torch.linspace(0, len(self.lengths) - 1, ROWS // 4).round().long()
        some = torch.cat([some, torch.tensor(self.lengths).argmax()[None]])  # the longest is the hardest
        edges = torch.cat([bounds[some], bounds[some + 1] - 1])
        spread = torch.linspace(0, self.size - 1, ROWS, dtype=torch.float64).round().long()
        rows = torch.cat([edges.clamp(0, self.size - 1), spread]).unique()
        return rows.to(inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        q, k, v, *beta = inputs
        if rows is not None:
            return attention_rows(self, q, k, v, beta[0] if beta else None, rows)
        layout = self.layout(q.device)
        if self.kind == "packed_attention":
            return packed_attention_reference(q, k, v, layout, causal=self.causal)[0]
        if self.kind == "linear_attention":
            return linear_attention_reference(q, k, v, layout, causal=self.causal)[0]
        return reference.hybrid_attention(q, k, v, layout, window=self.window, beta=beta[0])[0]

    def small(self) -> "Attention":
        """Return about 400 tokens: the first segments and the longest, with groups of matching size."""
        every = range(len(self.lengths))
        kept = [self.lengths[i] for i in sorted({*every[:24], max(every, key=self.lengths.__getitem__)})]
        scale = max(1.0, sum(kept) / 384)
        lengths = tuple(max(min(n, 4), round(n / scale)) for n in kept)
        group = max(min(self.group_size, 4), round(self.group_size / scale))
        return replace(self, lengths=lengths, group_size=group)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.attention(self, direction, itemsize)

    def near_pairs(self) -> int:
        """The number of query-key pairs with a softmax score, for one head."""
        if self.kind == "packed_attention":
            return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        if self.kind == "linear_attention":
            return 0
        layout = self.layout()
        sizes, first = layout.host_cu_groups.diff().long(), layout.host_segment_groups.tolist()
        left, right = self.sides()
        pairs = 0
        for begin, end in zip(first, first[1:], strict=False):
            own = sizes[begin:end]
            total = torch.cat([own.new_zeros(1), own.cumsum(0)])
            index = torch.arange(len(own))
            low, high = (index - left).clamp(min=0), (index + right + 1).clamp(max=len(own))
            pairs += int((own * (total[high] - total[low])).sum())
        return pairs


def attention_rows(
    problem: Attention, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, rows: Tensor
) -> Tensor:
    """Compute some rows of the output by the definition, all keys at once; half precision computes in float32."""
    compute = torch.promote_types(q.dtype, torch.float32)
    layout = problem.layout(q.device)
    repeats = problem.heads // problem.kv_heads
    query = q[rows].to(compute).transpose(0, 1)
    key, value = (x.to(compute).transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
    same = layout.token_segments[rows][:, None] == layout.token_segments[None]
    if problem.causal:
        same = same & (torch.arange(q.shape[0], device=q.device) <= rows[:, None])
    near, far = same, torch.zeros_like(same)
    if problem.kind == "hybrid_attention":
        distance = layout.token_groups[None] - layout.token_groups[rows][:, None]
        left, right = problem.sides()
        within = (distance >= -left) & (distance <= right)
        near, far = same & within, same & ~within
    if problem.kind == "linear_attention":
        near, far = far, near
    scores = (query @ key.transpose(1, 2) * problem.head_dim**-0.5).masked_fill(~near, -torch.inf)
    similarity = (query.softmax(-1) @ key.softmax(-1).transpose(1, 2)) * far
    log_weight = query.new_zeros(problem.heads) if beta is None else beta.to(compute)
    pivot = torch.maximum(scores.amax(-1, keepdim=True), log_weight[:, None, None]).detach()
    kappa = (scores - pivot).exp() + (log_weight[:, None, None] - pivot).exp() * similarity
    out = kappa @ value / kappa.sum(-1, keepdim=True)
    return out.transpose(0, 1).to(q.dtype)
