"""The video-language model: packed encoder, spatial merge, scene graph tokens, any causal language model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderPreTrainedModel, VotStreamState
from vot_kernels.models.graph.modeling import RecurrentGraphTransformer
from vot_kernels.models.graph.tensors import GRAPH_INPUTS, packed_graphs
from vot_kernels.models.vot.configuration import VotConfig, VotGraphConfig

VISION_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_fps")
FEATURE_INPUTS = (*VISION_INPUTS, *GRAPH_INPUTS)
"""The arguments of forward that hold images, videos and graphs, packed over the whole batch."""


class VotPreTrainedModel(VotEncoderPreTrainedModel):
    """Loading, saving and initialisation of the video-language model."""

    config_class = VotConfig  # type: ignore[assignment]
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]
    _skip_keys_device_placement = ["past_key_values"]


class VotProjector(nn.Module):
    """Turns each square of `merge_size` × `merge_size` patches of a frame into one token of the language model."""

    def __init__(self, config: VotConfig, text_width: int):
        super().__init__()
        self.merge_size = config.merge_size
        width = config.vision_config.hidden_size * config.merge_size**2
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, text_width)
        self.down = nn.Linear(text_width, text_width)

    def forward(self, tokens: Tensor, grid_thw: Tensor) -> Tensor:
        """Map `[patches, vision width]` to `[patches / merge_size², text width]`, in rows of each frame in turn.

        Raises:
            ValueError: the height or width of a clip, in patches, is no multiple of merge_size.
        """
        merged = [self._merge(clip, *grid) for clip, grid in self._clips(tokens, grid_thw)]
        return self.down(nn.functional.gelu(self.up(self.norm(torch.cat(merged)))))

    def _clips(self, tokens: Tensor, grid_thw: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
        yield from zip(tokens.split(grid_thw.prod(1).tolist()), grid_thw.tolist(), strict=True)

    def _merge(self, clip: Tensor, frames: int, height: int, width: int) -> Tensor:
        m = self.merge_size
        if height % m or width % m:
            raise ValueError(
                f"A frame has {height} × {width} patches, but {m} × {m} of them are merged; make its sides "
                f"multiples of {m} patches (merge_size of the image processor)."
            )
        squares = clip.view(frames, height // m, m, width // m, m, -1).transpose(2, 3)
        return squares.reshape(frames * (height // m) * (width // m), -1)


class VotGraphEmbedding(nn.Module):
    """Turns scene graphs into `tokens_per_track` tokens of the language model for each tracklet."""

    def __init__(self, config: VotGraphConfig, text_width: int):
        super().__init__()
        self.tokens_per_track = config.tokens_per_track
        self.transformer = RecurrentGraphTransformer(config.transformer())
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, text_width)
        self.down = nn.Linear(text_width, text_width)

    def forward(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Map the tensors of `graph_tensors` to `[tracks * tokens_per_track, text width]`."""
        spans = self.transformer.embed_spans(packed_graphs(tensors), self.tokens_per_track)
        return self.down(nn.functional.gelu(self.up(self.norm(spans.flatten(0, 1)))))


class VotModel(VotPreTrainedModel):
    """Encoder, projector, graph embedding and the layers of the language model, without its head."""

    def __init__(self, config: VotConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        width = config.text_config.hidden_size
        self.encoder = VotEncoder(config.vision_config)
        self.projector = VotProjector(config, width)
        self.graph = None if config.graph_config is None else VotGraphEmbedding(config.graph_config, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_fps: Tensor | None = None,
        graph_sizes: Tensor | None = None,
        graph_nodes: Tensor | None = None,
        graph_boxes: Tensor | None = None,
        graph_edges: Tensor | None = None,
        graph_edge_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As `VotForConditionalGeneration.forward`, up to the last hidden state."""
        given = {name: value for name, value in locals().items() if name in FEATURE_INPUTS}
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give input_ids or inputs_embeds; both are None.")
            inputs_embeds = self.embed(input_ids, self.features(given))
        elif any(value is not None for value in given.values()):
            raise ValueError(
                "Images, videos and graphs need input_ids with their placeholders, not inputs_embeds."
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def embed(self, input_ids: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings of `input_ids`, with features in the place of the placeholder tokens.

        Args:
            input_ids: int64 `[batch, tokens]`.
            features: `[features, text width]` of each kind that is given: "image", "video" or "graph".

        Raises:
            ValueError: the placeholders are not as many as the features.
        """
        embeds = self.get_input_embeddings()(input_ids)
        config = self.config
        tokens = {
            "image": config.image_token_id,
            "video": config.video_token_id,
            "graph": config.graph_token_id,
        }
        for kind, token in tokens.items():
            # A single new token is one that was generated: nothing is put in its place.
            if kind in features or (token is not None and input_ids.shape[1] > 1):
                embeds = _put(embeds, input_ids == token, features.get(kind), kind)
        return embeds

    def features(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Return the features `[tokens, text width]` of the images, videos and graphs that are given, by kind."""
        found = self._vision(given)
        if any(given.get(name) is not None for name in GRAPH_INPUTS):
            if self.graph is None:
                raise ValueError("This model has no graph_config, so it reads no scene graphs.")
            found["graph"] = self.graph({k: v for k in GRAPH_INPUTS if (v := given.get(k)) is not None})
        return found

    def _vision(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Encode images and videos in one packed pass."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for kind, pixels, grid in (
            ("image", given.get("pixel_values"), given.get("image_grid_thw")),
            ("video", given.get("pixel_values_videos"), given.get("video_grid_thw")),
        ):
            if pixels is not None and grid is not None:
                pairs[kind] = (pixels, grid)
            elif pixels is not None or grid is not None:
                raise ValueError(
                    f"The {kind}s need both their patches and their grid_thw; one of them is None."
                )
        if not pairs:
            return {}
        patches = torch.cat([pixels for pixels, _ in pairs.values()])
        grids = torch.cat([grid for _, grid in pairs.values()])
        rates = {kind: torch.zeros(len(grid), device=patches.device) for kind, (_, grid) in pairs.items()}
        fps = given.get("video_fps")
        if "video" in rates and fps is not None:
            rates["video"] = fps
        seen = self.encoder(
            patches, grids, fps=torch.cat(list(rates.values())), output_balance=False, return_dict=True
        )
        merged = self.projector(seen.last_hidden_state, grids)
        counts = [int(grid.prod(1).sum()) // self.config.merge_size**2 for _, grid in pairs.values()]
        return dict(zip(pairs, merged.split(counts), strict=True))


@dataclass
class VotStream:
    """What a stream of frames and text has left behind.

    Attributes:
        input_ids: int64 `[1, tokens]`, the tokens so far.
        past_key_values: the language model's cache of them.
        encoder: the encoder's state, whose size does not grow.
    """

    input_ids: Tensor
    past_key_values: Any
    encoder: VotStreamState | None = None


class VotForConditionalGeneration(VotPreTrainedModel, GenerationMixin):
    """A causal language model that reads images, videos and scene graphs between its words."""

    def __init__(self, config: VotConfig):
        super().__init__(config)
        self.model = VotModel(config)
        self.lm_head = _head(config)
        if config.tie_word_embeddings:
            name = next(n for n, m in self.named_modules() if m is self.get_input_embeddings())
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        self.generation_config.suppress_tokens = _placeholders(config) or None

    @classmethod
    def from_parts(
        cls, config: VotConfig, encoder: VotEncoder | None = None, language_model: Any = None
    ) -> "VotForConditionalGeneration":
        """Return a new model with the weights of an encoder and of a causal language model, the rest initialised.

        Args:
            config: must have the configurations of the two; the vocabulary may be larger.
            encoder: with weights to copy; None leaves new ones.
            language_model: a causal language model with weights to copy, whose vocabulary is made as large as the
                configuration's; None leaves new ones.
        """
        model = cls(config)
        if encoder is not None:
            model.model.encoder.load_state_dict(encoder.state_dict())
        if language_model is not None:
            vocabulary = config.text_config.vocab_size
            language_model.resize_token_embeddings(vocabulary)
            model.model.language_model.load_state_dict(language_model.base_model.state_dict())
            model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
            settings = language_model.generation_config.to_dict()
            model.generation_config = GenerationConfig(
                **settings | {"suppress_tokens": _placeholders(config)}
            )
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_fps: Tensor | None = None,
        graph_sizes: Tensor | None = None,
        graph_nodes: Tensor | None = None,
        graph_boxes: Tensor | None = None,
        graph_edges: Tensor | None = None,
        graph_edge_scores: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits, and the loss where labels are given.

        Args:
            input_ids, attention_mask: int64 `[batch, tokens]`, from `VotProcessor`.
            position_ids, past_key_values, inputs_embeds, logits_to_keep: as in causal language models.
            pixel_values: float `[patches, C * tp * p * p]`, the images of the whole batch in the order of their
                placeholders; pixel_values_videos, the videos.
            image_grid_thw, video_grid_thw: int64 `[images, 3]` and `[videos, 3]`, (frames, height, width) in patches.
            video_fps: float `[videos]`, frames per second; None is unknown, 0.
            graph_sizes, graph_nodes, graph_boxes, graph_edges, graph_edge_scores: see `graph_tensors`.
            labels: int64 `[batch, tokens]`, -100 where nothing is learnt.

        Raises:
            ValueError: the placeholders of a kind are not as many as its features, or inputs do not fit together.
        """
        given = {name: value for name, value in locals().items() if name in FEATURE_INPUTS}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **given,
            **kwargs,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; images, videos and graphs are read once where a cache keeps them."""
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in FEATURE_INPUTS:
                inputs.pop(name, None)
        return inputs

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        state: VotStream | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_fps: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> VotStream:
        """Read the next piece of one conversation: text, or one frame of a video and what stands around it.

        Frame by frame, the cache equals that of the whole clip at once. To answer, call
        `generate(torch.cat([state.input_ids, question], 1), past_key_values=state.past_key_values)`; it extends the
        cache, so stream on with a copy of it.

        Args:
            input_ids: int64 `[1, tokens]`, with the placeholders of the frame, if there is one.
            state: what earlier pieces returned; None at the beginning.
            pixel_values_videos: float `[patches, C * tp * p * p]`, the frame; None for text alone.
            video_grid_thw: int64 `[1, 3]`, (1, height, width) in patches.
            video_fps: float `[1]`, frames per second of the stream.
            attention_mask: of ones, as the processor returns it; a stream has no padding.

        Raises:
            ValueError: the encoder is not causal, the piece has more than one frame, or its placeholders are not as
                many as its features.
        """
        state = state or VotStream(input_ids[:, :0], DynamicCache(config=self.config.text_config))
        encoder, features = state.encoder, {}
        if pixel_values_videos is not None and video_grid_thw is not None:
            features["video"], encoder = self._next_frame(
                pixel_values_videos, video_grid_thw, video_fps, encoder
            )
        embeds = self.model.embed(input_ids, features)
        outputs = self.model(inputs_embeds=embeds, past_key_values=state.past_key_values, use_cache=True)
        return VotStream(torch.cat([state.input_ids, input_ids], 1), outputs.past_key_values, encoder)

    def _next_frame(
        self, pixels: Tensor, grid: Tensor, fps: Tensor | None, state: VotStreamState | None
    ) -> tuple[Tensor, VotStreamState]:
        if grid[:, 0].tolist() != [1]:
            raise ValueError(
                f"A stream reads one frame at a time, got clips of {grid[:, 0].tolist()} frames."
            )
        encoder = self.model.encoder
        size = (int(grid[0, 1]), int(grid[0, 2]))
        rate = 0.0 if fps is None else float(fps[0])
        tokens, state = encoder.stream(pixels, size, state or encoder.start_stream(), rate)
        return self.model.projector(tokens, grid), state

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each sample; packed inputs are repeated with the sample that they belong to."""
        packed = {name: model_kwargs.pop(name, None) for name in FEATURE_INPUTS}
        packed = {name: value for name, value in packed.items() if value is not None}
        if packed and input_ids is not None and expand_size > 1:
            packed = self._repeat(packed, input_ids, expand_size)
        mixin: Any = super()
        ids, kwargs = mixin._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, kwargs | packed

    def _repeat(self, packed: dict[str, Tensor], input_ids: Tensor, times: int) -> dict[str, Tensor]:
        config, merged = self.config, self.config.merge_size**2
        result = dict(packed)
        for token, pixels, grid in (
            (config.image_token_id, "pixel_values", "image_grid_thw"),
            (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
        ):
            if grid in packed:
                patches = packed[grid].prod(1)
                counts = _items_per_sample(input_ids == token, patches // merged)
                for name in (grid, "video_fps") if grid == "video_grid_thw" else (grid,):
                    if name in packed:
                        result[name] = _repeated(packed[name], counts, times)
                rows = [int(part.sum()) for part in patches.split(counts)]
                result[pixels] = _repeated(packed[pixels], rows, times)
        if "graph_sizes" in packed:
            sizes = packed["graph_sizes"]
            tokens = sizes[:, 3] * config.graph_config.tokens_per_track
            counts = _items_per_sample(input_ids == config.graph_token_id, tokens)
            parts = sizes.split(counts)
            result["graph_sizes"] = _repeated(sizes, counts, times)
            for column, names in (
                (1, ("graph_nodes", "graph_boxes")),
                (2, ("graph_edges", "graph_edge_scores")),
            ):
                for name in names:
                    rows = [int(part[:, column].sum()) for part in parts]
                    result[name] = _repeated(packed[name], rows, times)
        return result


def _head(config: VotConfig) -> nn.Linear:
    """Return a new head like that of the causal language model."""
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config.text_config).get_output_embeddings()
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def _placeholders(config: VotConfig) -> list[int]:
    """Return the tokens that stand for features, which a reply cannot contain."""
    tokens = (config.image_token_id, config.video_token_id, config.graph_token_id)
    return [token for token in tokens if token is not None]


def _put(embeds: Tensor, places: Tensor, features: Tensor | None, kind: str) -> Tensor:
    """Return the embeddings with features in the places of their placeholders."""
    wanted, found = int(places.sum()), 0 if features is None else len(features)
    if wanted != found:
        raise ValueError(
            f"The text has {wanted} {kind} tokens, but the {kind} features are {found}; give the processor's "
            f"output as it is, with every {kind} and without truncation."
        )
    if features is None:
        return embeds
    return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))


def _items_per_sample(places: Tensor, tokens: Tensor) -> list[int]:
    """Return how many items, of `tokens` placeholders each, stand in each sample."""
    ends = torch.searchsorted(tokens.cumsum(0), places.sum(1).cumsum(0), right=True).tolist()
    ends[-1] = len(tokens)
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _repeated(tensor: Tensor, counts: list[int], times: int) -> Tensor:
    """Repeat each run of `counts` rows `times` times."""
    return torch.cat([part for part in tensor.split(counts) for _ in range(times)])
