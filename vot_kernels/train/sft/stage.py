"""Conversations about a clip: its events, then questions, each answered by a Video-of-Thought trace."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.baselines import accuracy_by_kind
from vot_kernels.data.digitworld.episode import Episode
from vot_kernels.data.digitworld.question_sets import draw_questions, generate_questions
from vot_kernels.data.digitworld.traces import ask, read_reply, write_trace
from vot_kernels.models.vot import VotProcessor
from vot_kernels.train.encoder.stage import caption
from vot_kernels.train.estimate import Work
from vot_kernels.train.projector.stage import CAPTION
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.vlm.answers import Asked, first_prompt, replies
from vot_kernels.train.vlm.conversations import Conversation, ConversationBatches, Speaker, Turn, render
from vot_kernels.train.vlm.stage import conversation_work, nats_per_token, train_parts

QUESTIONS = 12
_OF_A_KIND = 2
_EVAL_BATCH = 8


def reason(
    episode: Episode,
    rng: np.random.Generator,
    *,
    frames: float = 1.0,
    questions: int = QUESTIONS,
    short: bool = False,
) -> Conversation:
    """Return questions about an episode, each with its trace; one that admits none is captioned.

    Args:
        episode: what is asked about.
        rng: draws the questions, and whether the clip is shown.
        frames: share of the conversations that show the clip beside its graph.
        questions: at most so many.
        short: see `write_trace`.
    """
    stsg = episode.stsg
    asked = draw_questions(episode, questions, rng, _OF_A_KIND)
    turns = [Turn(ask(q.text, q.candidates), write_trace(q, stsg, short=short)) for q in asked]
    turns = turns or [Turn(CAPTION, caption(stsg))]
    first = Turn(first_prompt(stsg, turns[0].prompt), turns[0].reply)
    clip = render(episode) if rng.random() < frames else None
    return Conversation([first, *turns[1:]], clip, stsg)


def train_sft(out: Path, model: Any, processor: VotProcessor, settings: SftTraining, **options: Any) -> int:
    """Train the language model or its adapters, the projector and the graph tokens in place; see `train_parts`."""
    return train_parts(out, model, processor, settings, speak=_speaker(settings), **options)


def sft_work(model: Any, processor: VotProcessor, settings: SftTraining) -> Work:
    """Return what a step of `train_sft` computes."""
    return conversation_work(model, processor, settings, _speaker(settings))


def _speaker(settings: SftTraining) -> Speaker:
    short = settings.thoughts == "short"
    return partial(reason, frames=settings.frames, questions=settings.questions, short=short)


def sft_metrics(model: Any, processor: VotProcessor, clips: int, seed: int = 0) -> dict[str, float]:
    """Measure on held-out clips ("val"), one balanced question each.

    Returns:
        nats: per token of the true traces; format: share of replies that are a thought and an answer as a whole;
        accuracy: share of the answers that are right, and accuracy by kind of question.
    """
    batches = ConversationBatches(processor, reason, seed, _EVAL_BATCH, split="val")
    asked = generate_questions("val", clips, seed=seed)
    items = [Asked(render(a.episode), a.episode.stsg, a.question.text, a.question.candidates) for a in asked]
    read = [read_reply(reply) for reply in replies(model, processor, items)]
    return {
        "nats": nats_per_token(model, batches, clips),
        "format": sum(pair is not None for pair in read) / len(read),
        **_accuracy([a.question for a in asked], [pair[1] if pair else "" for pair in read]),
    }


def _accuracy(questions: Sequence[Any], answers: Sequence[str]) -> dict[str, float]:
    found = accuracy_by_kind(questions, answers)
    return {"accuracy": found.pop("all"), **{name: value for name, value in found.items() if name != "flip"}}
