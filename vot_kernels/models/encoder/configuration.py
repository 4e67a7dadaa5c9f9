"""Configuration and presets of the packed long-sequence image encoder."""

from typing import Any, Literal

from transformers import PreTrainedConfig

PRESETS: dict[str, dict[str, Any]] = {
    # nano runs, and trains, on two CPU cores; its small patches suit small frames.
    "nano": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 256,
        "patch_size": 8,
        "num_experts": 4,
        "expert_rank": 32,
        "full_attention_every": 4,
    },
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
        "patch_size": 16,
        "num_experts": 8,
        "expert_rank": 128,
        "full_attention_every": 6,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "patch_size": 16,
        "num_experts": 8,
        "expert_rank": 256,
        "full_attention_every": 8,
    },
    "large": {
        "hidden_size": 1280,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "intermediate_size": 3456,
        "patch_size": 14,
        "num_experts": 8,
        "expert_rank": 400,
        "full_attention_every": 8,
    },
}

ATTENTIONS = ("hybrid", "softmax", "linear", "gated")


class VotEncoderConfig(PreTrainedConfig):
    """The parts and sizes of a `VotEncoder`. Every part can be turned off for an ablation.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads: as in other transformers.
        intermediate_size: width of a dense SwiGLU block. An expert has the parameters of a SwiGLU block of width
            `intermediate_size / num_experts_per_tok`, so that the experts of one token have as many as that block.
        patch_size, temporal_patch_size, num_channels: one token covers
            `num_channels * temporal_patch_size * patch_size**2` values.
        attention: "hybrid" (softmax near, linear far), "softmax" (exact) or "linear"; for comparison "gated", which is
            hybrid with a normaliser for each part and a learned gate.
        window: groups on each side that softmax attention reaches; an int, or one entry per layer
            (None there means exact softmax attention).
        full_attention_every: every n-th layer has exact softmax; 0 turns that off.
        group: "frame", "rows:N" or a number of tokens; the unit that windows count.
        causal: None, or "group": no token sees a later group, here a frame, and clips can be streamed. Configurations
            saved by earlier versions say "frame".
        feature_map: "softmax", "elu" or "relu", the feature map of the linear part.
        learned_beta: learn the weight exp(beta) of the far part per head.
        qk_norm, rope_theta, rope: RMS norm of queries and keys, and 3-D rotary positions (t, y, x).
        aoe_every: every n-th block is Autonomy-of-Experts instead of dense; 0 turns AoE off.
        num_experts, num_experts_per_tok, expert_rank, aoe_weighting: see `vot_kernels.aoe`.
        expert_choice: who chooses the experts of a token: "autonomous", the experts themselves, or for comparison
            "routed", a linear router.
        shared_expert_size: width of a SwiGLU expert that processes every token of an AoE block; 0 for none. Its
            share of `intermediate_size` is taken from the selected experts.
        dense_residual, residual_dilation, residual_period: DenseFormer averaging of past blocks.
        size_embedding: add a function of (height, width, aspect, frames, fps) to every token.
        pooling_heads: heads of the attention pooling.
        projection_size: width of the contrastive projection.
    """

    model_type = "vot_encoder"

    def __init__(
        self,
        hidden_size: int = 96,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 3,
        num_key_value_heads: int | None = None,
        intermediate_size: int = 256,
        patch_size: int = 8,
        temporal_patch_size: int = 1,
        num_channels: int = 3,
        attention: Literal["hybrid", "softmax", "linear", "gated"] = "hybrid",
        window: int | list[int | None] = 1,
        full_attention_every: int = 4,
        group: str | int = "frame",
        causal: Literal["group", "frame"] | None = None,
        feature_map: Literal["softmax", "elu", "relu"] = "softmax",
        learned_beta: bool = True,
        qk_norm: bool = True,
        rope: bool = True,
        rope_theta: float = 100.0,
        aoe_every: int = 2,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        expert_rank: int = 32,
        aoe_weighting: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        expert_choice: Literal["autonomous", "routed"] = "autonomous",
        shared_expert_size: int = 0,
        dense_residual: bool = True,
        residual_dilation: int = 1,
        residual_period: int = 1,
        size_embedding: bool = True,
        pooling_heads: int = 4,
        projection_size: int = 128,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.num_channels = num_channels
        self.attention = attention
        self.window = window
        self.full_attention_every = full_attention_every
        self.group = group
        self.causal = "group" if causal == "frame" else causal
        self.feature_map = feature_map
        self.learned_beta = learned_beta
        self.qk_norm = qk_norm
        self.rope = rope
        self.rope_theta = rope_theta
        self.aoe_every = aoe_every
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.expert_rank = expert_rank
        self.aoe_weighting = aoe_weighting
        self.expert_choice = expert_choice
        self.shared_expert_size = shared_expert_size
        self.dense_residual = dense_residual
        self.residual_dilation = residual_dilation
        self.residual_period = residual_period
        self.size_embedding = size_embedding
        self.pooling_heads = pooling_heads
        self.projection_size = projection_size
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "VotEncoderConfig":
        """Return the configuration "nano", "small", "base" or "large", with some fields replaced."""
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_numbers(self) -> int:
        """Number of values in one patch, which is the last dimension of `pixel_values`."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def layer_windows(self) -> list[int | None]:
        """The window of each layer; None is exact softmax attention."""
        if self.attention == "softmax":
            return [None] * self.num_hidden_layers
        every = 0 if self.attention == "linear" else self.full_attention_every
        windows = self.window if isinstance(self.window, list) else [self.window] * self.num_hidden_layers
        return [None if every and (i + 1) % every == 0 else window for i, window in enumerate(windows)]

    def is_aoe(self, layer: int) -> bool:
        """Whether block `layer` has experts."""
        return self.aoe_every > 0 and (layer + 1) % self.aoe_every == 0

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of {self.num_attention_heads} heads."
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}.")
        if self.causal not in (None, "group"):
            raise ValueError(f'causal must be None or "group", got {self.causal!r}.')
        if self.causal and self.group != "frame":
            raise ValueError(f'causal="group" needs group="frame", got {self.group!r}.')
        if self.causal and self.attention == "linear":
            raise ValueError('attention="linear" has no causal form over groups; use "hybrid" with window=0.')
        if self.causal and self.attention == "gated":
            raise ValueError('attention="gated" has no causal form, got causal="group".')
        if self.expert_choice not in ("autonomous", "routed"):
            raise ValueError(f'expert_choice must be "autonomous" or "routed", got {self.expert_choice!r}.')
        if self.expert_choice == "routed" and self.shared_expert_size:
            raise ValueError(
                'expert_choice="routed" has no shared expert, '
                f"got shared_expert_size={self.shared_expert_size}."
            )
        if not 0 <= self.shared_expert_size < self.intermediate_size:
            raise ValueError(
                f"shared_expert_size must be from 0 to intermediate_size - 1, {self.intermediate_size - 1}, "
                f"got {self.shared_expert_size}."
            )
        if isinstance(self.window, list) and len(self.window) != self.num_hidden_layers:
            raise ValueError(
                f"window must have an entry for each of the {self.num_hidden_layers} layers, got {len(self.window)}."
            )
