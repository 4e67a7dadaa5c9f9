"""The packed long-sequence image encoder: hybrid attention, AoE, dense residuals, size-aware embedding."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.variants import GatedAttention, RoutedExperts
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts
from vot_kernels.nn.dense_residual import DenseResidual
from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.nn.linear_attention import LinearAttention
from vot_kernels.nn.mlp import SwiGLU
from vot_kernels.nn.pooling import PackedAttentionPooling
from vot_kernels.nn.rotary import RotaryEmbedding
from vot_kernels.nn.size_aware_embedding import SizeAwareEmbedding
from vot_kernels.ops.checks import check_choice
from vot_kernels.ops.dispatch import BACKENDS
from vot_kernels.ops.hybrid_attention import HybridAttentionState
from vot_kernels.packing import PackedLayout


@dataclass
class VotEncoderOutput(ModelOutput):
    """The output of the encoder; rows are packed in the order of the input.

    Attributes:
        last_hidden_state: `[tokens, hidden_size]`.
        pooler_output: `[clips, hidden_size]`, attention-pooled; zero for an empty clip.
        balance_loss: scalar, mean load-balance loss of the AoE blocks (0 without them), in training or on request.
        expert_load: `[AoE blocks, num_experts]`, share of the tokens that chose each expert, without a gradient; as
            `balance_loss`, but None without AoE blocks.
        hidden_states: the embedding and the output of every block, on request.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class VotEncoderBlock(GradientCheckpointingLayer):
    """Pre-norm block: hybrid attention, then AoE or a dense SwiGLU."""

    def __init__(self, config: VotEncoderConfig, layer: int):
        super().__init__()
        dim = config.hidden_size
        self.attention_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = _attention(config, config.layer_windows[layer])
        self.mlp_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.mlp: SwiGLU | AutonomyOfExperts | RoutedExperts = (
            _experts(config) if config.is_aoe(layer) else SwiGLU(dim, config.intermediate_size)
        )

    def forward(
        self, x: Tensor, layout: PackedLayout, output_balance: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map `[tokens, hidden_size]` to the same shape, and return the balance loss and the load of its experts.

        The last two are None in a dense block and without `output_balance`.
        """
        x = x + self.attention(self.attention_norm(x), layout)
        if output_balance and not isinstance(self.mlp, SwiGLU):
            y, aux = self.mlp(self.mlp_norm(x), return_aux=True)
            return x + y, aux.balance_loss, aux.load
        return x + self.mlp(self.mlp_norm(x)), None, None

    def step(
        self, x: Tensor, layout: PackedLayout, state: HybridAttentionState | None
    ) -> tuple[Tensor, HybridAttentionState]:
        """Compute one frame of a stream and carry the attention's state.

        Raises:
            TypeError: the attention is linear, which has no stream.
        """
        if not isinstance(self.attention, HybridAttention):
            raise TypeError(f"A stream needs HybridAttention, got {type(self.attention).__name__}.")
        attended, state = self.attention.step(self.attention_norm(x), layout, state)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state


def _experts(config: VotEncoderConfig) -> AutonomyOfExperts | RoutedExperts:
    width = (config.intermediate_size - config.shared_expert_size) // config.num_experts_per_tok
    if config.expert_choice == "routed":
        return RoutedExperts(config.hidden_size, config.num_experts, config.num_experts_per_tok, width)
    return AutonomyOfExperts(
        config.hidden_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        rank=config.expert_rank,
        d_ffn=width,
        weighting=config.aoe_weighting,
        shared_hidden=config.shared_expert_size,
    )


def _attention(config: VotEncoderConfig, window: int | None) -> HybridAttention | LinearAttention:
    options: dict[str, Any] = {
        "num_kv_heads": config.num_key_value_heads,
        "feature_map": config.feature_map,
        "qk_norm": config.qk_norm,
        "rotary": RotaryEmbedding(config.rope_theta) if config.rope else None,
    }
    if config.attention == "linear":
        return LinearAttention(config.hidden_size, config.num_attention_heads, **options)
    kind = GatedAttention if config.attention == "gated" else HybridAttention
    return kind(
        config.hidden_size,
        config.num_attention_heads,
        window=window,
        causal=config.causal,
        beta_init=0.0 if config.learned_beta else None,
        **options,
    )


class VotEncoderPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by models with a `VotEncoder`."""

    config_class = VotEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VotEncoderBlock"]
    # The encoder has an attention of its own, so it can be part of a model with any of transformers' implementations.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, but refuse a folder with another model, where transformers would only warn.

        Raises:
            ValueError: config.json of the folder names another model_type.
        """
        source = pretrained_model_name_or_path
        file = None if source is None else Path(source) / "config.json"
        kind = json.loads(file.read_text()).get("model_type") if file is not None and file.is_file() else None
        if kind is not None and kind != cls.config_class.model_type:
            raise ValueError(f"{source} must hold a {cls.config_class.model_type}, but it holds a {kind}.")
        return super().from_pretrained(source, *model_args, **kwargs)

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # transformers skips a foreign module if all tensors directly in it are initialised, hence also if there are
        # none. Such a module may set tensors of its children, as SizeAwareEmbedding does.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Let each module initialise itself; tensors that were loaded keep their values."""
        reset = getattr(module, "reset_parameters", None)
        tensors = [*module.parameters(), *module.buffers()]
        loaded = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        if callable(reset) and len(loaded) < len(tensors):
            values = [tensor.clone() for tensor in loaded]
            reset()
            for tensor, value in zip(loaded, values, strict=True):
                tensor.copy_(value)


@dataclass
class VotStreamState:
    """The state that a causal encoder carries from frame to frame; its size does not grow.

    Attributes:
        frame: number of frames seen so far.
        layers: the attention state of each block.
    """

    frame: int
    layers: list[HybridAttentionState | None]


class VotEncoder(VotEncoderPreTrainedModel):
    """An encoder of images and clips of any size, packed into one sequence, with one vector per patch.

    Packing is exact: no token sees another clip, and positions restart in each clip.
    """

    config: VotEncoderConfig

    def __init__(self, config: VotEncoderConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.patch_embedding = nn.Linear(config.patch_numbers, dim)
        self.size_embedding: SizeAwareEmbedding | None = (
            SizeAwareEmbedding(dim, use_frames=config.causal is None) if config.size_embedding else None
        )
        self.blocks = nn.ModuleList(VotEncoderBlock(config, i) for i in range(config.num_hidden_layers))
        self.residual: DenseResidual | None = (
            DenseResidual(
                config.num_hidden_layers, dilation=config.residual_dilation, period=config.residual_period
            )
            if config.dense_residual
            else None
        )
        self.norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.pooling = PackedAttentionPooling(dim, config.pooling_heads)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        fps: Tensor | None = None,
        layout: PackedLayout | None = None,
        output_hidden_states: bool = False,
        output_balance: bool | None = None,
    ) -> VotEncoderOutput:
        """Encode packed clips. With `return_dict=False` the output is a tuple of the fields that are not None.

        Args:
            pixel_values: `[patches, C * tp * p * p]`, from `VotImageProcessor`.
            image_grid_thw: integer `[clips, 3]`, (frames, height, width) in patches.
            fps: float `[clips]`, frames per second, 0 for images; None is all 0.
            layout: from `self.layout(image_grid_thw)`, to build it once for a packing that is used again, or outside
                of a compiled graph, which cannot build it.
            output_hidden_states: also return the embedding and every block's output.
            output_balance: return `balance_loss` and `expert_load` also; None means only in training.
        """
        output_balance = self.training if output_balance is None else output_balance
        layout = self.layout(image_grid_thw, pixel_values.device) if layout is None else layout
        self._check(pixel_values, layout)
        x = self._embed(pixel_values, layout, fps)
        states, losses, loads = [x], [], []
        history = self._history(x)
        for i, block in enumerate(self.blocks):
            x, loss, load = block(x, layout, output_balance)
            if loss is not None:
                losses.append(loss)
                loads.append(load)
            if self.residual is not None:
                x = self.residual(x, i + 1, history)
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        return VotEncoderOutput(
            last_hidden_state=x,
            pooler_output=self.pooling(x, layout),
            balance_loss=_mean(losses, like=x) if output_balance else None,
            expert_load=torch.stack(loads) if loads else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def set_attention_backend(self, backend: str) -> None:
        """Choose the backend of the attention: "auto" (the default), or a name of `BACKENDS`.

        It depends on the machine, so it is not part of the configuration and is not saved.

        Raises:
            ValueError: an unknown backend.
        """
        self._set_backend((HybridAttention, LinearAttention), backend)

    def set_experts_backend(self, backend: str) -> None:
        """Choose the backend of the experts, as `set_attention_backend` does for the attention.

        Raises:
            ValueError: an unknown backend.
        """
        self._set_backend((AutonomyOfExperts, RoutedExperts), backend)

    def _set_backend(self, kinds: tuple[type[nn.Module], ...], backend: str) -> None:
        check_choice("backend", backend, ("auto", *BACKENDS))
        for module in self.modules():
            if isinstance(module, kinds):
                setattr(module, "backend", backend)  # noqa: B010

    def layout(self, image_grid_thw: Tensor, device: torch.device | str | None = None) -> PackedLayout:
        """Return the packed layout of a batch, with this encoder's groups."""
        return PackedLayout.from_grid_thw(image_grid_thw, self.config.group, device)

    def start_stream(self) -> VotStreamState:
        """Return the state before the first frame of a stream; needs `causal="group"` and no full-attention layer."""
        if self.config.causal != "group":
            raise ValueError(f'Streaming needs an encoder with causal="group", got {self.config.causal!r}.')
        full = [i for i, window in enumerate(self.config.layer_windows) if window is None]
        if full:
            raise ValueError(
                f"Streaming needs bounded windows, but layers {full} attend to every past frame; "
                "set full_attention_every=0."
            )
        return VotStreamState(0, [None] * len(self.blocks))

    def stream(
        self, pixel_values: Tensor, grid_hw: tuple[int, int], state: VotStreamState, fps: float = 0.0
    ) -> tuple[Tensor, VotStreamState]:
        """Encode the next frame: `[h * w, C * tp * p * p]` to `[h * w, hidden_size]` and the new state.

        Frame by frame, the results equal `forward` on the whole clip, with memory that does not grow.
        """
        grid = torch.tensor([[1, *grid_hw]])
        layout = self.layout(grid, pixel_values.device)
        self._check(pixel_values, layout)
        x = self._embed(pixel_values, layout, torch.tensor([fps], device=pixel_values.device))
        now = layout.positions + layout.positions.new_tensor([state.frame, 0, 0])
        layout = replace(layout, positions=now)
        history = self._history(x)
        layers: list[HybridAttentionState | None] = []
        blocks = [block for block in self.blocks if isinstance(block, VotEncoderBlock)]
        for i, (block, carried) in enumerate(zip(blocks, state.layers, strict=True)):
            x, carried = block.step(x, layout, carried)
            layers.append(carried)
            if self.residual is not None:
                x = self.residual(x, i + 1, history)
        return self.norm(x), VotStreamState(state.frame + 1, layers)

    def _history(self, x: Tensor) -> dict[int, Tensor]:
        return {} if self.residual is None else self.residual.start(x)

    def _embed(self, pixel_values: Tensor, layout: PackedLayout, fps: Tensor | None) -> Tensor:
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return x if self.size_embedding is None else self.size_embedding(x, layout, fps)

    def _check(self, pixel_values: Tensor, layout: PackedLayout) -> None:
        expected = [layout.num_tokens, self.config.patch_numbers]
        if list(pixel_values.shape) != expected:
            raise ValueError(
                f"pixel_values must have the shape {expected} (patches of image_grid_thw, numbers in a patch), "
                f"got {list(pixel_values.shape)}."
            )


def _mean(losses: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(losses).mean() if losses else like.new_zeros(())
