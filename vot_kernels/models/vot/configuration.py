"""Configuration of the video-language model: encoder, language model, scene graphs."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.graph.modeling import RecurrentGraphTransformerConfig
from vot_kernels.scene_graph.graph import Vocabulary

_SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class VotGraphConfig(PreTrainedConfig):
    """How scene graphs become tokens of the language model.

    Args:
        labels, attributes, predicates, events: the vocabulary; other words count as unknown.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: sizes of the `RecurrentGraphTransformer`.
        tokens_per_track: tokens of one tracklet, each about one of as many equal parts of the clip.
    """

    model_type = "vot_graph"

    def __init__(
        self,
        labels: Sequence[str] = (),
        attributes: Sequence[str] = (),
        predicates: Sequence[str] = (),
        events: Sequence[str] = (),
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        mlp_ratio: int = 2,
        tokens_per_track: int = 4,
        **kwargs: Any,
    ):
        self.labels = list(labels)
        self.attributes = list(attributes)
        self.predicates = list(predicates)
        self.events = list(events)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.tokens_per_track = tokens_per_track
        super().__init__(**kwargs)

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that graph tokens can speak of."""
        return Vocabulary(
            tuple(self.labels), tuple(self.attributes), tuple(self.predicates), tuple(self.events)
        )

    @classmethod
    def for_vocabulary(cls, vocabulary: Vocabulary, **sizes: Any) -> "VotGraphConfig":
        """Return the configuration with the words of `vocabulary`."""
        words = {name: getattr(vocabulary, name) for name in ("labels", "attributes", "predicates", "events")}
        return cls(**words, **sizes)

    def transformer(self) -> RecurrentGraphTransformerConfig:
        """Return the configuration of the graph transformer.

        Raises:
            ValueError: a size is below 1, or hidden_size is not a multiple of num_attention_heads.
        """
        return RecurrentGraphTransformerConfig(
            self.vocabulary,
            dim=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_ratio=self.mlp_ratio,
        )


class VotConfig(PreTrainedConfig):
    """The parts of a `VotForConditionalGeneration`.

    Args:
        vision_config: of the encoder; None is the encoder's default.
        text_config: of any causal language model of transformers, as an object or a dict with a `model_type`.
        graph_config: how scene graphs become tokens; None for a model that reads none.
        merge_size: side of the square of patches that becomes one token.
        image_token_id, video_token_id, graph_token_id: the tokens whose embeddings are replaced by features.

    Raises:
        ValueError: the language model changes its logits after its head (as soft-capping does), or merge_size < 1.
    """

    model_type = "vot"
    sub_configs = {
        "vision_config": VotEncoderConfig,
        "text_config": AutoConfig,
        "graph_config": VotGraphConfig,
    }

    def __init__(
        self,
        vision_config: VotEncoderConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        graph_config: VotGraphConfig | dict[str, Any] | None = None,
        merge_size: int = 2,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        graph_token_id: int | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if isinstance(graph_config, dict):
            graph_config = VotGraphConfig(**graph_config)
        if not isinstance(vision_config, PreTrainedConfig):
            vision_config = VotEncoderConfig(**(vision_config or {}))
        self.vision_config = vision_config
        self.text_config = AutoConfig.for_model("llama") if text_config is None else text_config
        self.graph_config = graph_config
        self.merge_size = merge_size
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.graph_token_id = graph_token_id
        self.initializer_range = initializer_range
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.merge_size < 1:
            raise ValueError(f"merge_size must be at least 1, got {self.merge_size}.")
        for name in _SCALED_LOGITS:
            if getattr(self.text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"The language model {self.text_config.model_type} changes its logits after the head ({name}), "
                    "which this model does not; take one whose head is a matrix alone."
                )
