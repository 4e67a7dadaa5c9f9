"""Conversations about clips as training batches: what the model reads, and which tokens it learns to write."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.models.vot.processing import VotProcessor
from vot_kernels.packing import PackedLayout
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.train.loop import load_ahead
from vot_kernels.train.perception.batches import TRAIN_SIZES
from vot_kernels.train.ranks import ALONE, Ranks

END = "<|im_end|>"
"""What a reply ends with."""
_IGNORED = -100


@dataclass(frozen=True)
class Clip:
    """Frames uint8 `[T, H, W, 3]` with their times in seconds, float `[T]`."""

    frames: np.ndarray
    times: np.ndarray


class Turn(NamedTuple):
    """What the user says, and the reply; the first turn of a conversation also shows what it is about."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Conversation:
    """Turns about a clip, about its graph, or about both.

    Attributes:
        turns: at least one.
        clip, graph: what stands before the first prompt; None where it is not shown.
    """

    turns: Sequence[Turn]
    clip: Clip | None = None
    graph: STSG | None = None


Speaker = Callable[[Any, np.random.Generator], Conversation]
"""Makes a conversation about an episode, or what else there is; all of its choices come from the generator."""


class ConversationBatches(Dataset[dict[str, Tensor]]):
    """The batches of a split by number, each a step or a part of one.

    They are the same on every machine and in every process.

    Args:
        processor: of the model.
        speak: makes the conversation about each episode.
        seed: seed of the whole run.
        batch_size: conversations per batch.
        split: of DigitWorld; sizes vary in "train" alone.
        h264_share: share of the clips that are encoded with H.264 and decoded.
        ranks: the processes that train together; an item is this one's share of the batch.

    Attributes:
        signature: what must be equal, besides the settings, for a run to be resumed.
    """

    signature: Mapping[str, Any] = {}

    def __init__(
        self,
        processor: VotProcessor,
        speak: Speaker,
        seed: int,
        batch_size: int,
        split: str = "train",
        h264_share: float = 0.5,
        ranks: Ranks = ALONE,
    ):
        self.processor, self.speak = processor, speak
        self.seed, self.batch_size = seed, batch_size
        self.split, self.h264_share = split, h264_share
        self.ranks = replace(ranks, group=None)  # a worker process has no group

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.batch_size
        items = range(first, first + self.batch_size)
        return self._batch([items[own] for own in self.ranks.share(self.sizes(items))])

    def sizes(self, items: Sequence[int]) -> PackedLayout:
        """Return as segments how large the items are, as far as it is known before they are made.

        Patches have a fixed size, so pixels stand for tokens here.
        """
        sizes = [self._size(np.random.default_rng([self.seed, index])) for index in items]
        return PackedLayout.from_grid_thw([[1, *(size or (1, 1))] for size in sizes])

    def first(self, clips: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of the first `clips` episodes; the last one may be smaller."""
        for start in range(0, clips, self.batch_size):
            yield self._batch(range(start, min(start + self.batch_size, clips)))

    def _batch(self, items: Iterable[int]) -> dict[str, Tensor]:
        return encode(self.processor, [self.conversation(index) for index in items])

    def conversation(self, index: int) -> Conversation:
        """Return the conversation about episode `index`."""
        rng = np.random.default_rng([self.seed, index])
        return self.speak(generate_episode(self.split, index, self.seed, size=self._size(rng)), rng)

    def _size(self, rng: np.random.Generator) -> tuple[int, int] | None:
        return TRAIN_SIZES[rng.integers(len(TRAIN_SIZES))] if self.split == "train" else None

    def loader(self, start: int, stop: int) -> Iterable[dict[str, Tensor]]:
        """Load batches `start` … `stop - 1` in order, prepared in advance by one worker process."""
        return load_ahead(self, range(start, stop))


def render(episode: Episode, h264_share: float = 0.5) -> Clip:
    """Return the frames of an episode, encoded with H.264 and decoded with the probability `h264_share`."""
    return Clip(episode_batch([episode], codec_fraction=h264_share).frames[0], episode.times)


def encode(processor: VotProcessor, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
    """Return the model's inputs for a batch of conversations, packed into one row.

    `input_ids`, `position_ids` and `labels` are int64 `[1, tokens]`. Positions begin at 0 with each conversation, which
    tells a patched language model where it begins; labels are -100 for all but the replies.
    """
    pieces = [piece for conversation in conversations for piece in _pieces(processor, conversation)]
    clips = [c.clip for c in conversations if c.clip is not None]
    graphs = [c.graph for c in conversations if c.graph is not None]
    inputs = processor(
        text=[text for text, _ in pieces],
        videos=clips or None,
        graphs=graphs or None,
        add_special_tokens=False,
    )
    rows = iter(zip(inputs.pop("input_ids"), (learnt for _, learnt in pieces), strict=True))
    inputs.pop("attention_mask")
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for conversation in conversations:
        begin = len(tokens)
        for _ in range(2 * len(conversation.turns)):
            piece, learnt = next(rows)
            tokens += piece
            labels += piece if learnt else [_IGNORED] * len(piece)
        positions += range(len(tokens) - begin)
    packed = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    return {**{name: torch.tensor([row]) for name, row in packed.items()}, **inputs}


def shown(conversation: Conversation) -> list[dict[str, str]]:
    """Return the parts of a message that stand for what the conversation is about."""
    kinds = {"video": conversation.clip, "graph": conversation.graph}
    return [{"type": kind} for kind, item in kinds.items() if item is not None]


def _pieces(processor: VotProcessor, conversation: Conversation) -> list[tuple[str, bool]]:
    """Return the text of a conversation in pieces, and which of them are learnt."""
    pieces = []
    for n, turn in enumerate(conversation.turns):
        parts = [*(shown(conversation) if n == 0 else []), {"type": "text", "text": turn.prompt}]
        message: Any = [{"role": "user", "content": parts}]
        asked = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        pieces += [(asked if n == 0 else f"\n{asked}", False), (f"{turn.reply}{END}", True)]
    return pieces
