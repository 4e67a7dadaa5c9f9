"""From images, videos, scene graphs and text to the inputs of the video-language model."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.graph.tensors import graph_tensors
from vot_kernels.models.vot.configuration import VotConfig
from vot_kernels.models.vot.modeling import FEATURE_INPUTS
from vot_kernels.scene_graph.graph import Vocabulary

IMAGE, VIDEO, GRAPH = "<|image|>", "<|video|>", "<|graph|>"
PLACEHOLDERS = (IMAGE, VIDEO, GRAPH)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<|' + part['type'] + '|>' }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, in which a part of a message may be an image, a video or a graph."""


class VotProcessor(ProcessorMixin):
    """Prepares text with images, videos and scene graphs in the places of `<|image|>`, `<|video|>` and `<|graph|>`.

    Each placeholder becomes as many tokens as the model makes of what stands there. The frames of a video whose times
    are known are preceded by them, as in "0.5s".

    Args:
        image_processor: of the encoder, with the merge_size of the model.
        tokenizer: of the language model, which must have the three placeholders as tokens.
        chat_template: of messages; None is `CHAT_TEMPLATE`.
        vocabulary: the words of the model's graph tokens: lists of labels, attributes, predicates and events.
        tokens_per_track: tokens of a tracklet; 0 for a model that reads no graphs.
        num_frames: so many frames are taken evenly from a longer video; None takes all.

    Raises:
        ValueError: the tokenizer lacks a placeholder.
    """

    def __init__(
        self,
        image_processor: VotImageProcessor,
        tokenizer: Any,
        chat_template: str | None = None,
        vocabulary: Mapping[str, Sequence[str]] | None = None,
        tokens_per_track: int = 0,
        num_frames: int | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.vocabulary = {name: list(words) for name, words in (vocabulary or {}).items()}
        self.tokens_per_track = tokens_per_track
        self.num_frames = num_frames
        self.image_token, self.video_token, self.graph_token = PLACEHOLDERS
        known = tokenizer.get_vocab()
        if missing := [token for token in PLACEHOLDERS if token not in known]:
            raise ValueError(f"The tokenizer has no token {missing[0]}; add it: add_placeholders(tokenizer).")
        self.image_token_id, self.video_token_id, self.graph_token_id = (known[t] for t in PLACEHOLDERS)

    @classmethod
    def for_model(
        cls, config: VotConfig, tokenizer: Any, num_frames: int | None = None, **sizes: Any
    ) -> "VotProcessor":
        """Return the processor of a model; `sizes` go to the image processor."""
        vision, graph = config.vision_config, config.graph_config
        image_processor = VotImageProcessor(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=config.merge_size,
            **sizes,
        )
        words = {} if graph is None else vars(graph.vocabulary)
        return cls(
            image_processor,
            tokenizer,
            vocabulary=words,
            tokens_per_track=0 if graph is None else graph.tokens_per_track,
            num_frames=num_frames,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        graphs: Any = None,
        *,
        video_metadata: Any = None,
        audio: None = None,
        do_sample_frames: bool = False,
        return_tensors: str | None = None,
        **text_options: Any,
    ) -> BatchFeature:
        """Prepare a batch; images, videos and graphs are taken in the order of their placeholders in the texts.

        Args:
            images: images `[H, W, 3]` (uint8 in numpy or torch, or PIL), in a list, or in a list per text.
            text: one text or several.
            videos: clips uint8 `[T, H, W, 3]`, or objects with `frames` and `times` in seconds, as `VideoClip`.
            graphs: an `STSG`, a list of them, or a list per text.
            video_metadata: one per video, an object or a dict with `fps` of the file and `frames_indices`, the frames
                of the file that the video has (default: all); None where `videos` know their times or nobody does.
            audio: None, since the model hears nothing.
            do_sample_frames: False, since the processor's num_frames says what is taken.
            return_tensors: "pt" or None for token ids as lists; features are tensors in either case.
            text_options: options of the tokenizer, such as `padding`.

        Returns:
            `input_ids` and `attention_mask`; for images `pixel_values` and `image_grid_thw`; for videos
            `pixel_values_videos`, `video_grid_thw` and `video_fps`; for graphs the tensors of `graph_tensors`.

        Raises:
            ValueError: the placeholders of the texts are not as many as what is given for them, or an option is not
                allowed.
        """
        if audio is not None:
            raise ValueError("The model hears nothing; audio must be None.")
        if do_sample_frames:
            raise ValueError(
                "do_sample_frames must be False; num_frames of the processor says what is taken."
            )
        shown, features = self._features(images, videos, graphs, video_metadata)
        if text is None:
            return BatchFeature(features)
        texts = self._expand([text] if isinstance(text, str) else list(text), shown)
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **text_options)
        return BatchFeature({**tokens, **features})

    @property
    def model_input_names(self) -> list[str]:
        """The names of the outputs."""
        return [*self.tokenizer.model_input_names, *FEATURE_INPUTS]

    def _features(
        self, images: Any, videos: Any, graphs: Any, metadata: Any
    ) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
        """Return what each placeholder becomes, and the tensors."""
        shown: dict[str, list[str]] = {token: [] for token in PLACEHOLDERS}
        features: dict[str, Tensor] = {}
        if pictures := _flat(images):
            packed = self.image_processor(pictures)
            features |= {name: packed[name] for name in ("pixel_values", "image_grid_thw")}
            shown[IMAGE] = [IMAGE * self._tokens(grid) for grid in packed["image_grid_thw"].tolist()]
        if clips := _flat(videos):
            known = _flat(metadata) or [None] * len(clips)
            if len(known) != len(clips):
                raise ValueError(f"video_metadata must be one per video ({len(clips)}), got {len(known)}.")
            pairs = [self._sampled(clip, given) for clip, given in zip(clips, known, strict=True)]
            times = [seconds for _, seconds in pairs]
            packed = self.image_processor([clip for clip, _ in pairs], fps=[_rate(t) for t in times])
            features["pixel_values_videos"] = packed["pixel_values"]
            features["video_grid_thw"], features["video_fps"] = packed["image_grid_thw"], packed["fps"]
            grids = packed["image_grid_thw"].tolist()
            shown[VIDEO] = [self._video(grid, seconds) for grid, seconds in zip(grids, times, strict=True)]
        if scenes := _flat(graphs):
            if not self.tokens_per_track:
                raise ValueError("This model reads no scene graphs (its tokens_per_track is 0).")
            words = Vocabulary(**{name: tuple(words) for name, words in self.vocabulary.items()})
            features |= graph_tensors([scene.to_packed(words) for scene in scenes])
            shown[GRAPH] = [GRAPH * (self.tokens_per_track * len(scene.tracklets)) for scene in scenes]
        return shown, features

    def _sampled(self, clip: Any, metadata: Any) -> tuple[Any, np.ndarray | None]:
        """Return the frames that are taken, and their times, if known."""
        frames, times = getattr(clip, "frames", clip), _times(clip, metadata)
        if self.num_frames is None or len(frames) <= self.num_frames:
            return frames, times
        taken = np.linspace(0, len(frames) - 1, self.num_frames).round().astype(np.int64)
        return frames[taken], None if times is None else times[taken]

    def _tokens(self, grid: Sequence[int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2

    def _video(self, grid: Sequence[int], times: np.ndarray | None) -> str:
        """Return the text of a video: for each frame its time, if known, and its tokens."""
        frame = VIDEO * self._tokens((1, *grid[1:]))
        if times is None:
            return frame * grid[0]
        starts = times[:: self.image_processor.temporal_patch_size]
        return "".join(f"{seconds:.1f}s{frame}" for seconds in starts.tolist())

    def _expand(self, texts: list[str], shown: Mapping[str, list[str]]) -> list[str]:
        """Return the texts with each placeholder replaced by what stands there."""
        for token, items in shown.items():
            wanted = sum(text.count(token) for text in texts)
            if wanted != len(items):
                what = token.strip("<|>")
                raise ValueError(f"The text has {wanted} {token}, but {len(items)} {what}s are given.")
        turns = {token: iter(items) for token, items in shown.items()}
        pattern = "|".join(re.escape(token) for token in PLACEHOLDERS)
        return [re.sub(pattern, lambda match: next(turns[match[0]]), text) for text in texts]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list:
        """Return image processor and tokenizer; AutoImageProcessor knows processors of transformers alone."""
        if not processor_dict or "image_processor" not in processor_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no processor_config.json with an image_processor."
            )
        settings = {k: v for k, v in processor_dict["image_processor"].items() if k != "image_processor_type"}
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [VotImageProcessor(**settings), tokenizer]

    def _multimodal_inputs_from_conversations(
        self, conversations: Any, *_: Any, **__: Any
    ) -> tuple[list, list, list, dict[str, Any]]:
        """As in transformers, for parts of messages with the keys "image", "video" and "graph"."""
        found: dict[str, list[list]] = {"image": [], "video": [], "graph": []}
        for conversation in conversations:
            parts = [
                part
                for message in conversation
                if not isinstance(message.get("content") or "", str)
                for part in message["content"]
            ]
            for kind, batch in found.items():
                batch.append([part[kind] for part in parts if part["type"] == kind and kind in part])
        graphs = {"graphs": found["graph"]} if any(found["graph"]) else {}
        return found["image"], found["video"], [], graphs


def add_placeholders(tokenizer: Any) -> int:
    """Add the placeholders to a tokenizer that lacks them, as special tokens; return how many were added."""
    known = tokenizer.get_vocab()
    return tokenizer.add_tokens([t for t in PLACEHOLDERS if t not in known], special_tokens=True)


def _flat(items: Any) -> list:
    """Return what is given as one item, as a list of items, or as a list of items per text, as a list of items."""
    if items is None:
        return []
    if not isinstance(items, list | tuple):
        return [items]
    nested: Iterable[Any] = (x if isinstance(x, list | tuple) else [x] for x in items if x is not None)
    return [item for group in nested for item in group if item is not None]


def _times(clip: Any, metadata: Any) -> np.ndarray | None:
    """Return the times of the frames in seconds; None if they are not known."""
    if hasattr(clip, "times"):
        return np.asarray(clip.times, np.float64)
    if metadata is None:
        return None
    get = metadata.get if isinstance(metadata, Mapping) else lambda name: getattr(metadata, name, None)
    fps, indices, frames = get("fps"), get("frames_indices"), len(clip)
    if not fps:
        return None
    indices = np.arange(frames) if indices is None else np.asarray(indices, np.float64)
    if len(indices) != frames:
        raise ValueError(f"frames_indices must be one per frame ({frames}), got {len(indices)}.")
    return indices / float(fps)


def _rate(times: np.ndarray | None) -> float:
    """Return the mean frames per second; 0 if unknown or for a single frame."""
    if times is None or len(times) < 2 or times[-1] <= times[0]:
        return 0.0
    return float((len(times) - 1) / (times[-1] - times[0]))
