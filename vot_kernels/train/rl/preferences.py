"""Synthetic preferences: true traces against traces that a rule has spoilt, and the reward model that learns them.

No person has judged these pairs. They say what the rules say: that an answer should be right, its graph true, its form
whole, and its thought no longer than it needs to be.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vot_kernels.data.digitworld.questions import Question
from vot_kernels.data.digitworld.traces import ask, evidence, evidence_text, read_reply, write_trace
from vot_kernels.data.questions.file import QuestionFile
from vot_kernels.data.questions.question import VideoQuestion
from vot_kernels.extras import imports_for
from vot_kernels.models.checkpoint import check_reward_model, on_device
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.scene_graph.graph import STSG, Tracklet
from vot_kernels.scene_graph.text import outside_blocks
from vot_kernels.train.checkpoint import fingerprint
from vot_kernels.train.estimate import Work
from vot_kernels.train.loop import Measure, Report, no_report
from vot_kernels.train.optimization import in_precision
from vot_kernels.train.rewards.reading import Completion, text_of
from vot_kernels.train.rl.questions import asked_about
from vot_kernels.train.rl.settings import PreferenceTraining
from vot_kernels.train.rl.trainer import EachStep, Resumable, Run, arguments, mean_rewards, train
from vot_kernels.train.sft.questions import asked_of, shuffled
from vot_kernels.train.sft.replies import evidence_of, reply_to
from vot_kernels.train.vlm.answers import first_prompt

SOURCE = "synthetic"
"""The label of every pair."""
_LATER = 4  # frames by which an event is moved
_TIMES = 4  # so often is a thought repeated
_BATCH = 16


@dataclass(frozen=True)
class Pair:
    """Two replies to the same prompt.

    Attributes:
        prompt: what the user says.
        chosen: the true trace.
        rejected: the trace that a rule has spoilt.
        rule: name of the rule.
        source: who prefers one to the other: "synthetic".
    """

    prompt: str
    chosen: str
    rejected: str
    rule: str
    source: str = SOURCE


@dataclass(frozen=True)
class Trace:
    """A true reply, and what rules need to spoil it.

    Attributes:
        reply: as a whole.
        graph: what of the scene graph it states; None if it states none.
        thought: its other words.
        answer: the answer.
        candidates: the answers to choose from; empty if there are none.
        clip: the whole scene graph of the clip; None if it is not known.
        write: returns such a part of a graph as text.
    """

    reply: str
    graph: STSG | None
    thought: str
    answer: str
    candidates: Sequence[str]
    clip: STSG | None
    write: Callable[[STSG], str]

    def changed(
        self, *, graph: STSG | None = None, thought: str | None = None, answer: str | None = None
    ) -> str:
        """Return the reply with another graph, thought or answer."""
        stated = graph or self.graph
        parts = ("" if stated is None else self.write(stated), self.thought if thought is None else thought)
        told = "\n".join(filter(None, parts))
        return f"<think>{told}</think><answer>{self.answer if answer is None else answer}</answer>"


def wrong_answer(trace: Trace, rng: np.random.Generator) -> str | None:
    """Give another candidate as the answer; None without one."""
    others = [candidate for candidate in trace.candidates if candidate != trace.answer]
    return trace.changed(answer=others[rng.integers(len(others))]) if others else None


def wrong_objects(trace: Trace, rng: np.random.Generator) -> str | None:
    """State an object by the name of another one of the clip, or of none; None for a graph without objects."""
    if trace.graph is None or trace.clip is None or not trace.graph.tracklets:
        return None
    tracks = list(trace.graph.tracklets)
    which = int(rng.integers(len(tracks)))
    held = {track.name for track in tracks}
    others = [t for t in trace.clip.tracklets if t.name not in held]
    other = others[rng.integers(len(others))] if others else _next_digit(tracks[which])
    if other is None:
        return None
    tracks[which] = replace(tracks[which], label=other.label, attributes=other.attributes)
    return trace.changed(graph=replace(trace.graph, tracklets=tuple(tracks)))


def wrong_times(trace: Trace, rng: np.random.Generator) -> str | None:
    """State every event at another time; None without events, or if the clip has no other time."""
    if trace.graph is None or trace.clip is None or not trace.graph.events or trace.clip.num_frames < 2:
        return None
    frames = trace.clip.num_frames
    later = _LATER if frames > _LATER else 1
    moved = [replace(event, t=(event.t + later) % frames) for event in trace.graph.events]
    return trace.changed(graph=replace(trace.graph, events=tuple(moved)))


def no_graph(trace: Trace, rng: np.random.Generator) -> str | None:
    """Leave out the graph; None without one."""
    if trace.graph is None:
        return None
    return f"<think>{trace.thought}</think><answer>{trace.answer}</answer>"


def unclosed(trace: Trace, rng: np.random.Generator) -> str | None:
    """Leave out the end of the thought."""
    return trace.reply.replace("</think>", "")


def repeated(trace: Trace, rng: np.random.Generator) -> str | None:
    """Say the same thought several times; None without one."""
    return trace.changed(thought=" ".join([trace.thought] * _TIMES)) if trace.thought else None


RULES: dict[str, Callable[[Trace, np.random.Generator], str | None]] = {
    rule.__name__: rule for rule in (wrong_answer, wrong_objects, wrong_times, no_graph, unclosed, repeated)
}
"""What spoils a true trace."""


def all_pairs(split: str, clips: int, seed: int) -> Iterator[Pair]:
    """Yield a pair per rule that applies to a question, for questions about so many clips of a split."""
    for index in range(clips):
        item = asked_about(split, index, seed)
        question, stsg = item.question, item.episode.stsg
        prompt = first_prompt(stsg, ask(question.text, question.candidates))
        yield from _spoilt(prompt, trace_of(question, stsg), item.episode.rng("preferences"))


def own_pairs(questions: QuestionFile, count: int, seed: int) -> Iterator[Pair]:
    """Yield a pair per rule that applies, for so many of a user's own questions; see `split_for_replies`."""
    for index in range(count):
        question = shuffled(questions, seed, index)
        prompt = first_prompt(question.stsg, asked_of(question))
        yield from _spoilt(prompt, own_trace(question), np.random.default_rng([seed, index]))


def _spoilt(prompt: str, trace: Trace, rng: np.random.Generator) -> Iterator[Pair]:
    for name, rule in RULES.items():
        spoilt = rule(trace, rng)
        if spoilt is not None:
            yield Pair(prompt, trace.reply, spoilt, name)


def trace_of(question: Question, stsg: STSG) -> Trace:
    """Return the true trace of a question about DigitWorld."""
    reply = write_trace(question, stsg)
    parts = read_reply(reply)
    return Trace(
        reply,
        evidence(question, stsg),
        outside_blocks(parts[0] if parts else ""),
        question.answer,
        question.candidates,
        stsg,
        lambda graph: evidence_text(graph, question),
    )


def own_trace(question: VideoQuestion) -> Trace:
    """Return the reply that a model shall learn to a question about a user's own video, see `reply_to`."""
    found = evidence_of(question)
    return Trace(
        reply_to(question),
        None if found is None else found.graph,
        "" if found is None else found.reason,
        question.answer,
        question.candidates,
        question.stsg,
        lambda graph: graph.to_text(every=1),
    )


def draw_pairs(count: int, seed: int, questions: QuestionFile | None = None) -> list[Pair]:
    """Return so many training pairs, in random order: about DigitWorld, or about a user's own questions."""
    if questions is None:
        found = list(all_pairs("train", -(-count // 4), seed))  # at least four rules apply to every question
    else:
        found = list(own_pairs(questions, count, seed))  # at least one does
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[n] for n in order]


def build_reward_model(
    vlm: VotForConditionalGeneration, processor: VotProcessor, seed: int
) -> tuple[Any, Any]:
    """Return a copy of the language model with one score as its output, and its tokenizer.

    It reads what is written, the scene graph's text included, and sees no frames.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    config = copy.deepcopy(vlm.config.text_config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(vlm.model.language_model.state_dict())
    return model, tokenizer


def load_reward_model(folder: Path) -> tuple[Any, Any]:
    """Load a reward model in float32, for inference, and its tokenizer.

    Raises:
        FileNotFoundError: the folder lacks a file that every checkpoint has.
        ValueError: it is another kind of checkpoint.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_reward_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


class PreferenceReward:
    """The score of a reward model in [0, 1], as a reward; it needs the column `asked`, which is what the user says."""

    __name__ = "preference"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.fingerprint = fingerprint(model)

    def __call__(
        self, completions: Sequence[Completion], asked: Sequence[str], **_: Any
    ) -> list[float | None]:
        """Return the logistic function of the scores."""
        pairs = zip(asked, map(text_of, completions), strict=True)
        return torch.sigmoid(score(self.model, self.tokenizer, list(pairs))).tolist()


def load_preference_reward(folder: Path, device: str) -> PreferenceReward:
    """Return the reward of the reward model in a folder; errors as in `load_reward_model`."""
    model, tokenizer = load_reward_model(folder)
    return PreferenceReward(on_device(model, device), tokenizer)


@torch.no_grad()
def score(model: Any, tokenizer: Any, replies: Sequence[tuple[str, str]]) -> Tensor:
    """Return the scores of replies, given as pairs of what the user says and what is replied, float32 `[replies]`."""
    found = []
    for start in range(0, len(replies), _BATCH):
        batch = _padded([_tokens(tokenizer, *pair) for pair in replies[start : start + _BATCH]], tokenizer)
        found.append(model(**{name: value.to(model.device) for name, value in batch.items()}).logits[:, 0])
    return torch.cat(found).float().cpu()


def preference_metrics(
    model: Any, tokenizer: Any, clips: int, seed: int = 0, *, questions: QuestionFile | None = None
) -> dict[str, float]:
    """Return the share of held-out pairs ("val") whose true trace has the higher score, of all and by rule.

    They are about DigitWorld, or about at most `clips` of a user's own `questions`.
    """
    if questions is None:
        pairs = list(all_pairs("val", clips, seed))
    else:
        pairs = list(own_pairs(questions, min(clips, len(questions)), seed))
    chosen = score(model, tokenizer, [(pair.prompt, pair.chosen) for pair in pairs])
    rejected = score(model, tokenizer, [(pair.prompt, pair.rejected) for pair in pairs])
    right = (chosen > rejected).tolist()
    rules = {
        name: [float(r) for r, pair in zip(right, pairs, strict=True) if pair.rule == name] for name in RULES
    }
    return {
        "accuracy": float(np.mean(right)),
        **mean_rewards(rules),
    }


def train_preference(
    out: Path,
    model: Any,
    tokenizer: Any,
    settings: PreferenceTraining,
    *,
    questions: QuestionFile | None = None,
    known: Mapping[str, Any] | None = None,
    save_every: int = 50,
    stop_at: int | None = None,
    report: Report = no_report,
    validate: Measure | None = None,
) -> int:
    """Train the reward model in place by TRL's RewardTrainer, or resume; return the steps done.

    The loss is that of Bradley and Terry. `questions` are a user's own, and `known` tells them from others. See
    `train_grpo` for the other options and the errors.
    """
    with imports_for("A reward model", "rl"):
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

    class Trainer(Resumable, RewardTrainer):
        """Of TRL."""

    run = Run(out, model, settings, **(known or {}))
    rows = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in _tokenized(
            tokenizer, settings.steps * settings.batch_size, settings.seed, questions
        )
    ]
    trainer = Trainer(
        model,
        args=RewardConfig(
            output_dir=str(out),
            per_device_train_batch_size=settings.part_size,
            max_length=None,
            save_steps=save_every,
            **arguments(settings, next(model.parameters()).device.type),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(run.optimizer, run.schedule),
    )
    each = EachStep(run, report, validate, stop_at)
    trainer.add_callback(each)
    return train(trainer, run, each)


def preference_work(
    model: Any, tokenizer: Any, settings: PreferenceTraining, *, questions: QuestionFile | None = None
) -> Work:
    """Return what a step computes."""
    pairs = _tokenized(tokenizer, settings.batch_size, settings.seed, questions)
    both = [ids for pair in pairs[: settings.part_size] for ids in pair]
    inputs = {name: value.to(model.device) for name, value in _padded(both, tokenizer).items()}

    def loss() -> Tensor:
        with in_precision(model, settings.precision):
            scores = model(**inputs, use_cache=False).logits.float()
        chosen, rejected = scores.unflatten(0, (-1, 2)).unbind(1)
        return -nn.functional.logsigmoid(chosen - rejected).mean()

    return Work(loss, settings.accumulation)


def _next_digit(track: Tracklet) -> Tracklet | None:
    """Return a digit that is one more; None for another object."""
    *words, number = track.label.split() or [""]
    return (
        replace(track, label=" ".join([*words, str((int(number) + 1) % 10)])) if number.isdecimal() else None
    )


def _tokenized(
    tokenizer: Any, count: int, seed: int, questions: QuestionFile | None
) -> list[tuple[list[int], list[int]]]:
    return [
        (_tokens(tokenizer, pair.prompt, pair.chosen), _tokens(tokenizer, pair.prompt, pair.rejected))
        for pair in draw_pairs(count, seed, questions)
    ]


def _tokens(tokenizer: Any, prompt: str, reply: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def _padded(rows: Sequence[Sequence[int]], tokenizer: Any) -> Mapping[str, Tensor]:
    """Return token ids and mask of rows padded on the right; the score is read at the last token."""
    return tokenizer.pad({"input_ids": list(rows)}, padding_side="right", return_tensors="pt")
