"""The encoder without packing: the clips of a batch are padded to the longest, and attention masks what was added."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderBlock, VotEncoderOutput
from vot_kernels.packing import PackedLayout


class PaddedEncoder(VotEncoder):
    """A `VotEncoder` with exact attention and dense blocks that computes on `[clips, longest]` tokens.

    It has the parameters of the packed encoder and returns the same tokens, packed. Attention is PyTorch's.

    Raises:
        ValueError: attention is not "softmax", or there are experts, which would choose for the padding too.
    """

    def __init__(self, config: VotEncoderConfig):
        if config.attention != "softmax" or config.aoe_every:
            raise ValueError(
                'Padding needs attention="softmax" and aoe_every=0, '
                f"got {config.attention!r} and {config.aoe_every}."
            )
        super().__init__(config)

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, fps: Tensor | None = None, **_: Any
    ) -> VotEncoderOutput:
        """Encode packed clips as `VotEncoder` does, without its further options."""
        layout = self.layout(image_grid_thw, pixel_values.device)
        lengths = layout.cu_seqlens.diff()
        real = torch.arange(layout.max_seqlen, device=lengths.device) < lengths[:, None]
        padding = PackedLayout.from_mask(real)[1]

        def padded(rows: Tensor) -> Tensor:
            return padding.unpack(rows).flatten(0, 1)

        flat = PackedLayout.from_lengths([layout.max_seqlen] * layout.num_segments, device=lengths.device)
        whole = replace(flat, positions=padded(layout.positions))
        x = padded(self._embed(pixel_values, layout, fps))
        history = self._history(x)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, VotEncoderBlock)
            x = x + _attend(block, x, whole, real)
            x = x + block.mlp(block.mlp_norm(x))
            x = x if self.residual is None else self.residual(x, i + 1, history)
        tokens = padding.pack(self.norm(x).unflatten(0, real.shape))
        return VotEncoderOutput(
            last_hidden_state=tokens,
            pooler_output=self.pooling(tokens, layout),
            balance_loss=tokens.new_zeros(()),
        )


def _attend(block: VotEncoderBlock, x: Tensor, whole: PackedLayout, real: Tensor) -> Tensor:
    heads = block.attention.project(block.attention_norm(x), whole)
    q, k, v = (t.unflatten(0, real.shape).transpose(1, 2) for t in heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
    return block.attention.out(out.transpose(1, 2).flatten(2).flatten(0, 1))
