"""Parameters and forward FLOPs of an encoder, counted from its configuration."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder
from vot_kernels.models.encoder.variants import RoutedExperts
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts
from vot_kernels.packing import PackedLayout


@dataclass(frozen=True)
class EncoderCost:
    """Cost of one forward pass over one clip; a multiply-add counts as two FLOPs.

    Attributes:
        parameters: number of parameters of the model.
        tokens: number of tokens of the clip.
        linear_flops: matrix products with weights; of the experts only those that are used.
        attention_flops: scores and values, near and far.
        dense_attention_flops: the same if every layer were exact softmax attention.
    """

    parameters: int
    tokens: int
    linear_flops: int
    attention_flops: int
    dense_attention_flops: int

    @property
    def flops(self) -> int:
        """The sum of all counted FLOPs."""
        return self.linear_flops + self.attention_flops


def encoder_cost(config: VotEncoderConfig, grid_thw: tuple[int, int, int]) -> EncoderCost:
    """Count the cost of encoding one clip of (frames, height, width) patches."""
    with torch.device("meta"):
        model = VotEncoder(config)
    layout = PackedLayout.from_grid_thw([list(grid_thw)], config.group)
    tokens = layout.num_tokens
    linear = sum(_linear_flops(module) for module in model.modules()) * tokens
    attention = sum(_attention_flops(config, window, layout) for window in config.layer_windows)
    dense = config.num_hidden_layers * 4 * tokens**2 * config.hidden_size
    return EncoderCost(sum(p.numel() for p in model.parameters()), tokens, linear, attention, dense)


_SAMPLE_FRAMES = 16


def describe_preset(name: str) -> dict[str, Any]:
    """Return parameters and FLOPs of a preset for one clip of 16 frames of 224 × 224 pixels (nano: 64 × 64)."""
    config = VotEncoderConfig.preset(name)
    side = 64 if name == "nano" else 224
    patches = side // config.patch_size
    cost = encoder_cost(config, (_SAMPLE_FRAMES, patches, patches))
    text = (
        f"{name}: {cost.parameters / 1e6:.2f} M parameters; a clip of {_SAMPLE_FRAMES} frames of {side} × {side} "
        f"pixels is {cost.tokens:,} tokens and {cost.flops / 1e9:.1f} GFLOP forward "
        f"({cost.attention_flops / 1e9:.2f} of them attention, where exact attention in every layer would take "
        f"{cost.dense_attention_flops / 1e9:.2f})."
    )
    return {"preset": name, "frame_size_px": side, "flops": cost.flops, **asdict(cost), "text": text}


def _linear_flops(module: nn.Module) -> int:
    """Return FLOPs per token. The norms of all experts are computed; the rest of an expert runs only if it is
    selected.

    A shared expert consists of linear layers, which `modules` lists separately.
    """
    if isinstance(module, AutonomyOfExperts):
        experts = {name: 2 * p[0].numel() for name, p in module.named_parameters(recurse=False)}
        chosen = sum(n for name, n in experts.items() if name != "w_down") * module.top_k
        return experts["w_down"] * module.w_down.shape[0] + chosen
    if isinstance(module, RoutedExperts):  # its router is a linear layer
        return 2 * module.top_k * (module.gate_up[0].numel() + module.down[0].numel())
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0


def _attention_flops(config: VotEncoderConfig, window: int | None, layout: PackedLayout) -> int:
    lengths = layout.group_lengths
    groups = range(len(lengths))
    reach = len(lengths) if window is None else window
    if config.attention == "linear":
        near = 0
    else:
        near = sum(
            lengths[g] * sum(lengths[max(0, g - reach) : g + 1 if config.causal else g + reach + 1])
            for g in groups
        )
    far = 0 if reach >= len(lengths) - 1 else 4 * layout.num_tokens * config.hidden_size * config.head_dim
    return 4 * near * config.hidden_size + far
