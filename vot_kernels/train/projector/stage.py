"""Conversations that align clips and graphs with words: a caption and the scene graph, from one of them or both."""

from functools import partial

import numpy as np

from vot_kernels.data.digitworld.episode import Episode
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.train.encoder.stage import caption
from vot_kernels.train.vlm.conversations import Conversation, ConversationBatches, Turn, render
from vot_kernels.train.vlm.stage import nats_per_token, train_parts

CAPTION, GRAPH = "Describe the clip.", "Write the scene graph."
SHOWN = ("video", "graph", "both")
_EVERY = 8  # frames between two boxes of a written graph
_EVAL_BATCH = 8


def describe(episode: Episode, rng: np.random.Generator, shown: str | None = None) -> Conversation:
    """Return a conversation in which the model writes a caption and the scene graph, in random order.

    `shown` says from what: "video", "graph" or "both"; None draws it.
    """
    shown = shown or SHOWN[rng.integers(len(SHOWN))]
    stsg = episode.stsg
    turns = [Turn(CAPTION, caption(stsg)), Turn(GRAPH, stsg.to_text(every=_EVERY, relations=False))]
    if rng.random() < 0.5:
        turns.reverse()
    return Conversation(
        turns,
        clip=None if shown == "graph" else render(episode),
        graph=None if shown == "video" else stsg,
    )


train_projector = partial(train_parts, speak=describe)
"""Train the projector and the graph tokens, and a new language model, in place; see `train_parts`."""


def projector_metrics(
    model: VotForConditionalGeneration, processor: VotProcessor, clips: int, seed: int = 0
) -> dict[str, float]:
    """Return the nats per token of captions and graphs of held-out clips, from the video, its graph, or both."""
    return {
        shown: nats_per_token(
            model,
            ConversationBatches(processor, partial(describe, shown=shown), seed, _EVAL_BATCH, split="test"),
            clips,
        )
        for shown in SHOWN
    }
