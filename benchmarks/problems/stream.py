"""One step of hybrid attention over a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import counters
from benchmarks.core import Work


@dataclass(frozen=True)
class HybridStep:
    """The next group of a stream whose window is full.

    Inputs are q, k, v of the group, k and v of the `window` groups before it, the far state
    `[kv_heads, head_dim, head_dim + 1]` in float32, and beta `[heads]`.

    Attributes:
        tokens: of each group.
        heads, kv_heads, head_dim: as in q `[tokens, heads, head_dim]`.
        window: groups on the left that are near.
    """

    tokens: int = 256
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    window: int = 1

    @property
    def op(self) -> str:
        return "hybrid_attention_step"

    @property
    def size(self) -> int:
        return self.tokens

    def describe(self) -> str:
        near = f"{self.window} group{'s' if self.window > 1 else ''} before near"
        return f"a group of {self.tokens:,} tokens, {self.heads} heads of {self.head_dim}, {near}"

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        keys = self.kv_heads, self.head_dim
        earlier = [normal(self.window * self.tokens, *keys).to(dtype) for _ in range(2)]
        group = [
            normal(self.tokens, heads, self.head_dim).to(dtype)
            for heads in (self.heads, *2 * (self.kv_heads,))
        ]
        far_keys, far_values = (normal(4 * self.tokens, *keys) for _ in range(2))
        return *group, *earlier, _state(far_keys, far_values), normal(self.heads)

    def rows(self, inputs: Sequence[Tensor]) -> None:
        """All of them."""

    def oracle(self, inputs: Sequence[Tensor], rows: None) -> tuple[Tensor, Tensor]:
        """Return the output, and the far state with the oldest near group added."""
        q, k, v, earlier_k, earlier_v, far, beta = inputs
        compute = torch.promote_types(q.dtype, torch.float32)
        repeats = self.heads // self.kv_heads
        key, value = (
            torch.cat(parts).to(compute).transpose(0, 1).repeat_interleave(repeats, 0)
            for parts in ((earlier_k, k), (earlier_v, v))
        )
        query = q.to(compute).transpose(0, 1)
        scores = query @ key.transpose(1, 2) * self.head_dim**-0.5
        pivot = torch.maximum(scores.amax(-1, keepdim=True), beta.to(compute)[:, None, None])
        weights = (scores - pivot).exp()
        far_weights = (beta.to(compute)[:, None, None] - pivot).exp()
        sums = query.softmax(-1) @ far.to(compute).repeat_interleave(repeats, 0)
        numerator = weights @ value + far_weights * sums[..., :-1]
        total = weights.sum(-1, keepdim=True) + far_weights * sums[..., -1:]
        leaving = [x[: self.tokens].to(compute) for x in (earlier_k, earlier_v)]
        return (numerator / total).transpose(0, 1).to(q.dtype), far + _state(*leaving).to(far.dtype)

    def small(self) -> "HybridStep":
        return replace(self, tokens=24)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.hybrid_step(self, itemsize)


def _state(k: Tensor, v: Tensor) -> Tensor:
    """Return the sum of phi(k) [v, 1]^T, `[kv_heads, head_dim, head_dim + 1]`."""
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1).transpose(0, 1)
    return k.softmax(-1).transpose(0, 1).transpose(1, 2) @ values
