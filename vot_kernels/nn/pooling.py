"""Pooling of packed tokens into one vector per segment."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vot_kernels.ops.checks import check_layout, check_size, check_tensor
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.packing import PackedLayout


class PackedAttentionPooling(nn.Module):
    """Attention pooling per segment: a learned query per head weighs the tokens of each segment.

    Args:
        dim: width of the tokens and of the pooled vector; a multiple of `num_heads`.
        num_heads: independent weightings, each pooling its share of the values.

    Attributes:
        reduce: where the tokens of a segment are spread over ranks, what gives (x, largest) the sum of x over the ranks
            or the largest; see `vot_kernels.distributed.context_parallel`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        if check_size("dim", dim) % check_size("num_heads", num_heads):
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}.")
        self.score = nn.Linear(dim, num_heads, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reduce: Callable[[Tensor, bool], Tensor] | None = None

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Pool `[tokens, dim]` to `[segments, dim]`; an empty segment gives zero."""
        check_tensor("x", x, ["tokens", self.score.in_features])
        check_layout("x", x, layout)
        owner = layout.token_segments
        x = x[: layout.num_tokens]
        score = self.score(x)
        score = score.to(accumulator(score.dtype))
        segments, heads = layout.num_segments, score.shape[1]
        index = owner[:, None].expand(-1, heads)
        top = score.new_full((segments, heads), -torch.inf)
        top = top.scatter_reduce(0, index, score.detach(), "amax")
        top = top if self.reduce is None else self.reduce(top, True)
        weight = (score - top[owner]).exp()
        total = weight.new_zeros(segments, heads).index_add(0, owner, weight)
        total = total if self.reduce is None else self.reduce(total, False)
        weight = weight / total[owner]
        value = self.value(x).unflatten(-1, (heads, -1)) * weight[..., None].to(x.dtype)
        pooled = value.new_zeros(segments, *value.shape[1:]).index_add(0, owner, value)
        pooled = pooled if self.reduce is None else self.reduce(pooled, False)
        return self.out(pooled.flatten(1))
