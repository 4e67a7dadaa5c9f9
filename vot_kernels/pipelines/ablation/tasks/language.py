"""A trained video-language model, as it is and after stages of GRPO; and the answers of whole systems."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vot_kernels.data.digitworld.episode import Episode
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.files import read_json_lines
from vot_kernels.pipelines.ablation.tasks.base import Changes, Sources, Task
from vot_kernels.train.loop import Report
from vot_kernels.train.rl.grpo import grpo_metrics, train_grpo
from vot_kernels.train.rl.preferences import PreferenceReward, build_reward_model, train_preference
from vot_kernels.train.rl.settings import (
    GrpoPerception,
    GrpoPreference,
    GrpoReasoning,
    GrpoTraining,
    PreferenceTraining,
)
from vot_kernels.train.sft.stage import reason
from vot_kernels.train.vlm.answers import Asked, replies
from vot_kernels.train.vlm.conversations import Conversation, ConversationBatches, render
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.train.vlm.stage import nats_per_token

_STAGES: dict[str, Callable[..., GrpoTraining]] = {
    "perception": GrpoPerception,
    "reasoning": GrpoReasoning,
    "preference": GrpoPreference,
}
_JUDGE_STEPS = 100


class OfModel(Task):
    """What begins with a trained video-language model."""

    def lacks(self, changes: Changes, sources: Sources) -> str | None:
        return "--vlm" if sources.vlm is None else None


class Reading(OfModel):
    """A trained video-language model reads a true graph as tokens, as text, as both, or not at all."""

    clips = 7

    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        """Measure how likely true replies are, and how many of its own are right, in bfloat16."""
        assert sources.vlm is not None
        model, processor = _vlm(sources.vlm)
        reads = changes.get("reads", ("tokens", "text"))

        def speak(episode: Episode, rng: Any) -> Conversation:
            return as_read(reason(episode, rng), reads)

        batches = ConversationBatches(processor, speak, seed, 2, split="val")
        asked = generate_questions("val", self.clips, seed=seed)
        items = [
            Asked(render(a.episode), a.episode.stsg, a.question.text, a.question.candidates, reads)
            for a in asked
        ]
        with torch.autocast("cpu", torch.bfloat16):
            said = [read_reply(reply) for reply in replies(model, processor, items)]
            nats = nats_per_token(model, batches, self.clips)
        right = [
            pair is not None and pair[1] == a.question.answer for pair, a in zip(said, asked, strict=True)
        ]
        return {"nats": nats, "accuracy": sum(right) / len(right)}


class Reinforcement(OfModel):
    """A trained video-language model goes through stages of GRPO, one after the other."""

    steps, clips = 100, 112

    def __init__(self) -> None:
        self._done: tuple[Any, ...] = ()
        """What was trained last, and its weights: the next variant goes on from them."""
        self._weights: dict[str, Tensor] = {}

    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        """Train the stages for `steps` each, and measure greedy replies about the same clips for all seeds.

        The replies are rewarded as in grpo-reasoning, and by the reward model, which has learnt with the same seed;
        `seen_grounding` is of replies to frames alone.
        """
        assert sources.vlm is not None
        judge = _judge(sources.vlm, seed)
        model, processor = load_vlm(sources.vlm)
        start, stages = (sources.vlm, seed, steps), tuple(changes["stages"])
        known = next((n for n in range(len(stages), 0, -1) if self._done == (start, stages[:n])), 0)
        if known:
            model.load_state_dict(self._weights)
        for number, name in enumerate(stages[known:], known + 1):
            settings = _STAGES[name](steps=steps, warmup=min(10, steps), seed=seed)
            preference = judge if name == "preference" else None
            train_grpo(folder / name, model, processor, settings, preference=preference, report=report)
            self._done = (start, stages[:number])
            self._weights = {key: value.clone() for key, value in model.state_dict().items()}
        model.eval()
        read = grpo_metrics(model, processor, self.clips, settings=_STAGES["preference"](), preference=judge)
        seen = grpo_metrics(model, processor, self.clips, settings=_STAGES["perception"]())
        return {**read, "seen_grounding": seen["grounding"]}


class Answers(Task):
    """The bundled pipeline has answered questions, each third of which stands for a seed."""

    seeds = 3

    def lacks(self, changes: Changes, sources: Sources) -> str | None:
        known = any(changes["system"] in _answers(file)[0]["answers"] for file in sources.answers)
        return None if known else "--answers"

    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        """Return the share of right answers of the system."""
        system = changes["system"]
        rows = next(rows for rows in map(_answers, sources.answers) if system in rows[0]["answers"])
        right = [row["answers"][system] == row["question"]["answer"] for row in rows[seed :: self.seeds]]
        return {"accuracy": sum(right) / len(right)}


def as_read(conversation: Conversation, reads: Sequence[str]) -> Conversation:
    """Return a conversation whose graph is read as tokens, as text, both, or neither."""
    first, *others = conversation.turns
    if "text" not in reads:
        first = first._replace(prompt=first.prompt.partition("</stsg>\n")[2] or first.prompt)
    graph = conversation.graph if "tokens" in reads else None
    return replace(conversation, turns=[first, *others], graph=graph)


@cache
def _vlm(folder: Path) -> tuple[Any, Any]:
    return load_vlm(folder)


@cache
def _judge(vlm: Path, seed: int) -> PreferenceReward:
    """Return a reward model that has learnt from a part of the synthetic preferences."""
    judge, tokenizer = build_reward_model(*_vlm(vlm), seed)
    with TemporaryDirectory() as folder:
        train_preference(Path(folder), judge, tokenizer, PreferenceTraining(steps=_JUDGE_STEPS, seed=seed))
    return PreferenceReward(judge, tokenizer)


@cache
def _answers(file: Path) -> list[dict[str, Any]]:
    found = read_json_lines(file, mend=False)
    rows = [row for row in found if isinstance(row, dict) and "answers" in row]
    if not rows:
        raise ValueError(f"{file} must have rows of `vot eval digitworld`, got none.")
    return rows
