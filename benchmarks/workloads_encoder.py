"""Encoding images of mixed sizes: packed, against padding all of them to the largest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.packing import PackedLayout

# (frames, height, width) in patches of 8 pixels: thumbnails to 288 × 224, as photographs come.
IMAGES = [
    (1, h, w) for h, w in ((36, 28), (28, 36), (24, 24), (16, 28), (20, 15), (12, 12), (8, 14), (10, 6))
]
SMALL_IMAGES = [(1, 4, 5), (1, 2, 3), (1, 1, 7), (1, 3, 3)]


def mixed_batch(
    grids: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> tuple[VotEncoder, Tensor, Tensor]:
    """An exact-softmax nano encoder (so that padding can be masked exactly) and a batch of images."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = VotEncoder(VotEncoderConfig.preset("nano", attention="softmax")).to(dtype).eval()
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(1).sum()), encoder.config.patch_numbers, generator=generator)
    return encoder, pixels.to(dtype), grid


@torch.no_grad()
def encode_packed(encoder: VotEncoder, pixels: Tensor, grid: Tensor) -> Tensor:
    """`[tokens, hidden_size]`, the encoder as it is."""
    return encoder(pixels, grid).last_hidden_state


@torch.no_grad()
def encode_one_by_one(encoder: VotEncoder, pixels: Tensor, grid: Tensor) -> Tensor:
    """The oracle: every image alone."""
    parts = zip(pixels.split(grid.prod(1).tolist()), grid, strict=True)
    return torch.cat([encoder(part, one[None]).last_hidden_state for part, one in parts])


@torch.no_grad()
def encode_padded(encoder: VotEncoder, pixels: Tensor, grid: Tensor) -> Tensor:
    """The same network on a padded batch: every layer runs on all rows, attention masks the padding."""
    layout = encoder.layout(grid)
    images, longest = len(grid), layout.max_seqlen
    inside = torch.arange(longest) < torch.tensor(layout.lengths)[:, None]
    rows = inside.flatten().nonzero().squeeze(1)
    padded = PackedLayout.from_lengths([longest] * images)
    positions = padded.positions.new_zeros(images * longest, 3).index_copy(0, rows, layout.positions)
    embedded = encoder.patch_embedding(_pad(pixels, rows, images * longest))
    sized = encoder.size_embedding(encoder.patch_embedding(pixels), layout)
    x = embedded.index_copy(0, rows, sized)
    history = encoder.residual.start(x)
    for i, block in enumerate(encoder.blocks):
        x = x + _masked_attention(block.attention, block.attention_norm(x), positions, inside)
        x = encoder.residual(x + block.mlp(block.mlp_norm(x)), i + 1, history)
    return encoder.norm(x)[rows]


def _pad(x: Tensor, rows: Tensor, total: int) -> Tensor:
    return x.new_zeros(total, x.shape[1]).index_copy(0, rows, x)


def _masked_attention(attention: torch.nn.Module, x: Tensor, positions: Tensor, inside: Tensor) -> Tensor:
    from dataclasses import replace

    layout = replace(PackedLayout.from_lengths([inside.shape[1]] * len(inside)), positions=positions)
    q, k, v = (part.unflatten(0, inside.shape).transpose(1, 2) for part in attention._project(x, layout))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None])
    return attention.out(out.transpose(1, 2).flatten(2).flatten(0, 1))
