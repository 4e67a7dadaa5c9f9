"""Configuration of the perception model: the encoder plus the STSG head."""

from typing import Any

from transformers import PreTrainedConfig

from vot_kernels.models.encoder.configuration import VotEncoderConfig


class VotPerceptionConfig(PreTrainedConfig):
    """The parts and sizes of a `VotPerceptionModel`.

    Args:
        encoder: a `VotEncoderConfig` or its dictionary.
        num_queries: object queries per clip, which is the largest number of tracklets that can be found.
        decoder_layers, decoder_heads: layers and heads of the transformer that turns queries into objects.
        glimpse_size: pixels on each side of the crop around every object in every frame.
        labels, attributes, predicates, events: the closed vocabulary; the predicates in `unary_predicates`
            and the events in `unary_events` concern one object.
        max_pixels: largest area of one frame, in pixels, for which the checkpoint was trained.
        fps: frames per second for which it was trained.
    """

    model_type = "vot_perception"
    sub_configs = {"encoder": VotEncoderConfig}

    def __init__(
        self,
        encoder: VotEncoderConfig | dict[str, Any] | None = None,
        num_queries: int = 8,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
        glimpse_size: int = 12,
        labels: list[str] | None = None,
        attributes: list[str] | None = None,
        predicates: list[str] | None = None,
        unary_predicates: list[str] | None = None,
        events: list[str] | None = None,
        unary_events: list[str] | None = None,
        max_pixels: int = 64 * 64,
        fps: float = 8.0,
        **kwargs: Any,
    ):
        if encoder is None:
            encoder = VotEncoderConfig.preset("nano")
        elif isinstance(encoder, dict):
            encoder = VotEncoderConfig(**encoder)
        self.encoder = encoder
        self.num_queries = num_queries
        self.decoder_layers = decoder_layers
        self.decoder_heads = decoder_heads
        self.glimpse_size = glimpse_size
        self.labels = labels or ["object"]
        self.attributes = attributes or []
        self.predicates = predicates or []
        self.unary_predicates = unary_predicates or []
        self.events = events or []
        self.unary_events = unary_events or []
        self.max_pixels = max_pixels
        self.fps = fps
        super().__init__(**kwargs)
