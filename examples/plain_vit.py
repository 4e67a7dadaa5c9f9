"""A vision transformer in plain PyTorch on packed images of mixed sizes: no padding and no attention mask."""

import torch
from torch import nn

from vot_kernels import PackedLayout, pack_patches
from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.nn.rotary import RotaryEmbedding

PATCH, DIM, CLASSES = 8, 64, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = HybridAttention(DIM, num_heads=2, window=None, rotary=RotaryEmbedding())
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH * PATCH, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        patches, grid = pack_patches(images, PATCH)
        layout = PackedLayout.from_grid_thw(grid.tolist(), group="frame")
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x, layout)
        means = [segment.mean(0) for segment in x.split(layout.host_cu_seqlens.diff().tolist())]
        return self.head(torch.stack(means))


def main() -> None:
    torch.manual_seed(0)
    bright = torch.tensor([0, 1, 0, 1])
    sizes = [(32, 48), (64, 40), (24, 24), (48, 80)]  # height and width in pixels
    images = [(torch.rand(3, *size) + label) / 2 for size, label in zip(sizes, bright.tolist(), strict=True)]
    model = PlainViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 21):
        loss = nn.functional.cross_entropy(model(images), bright)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
