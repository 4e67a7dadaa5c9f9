"""A video tower sees a stream frame by frame: the same numbers as for the whole clip, with a small state."""

from dataclasses import replace

import torch
from torch import nn

from vot_kernels import PackedLayout
from vot_kernels.nn import HybridAttention, RotaryEmbedding, SwiGLU

DIM, FRAMES, ROWS, COLUMNS = 64, 24, 6, 8


class Block(nn.Module):
    """No frame sees a later one; the last two before it are near, all earlier ones are in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = HybridAttention(DIM, num_heads=4, window=2, causal="group", rotary=RotaryEmbedding())
        self.mlp = SwiGLU(DIM, 2 * DIM)

    def forward(self, x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))

    def step(self, x, layout, state):
        attended, state = self.attention.step(self.norm1(x), layout, state)
        return x + attended + self.mlp(self.norm2(x + attended)), state


def frame_layout(time: int) -> PackedLayout:
    """One frame, at its time in the stream, by which the rotary embedding goes."""
    layout = PackedLayout.from_grid_thw([[1, ROWS, COLUMNS]])
    return replace(layout, positions=layout.positions + torch.tensor([time, 0, 0]).int())


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3)).eval()
    clip = torch.randn(FRAMES, ROWS * COLUMNS, DIM)

    whole, layout = clip.flatten(0, 1), PackedLayout.from_grid_thw([[FRAMES, ROWS, COLUMNS]])
    for block in blocks:
        whole = block(whole, layout)
    states, outputs = [None] * len(blocks), []
    for time, x in enumerate(clip):
        for i, block in enumerate(blocks):
            x, states[i] = block.step(x, frame_layout(time), states[i])
        outputs.append(x)
    difference = float((torch.cat(outputs) - whole).abs().max())
    print(f"{FRAMES} frames one by one and at once differ by {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
