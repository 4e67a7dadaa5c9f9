"""An embedding that tells every token the height, width, length and frame rate of its segment."""

from torch import Tensor, nn

from vot_kernels.ops.checks import check_size
from vot_kernels.ops.size_aware_embedding import QUANTITIES, size_aware_embedding
from vot_kernels.packing import PackedLayout


class SizeAwareEmbedding(nn.Module):
    """x + MLP(size features of the token's segment); the output layer starts at zero, so the result starts as x.

    Args:
        dim: width of the tokens.
        hidden: width of the MLP; by default the number of its input features, 12 · octaves.
        octaves: number of frequencies per quantity.
        use_frames: False for streaming, where the clip length is not known in advance.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, octaves: int = 4, use_frames: bool = True
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        check_size("octaves", octaves)
        if hidden is not None:
            check_size("hidden", hidden)
        features = 2 * QUANTITIES * octaves
        self.use_frames = use_frames
        self.fc1 = nn.Linear(features, hidden or features)
        self.fc2 = nn.Linear(hidden or features, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first layer anew and set the second to zero."""
        self.fc1.reset_parameters()
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor, layout: PackedLayout, fps: Tensor | float | None = None) -> Tensor:
        """Map x `[tokens, dim]` to `[tokens, dim]`; `fps` per segment, one number, or None if unknown."""
        return size_aware_embedding(
            x,
            layout,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            fps=fps,
            use_frames=self.use_frames,
        )
