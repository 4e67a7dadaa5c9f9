"""A video-language model of transformers as a reader: the clip is encoded once, and every prompt goes on from there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vot_kernels.data.video import VideoClip
from vot_kernels.reasoning.llm import (
    SLOT,
    HFLanguageModel,
    LanguageModelError,
    Prefix,
    mean_likelihoods,
    quiet_transformers,
    render_chat,
)
from vot_kernels.watching.cost import Estimate, estimate
from vot_kernels.watching.frames import check_all_seen, media, takes_videos, times_in_words
from vot_kernels.watching.kernels import Kernels
from vot_kernels.watching.memory import enough_memory
from vot_kernels.watching.protocols import WINDOW

_NOT_FOR_THE_MODEL = ("video_metadata",)


class VideoLanguageModel:
    """A model for images or videos and text, with its processor, as a reader.

    Args:
        model: a model with `generate`, as `AutoModelForImageTextToText` returns it.
        processor: its processor, with a chat template.
        name: name of the model in traces.
        kernels: the model on the kernels of this package; None leaves it as it is.
        max_batch: largest number of sequences in one forward pass, which bounds memory.
        max_frames: most frames that it is shown at once, which bounds memory, too.

    Raises:
        LanguageModelError: the processor has no chat template, or neither an image nor a video part.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str,
        *,
        kernels: Kernels | None = None,
        max_batch: int = 4,
        max_frames: int = WINDOW,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise LanguageModelError(
                f"The processor of '{name}' has no chat template, which says where the video belongs in a prompt."
            )
        if not takes_videos(processor) and getattr(processor, "image_processor", None) is None:
            raise LanguageModelError(f"The processor of '{name}' has a part for neither videos nor images.")
        self.model, self.processor, self.name = model, processor, name
        self.kernels, self.max_batch, self.max_frames = kernels, max_batch, max_frames
        self._last: tuple[VideoClip, ClipLanguageModel] | None = None

    def about(self, clip: VideoClip) -> ClipLanguageModel:
        """Return the model for prompts about `clip`; the clip that was asked about last stays encoded.

        Raises:
            LanguageModelError: the processor refuses the clip or drops a part of it.
        """
        if self._last is None or self._last[0] is not clip:
            self._last = None  # its cache goes before the next one comes
            self._last = clip, ClipLanguageModel(self, clip)
        return self._last[1]

    def estimate(self, clip: VideoClip) -> Estimate:
        """Return what a graph of `clip` and a question about it take; errors as in `about`."""
        read = self.about(clip)
        return estimate(self.model, read.inputs, read.visual_tokens, self.max_batch)


class TextOfVideoLanguageModel(HFLanguageModel):
    """A video-language model that is shown no video."""

    def __init__(self, whole: VideoLanguageModel) -> None:
        model: Any = whole.model
        super().__init__(
            model,
            whole.processor.tokenizer,
            device=str(model.device),
            name=whole.name,
            max_batch=whole.max_batch,
        )
        self.processor = whole.processor

    def _chat(self, text: str) -> str:
        return self._chat_of([{"type": "text", "text": text}])

    def _chat_of(self, content: list[dict[str, str]]) -> str:
        message = [{"role": "user", "content": content}]
        options: dict[str, Any] = {"add_generation_prompt": True}
        if "enable_thinking" in str(self.processor.chat_template):
            options["enable_thinking"] = False  # replies are too short to think aloud in
        return render_chat(self.processor, message, self.name, **options)

    def _after(self, cache: Any, place: int, tokens: Tensor) -> dict[str, Any]:
        # Without positions, transformers would shift them as in the clip that the model read last.
        positions = torch.arange(tokens.shape[1], device=tokens.device) + self._position(place)
        return {"past_key_values": cache, "position_ids": positions.expand(len(tokens), -1)}

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        with enough_memory(self.name):
            return super().generate_batch(prompts, max_new_tokens=max_new_tokens)

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        with enough_memory(self.name):
            return super().score(prompt, continuations)


class ClipLanguageModel(TextOfVideoLanguageModel):
    """A video-language model and one clip: a `LanguageModel` whose prompts all begin with the clip.

    The model reads the clip when it is asked for the first time.

    Attributes:
        blind: the same model without the clip.
        inputs: what the processor made of the clip and of the beginning of the prompt.
    """

    def __init__(self, whole: VideoLanguageModel, clip: VideoClip) -> None:
        super().__init__(whole)
        self.blind = TextOfVideoLanguageModel(whole)
        self._run = whole.kernels.run if whole.kernels else self.model
        given = media(clip, self.processor)
        text = self._chat_of([*given.content, {"type": "text", "text": times_in_words(clip) + SLOT}])
        head, slot, self._tail = text.partition(SLOT)
        if not slot:
            raise LanguageModelError(
                f"The chat template of '{self.name}' leaves out the text of the message."
            )
        self.inputs = _processed(self.processor, head, given.arguments, self.name)
        check_all_seen(
            self.inputs, given, self.processor, visual_tokens(self.model, self.processor), self.name
        )
        self._head: list[int] = self.inputs["input_ids"][0].tolist()
        self._check_length(len(self._head))

    @property
    def visual_tokens(self) -> int:
        """How many tokens of the prompt stand for the clip."""
        visual = visual_tokens(self.model, self.processor)
        return sum(id in visual for id in self._head)

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids the model sees for `prompt`: the clip, the prompt as text, and what begins a reply."""
        tail = self.tokenizer(self._tail, add_special_tokens=False)["input_ids"]
        return [*self._head, *self._text_ids(prompt), *tail]

    @cached_property
    def _clip(self) -> _ClipState:
        """What the model made of the clip and of what comes before it."""
        options = {key: value for key, value in self.inputs.items() if key not in _NOT_FOR_THE_MODEL}
        for key, value in options.items():
            if isinstance(value, Tensor):
                dtype = self.model.dtype if value.is_floating_point() else None
                options[key] = value.to(self.model.device, dtype)
        try:
            with torch.inference_mode():
                cache = self._run(**options, use_cache=True, logits_to_keep=1).past_key_values
        except (
            ValueError
        ) as error:  # the model found that features and tokens of the clip do not fit together
            raise LanguageModelError(f"The model '{self.name}' refuses the clip: {error}") from error
        # A video may advance positions by fewer than its tokens; transformers notes by how many, on a module.
        deltas = [m.rope_deltas for m in self.model.modules() if getattr(m, "rope_deltas", None) is not None]
        shift = int(deltas[0].flatten()[0]) if deltas else 0
        layers = [(layer.keys, layer.values) for layer in cache.layers] if self._plain_cache else []
        return _ClipState(cache, shift, Prefix(self._head, layers))

    def _known(self) -> list[Prefix]:
        return [self._clip.prefix, *self._kept]

    def _position(self, place: int) -> int:
        return place + self._clip.shift

    # Caches that hold more than keys and values can be copied whole, but not cut or padded: one prompt at a time.

    def _score(self, prefix: list[int], tails: list[list[int]]) -> list[float]:
        if self._plain_cache:
            return super()._score(prefix, tails)
        with torch.inference_mode():
            cache, _ = self._read(self._clip.cache, len(self._head), prefix[len(self._head) : -1])
            scores = []
            for tail in tails:
                tokens = torch.tensor([[prefix[-1], *tail]], device=self.model.device)
                options = self._after(copy.deepcopy(cache), len(prefix) - 1, tokens)
                scores += mean_likelihoods(self.model(input_ids=tokens, **options).logits, tokens, [tail])
        return scores

    def _decode_hf(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            return [self._decode_one(prompt, max_new_tokens) for prompt in prompts]

    def _decode_one(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        cache, token = self._read(self._clip.cache, len(self._head), prompt[len(self._head) :])
        reply: list[int] = []
        while token not in self._stop and len(reply) < max_new_tokens:
            reply.append(token)
            cache, token = self._read(cache, len(prompt) + len(reply) - 1, [token], own=True)
        return reply

    def _read(self, cache: Any, place: int, ids: list[int], own: bool = False) -> tuple[Any, int]:
        """Return the cache after `ids`, which come at `place`, and the likeliest next token; `own`: change `cache`."""
        cache = cache if own else copy.deepcopy(cache)
        tokens = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=tokens, use_cache=True, **self._after(cache, place, tokens))
        return out.past_key_values, int(out.logits[0, -1].argmax())


class _ClipState(NamedTuple):
    """A clip that was read: the cache, by how much positions run ahead of tokens, and the cache as a prefix."""

    cache: Any
    shift: int
    prefix: Prefix


def _processed(processor: Any, text: str, arguments: dict[str, Any], name: str) -> Any:
    """Return what the processor makes of a text with a clip in it."""
    begun = processor.tokenizer.bos_token
    special = not (begun and text.startswith(begun))
    try:
        with quiet_transformers():
            return processor(text=[text], return_tensors="pt", add_special_tokens=special, **arguments)
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LanguageModelError(f"The processor of '{name}' cannot read the clip: {reason}") from error


def visual_tokens(model: Any, processor: Any) -> set[int]:
    """Return the ids that stand for images and videos in a prompt."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {getattr(owner, name, None) for owner in (model.config, processor) for name in names}
    return {id for id in found if isinstance(id, int)}
