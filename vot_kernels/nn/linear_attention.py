"""Multi-head linear attention, the ablation of `HybridAttention` without its softmax part."""

from torch import Tensor

from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.packing import PackedLayout


class LinearAttention(HybridAttention):
    """`HybridAttention` whose every token is far: normalised linear attention over the whole segment.

    Arguments as there, but for `window` and `beta_init`, which have no meaning here.
    """

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, window=None, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Tokens `[tokens, dim]` to `[tokens, dim]`."""
        q, k, v = self._project(x, layout)
        out = linear_attention(
            q,
            k,
            v,
            layout,
            feature_map=self.feature_map,
            causal=self.causal == "token",
            backend=self.backend,
        )
        return self.out(out.flatten(1))
