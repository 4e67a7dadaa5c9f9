"""Tokens of a stream of frames from a causal encoder: each frame is encoded once."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from vot_kernels.models.encoder.modeling import VotStreamState
from vot_kernels.models.perception.modeling import VotPerceptionModel

Encode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From `pixel_values`, `image_grid_thw` and `fps` of one clip to its tokens, `[patches, hidden_size]`."""


def can_stream(model: VotPerceptionModel) -> bool:
    """Whether the encoder gives the same tokens frame by frame as for the whole clip at once."""
    config = model.config.encoder
    bounded = None not in config.layer_windows
    return (
        config.causal == "group"
        and bounded
        and config.attention != "linear"
        and config.temporal_patch_size == 1
    )


class TokenStream:
    """The tokens of the last frames of a stream, computed with the state of all frames before.

    Args:
        model: one that `can_stream`.
        size: how many frames to hold.
    """

    def __init__(self, model: VotPerceptionModel, size: int):
        self.encoder = model.encoder
        self.state: VotStreamState = self.encoder.start_stream()
        self.held: deque[Tensor] = deque(maxlen=size)

    def reader(self, new: int) -> Encode:
        """Return what encodes a window whose last `new` frames no earlier window had."""

        @torch.no_grad()
        def encode(pixel_values: Tensor, image_grid_thw: Tensor, fps: Tensor) -> Tensor:
            frames, height, width = image_grid_thw[0].tolist()
            for patches in pixel_values.view(frames, height * width, -1)[frames - new :]:
                tokens, self.state = self.encoder.stream(patches, (height, width), self.state, float(fps[0]))
                self.held.append(tokens)
            return torch.cat(list(self.held)[-frames:])

        return encode
