"""The stages of GRPO (Shao et al. 2024, DeepSeekMath) on the video-language model, through TRL's trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vot_kernels.data.digitworld.truth import VOCABULARY
from vot_kernels.extras import imports_for
from vot_kernels.models.vot import PLACEHOLDERS, VotProcessor
from vot_kernels.scene_graph.graph import Vocabulary
from vot_kernels.train import rewards
from vot_kernels.train.estimate import Work
from vot_kernels.train.loop import Measure, Report, no_report
from vot_kernels.train.optimization import in_precision
from vot_kernels.train.rewards import with_options
from vot_kernels.train.rl.graphs import GraphMemory
from vot_kernels.train.rl.own_questions import RowsOf, rows_of_file
from vot_kernels.train.rl.questions import Rows, as_dataset
from vot_kernels.train.rl.settings import GrpoPerception, GrpoTraining
from vot_kernels.train.rl.trainer import EachStep, Resumable, Run, arguments, mean_rewards, train
from vot_kernels.train.sft.questions import data_identity
from vot_kernels.train.vlm.answers import prompt_inputs

Reward = Callable[..., list[float | None]]
_BATCH = 8
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 of text


@dataclass(frozen=True)
class Guest:
    """A model of transformers.

    Attributes:
        greedy: `greedy(model, processor, prompts, tokens)` returns its replies of at most so many tokens.
        unsaid: the tokens that no reply may have, because images stand for them.
    """

    greedy: Callable[[Any, Any, Sequence[Any], int], Sequence[str]]
    unsaid: Sequence[int]


@dataclass(frozen=True)
class Data:
    """What is asked, and what the rewards must know of it.

    Attributes:
        rows: `rows(split, count, seed)` returns rows of the split "train" or "val", as `questions.Rows` are.
        vocabulary: the words of scene graphs, None for any.
        identity: what tells the questions from others, for resuming.
    """

    rows: RowsOf
    vocabulary: Vocabulary | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


def digitworld(settings: GrpoTraining, processor: VotProcessor) -> Data:
    """Return questions about DigitWorld, with the true graph as text and as the tokens of a model that has them.

    Perception is of the frames alone.
    """

    def rows(split: str, count: int, seed: int) -> Rows:
        reads = reads_graphs(settings)
        return Rows(split, count, seed, settings.frames, reads, reads and processor.tokens_per_track > 0)

    return Data(rows, VOCABULARY)


def own_questions(
    data: Path, held_out: float, settings: GrpoTraining, max_pixels: int, tokens: bool = False
) -> Data:
    """Return the questions of a file about a user's own videos; errors as in `split_for_replies`.

    tokens: whether the model also reads graphs as tokens.
    """
    reads = reads_graphs(settings)
    rows = rows_of_file(data, held_out, settings.frames, max_pixels, reads, reads and tokens)
    return Data(rows, None, data_identity(data, held_out))


def reads_graphs(settings: GrpoTraining) -> bool:
    """Whether the model reads scene graphs in a stage; perception is of the frames alone."""
    return not isinstance(settings, GrpoPerception)


def rewards_of(
    settings: GrpoTraining, preference: Reward | None = None, vocabulary: Vocabulary | None = VOCABULARY
) -> dict[str, Reward]:
    """Return the rewards of a stage by name; those of weight 0 are left out.

    Args:
        settings: which rewards there are, and their options.
        preference: the score of a reward model, for the stage that has one.
        vocabulary: the words of scene graphs, None for any.
    """
    known = {
        name: with_options(getattr(rewards, name), vocabulary=vocabulary)
        for name in ("accuracy", "form", "grounding", "consistency")
    }
    known["temporal"] = with_options(rewards.temporal, vocabulary=vocabulary, sigma_s=settings.sigma_s)
    if preference is not None:
        known["preference"] = preference
    return {name: known[name] for name, weight in settings.weights.items() if weight}


def train_grpo(
    out: Path,
    model: Any,
    processor: Any,
    settings: GrpoTraining,
    *,
    preference: Reward | None = None,
    data: Data | None = None,
    guest: Guest | None = None,
    save_every: int = 20,
    stop_at: int | None = None,
    report: Report = no_report,
    validate: Measure | None = None,
) -> int:
    """Train the projector and the language model or its adapters in place, or resume; return the steps done.

    Args:
        out: folder of the checkpoints, which hold the trained parameters alone.
        model: the video-language model, on its device; its other parameters stay as they are.
        processor: of the model.
        settings: of the stage.
        preference: the score of a reward model, for the stage that has one.
        data: other questions than those about DigitWorld.
        guest: what must be known of a model of transformers, whose adapters alone are trained.
        save_every: steps between two checkpoints.
        stop_at: end early after this step, with a checkpoint.
        report: called after every step with what TRL logs of it.
        validate: measures the model during training.

    Raises:
        ImportError: trl is not installed.
        ValueError: a checkpoint in `out` has other settings or began with other weights.
        RuntimeError: other parameters are trained than the stage should train.
        KeyboardInterrupt: Ctrl-C ended the run after a step.
    """
    with imports_for("GRPO", "rl"):
        from trl import GRPOConfig, GRPOTrainer

    class Trainer(Resumable, GRPOTrainer):
        """Rows are taken in their order by `shuffle_dataset`, since each is repeated once per reply."""

        _get_train_sampler = GRPOTrainer._get_train_sampler

    data = data or digitworld(settings, processor)
    known = {"reward_model": getattr(preference, "fingerprint", None), **data.identity}
    run = Run(out, model, settings, ("lora",) if guest else None, **known)
    scored = rewards_of(settings, preference, data.vocabulary)
    rows = data.rows("train", settings.steps * settings.batch_size, settings.seed)
    memory = GraphMemory.of(processor) if isinstance(processor, VotProcessor) else None
    replies = settings.batch_size * settings.generations
    trainer = Trainer(
        model,
        list(scored.values()),
        args=GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=replies // settings.accumulation,
            num_generations=settings.generations,
            max_completion_length=settings.max_reply_tokens,
            temperature=settings.temperature,
            beta=0.0,
            shuffle_dataset=False,
            save_steps=save_every,
            reward_weights=[settings.weights[name] for name in scored],
            generation_kwargs={"suppress_tokens": guest.unsaid if guest else _placeholders(processor)},
            **arguments(settings, next(model.parameters()).device.type),
        ),
        train_dataset=as_dataset(rows),
        processing_class=memory or processor,
        optimizers=(run.optimizer, run.schedule),
    )
    each = EachStep(run, report, validate, stop_at)
    trainer.add_callback(each)
    handle = memory.attach(model) if memory is not None else None
    try:
        return train(trainer, run, each)
    finally:
        if handle is not None:
            handle.remove()


def grpo_metrics(
    model: Any,
    processor: VotProcessor,
    clips: int,
    *,
    settings: GrpoTraining,
    preference: Reward | None = None,
    data: Data | None = None,
    guest: Guest | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean rewards of greedy replies about held-out clips ("val"), and the mean of their weighted sums."""
    data = data or digitworld(settings, processor)
    rows = data.rows("val", clips, seed)
    scored = rewards_of(settings, preference, data.vocabulary)
    found: dict[str, list[float | None]] = {name: [] for name in scored}
    for start in range(0, len(rows), _BATCH):
        taken = rows.rows(start, start + _BATCH)
        prompts = [row["prompt"] for row in taken]
        greedy = guest.greedy if guest else _greedy
        said = greedy(model, processor, prompts, settings.max_reply_tokens)
        columns = {name: [row[name] for row in taken] for name in taken[0]}
        for name, reward in scored.items():
            found[name] += reward(completions=said, **columns)
    totals = [
        sum(settings.weights[name] * (value or 0.0) for name, value in zip(found, values, strict=True))
        for values in zip(*found.values(), strict=True)
    ]
    return {"reward": sum(totals) / len(totals), **mean_rewards(found)}


def grpo_work(
    model: Any,
    processor: Any,
    settings: GrpoTraining,
    *,
    data: Data | None = None,
    inputs_of: Callable[[Any, Any, Sequence[Any]], Mapping[str, Tensor]] | None = None,
) -> Work:
    """Return what a step computes: replies to draw, and a pass over them of the greatest length.

    `inputs_of(model, processor, prompts)` returns the inputs of a model of transformers.
    """
    read = inputs_of or (lambda _, processor, prompts: prompt_inputs(processor, prompts))
    data = data or digitworld(settings, processor)
    rows = data.rows("train", settings.batch_size, settings.seed)
    asked = [row["prompt"] for row in rows.rows(0, len(rows)) for _ in range(settings.generations)]
    part = read(model, processor, asked[: len(asked) // settings.accumulation])
    ids = part["input_ids"]
    replies = {
        "input_ids": processor.tokenizer.eos_token_id,
        "attention_mask": 1,
        **dict.fromkeys(_TOKEN_TYPES, 0),
    }
    inputs: dict[str, Tensor] = {}
    for name, value in part.items():
        if name in replies:
            reply = value.new_full((len(ids), settings.max_reply_tokens), replies[name])
            value = torch.cat([value, reply], 1)
        inputs[name] = value.to(model.device)

    def loss() -> Tensor:
        """How likely the replies are, which a step then weighs."""
        tokens = settings.max_reply_tokens
        with in_precision(model, settings.precision):
            logits = model(**inputs, use_cache=False, logits_to_keep=tokens + 1).logits[:, :-1]
        drawn = inputs["input_ids"][:, -tokens:]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), drawn.flatten())

    return Work(loss, settings.accumulation, read(model, processor, asked), settings.max_reply_tokens)


def _placeholders(processor: VotProcessor) -> list[int]:
    """Return the tokens that no reply may have, because nothing stands for them."""
    return processor.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))


@torch.no_grad()
def _greedy(
    model: Any, processor: VotProcessor, prompts: Sequence[Sequence[Mapping[str, Any]]], tokens: int
) -> list[str]:
    inputs = prompt_inputs(processor, prompts).to(model.device)
    new = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=_placeholders(processor)
    )
    return processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
