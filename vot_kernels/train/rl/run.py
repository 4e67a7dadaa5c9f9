"""`vot train grpo-…` and `vot train preference`: the stages of reinforcement learning, in the frame of every stage."""

from functools import partial
from pathlib import Path
from typing import Any

from vot_kernels.train.estimate import Work
from vot_kernels.train.rl.grpo import Data, grpo_metrics, grpo_work, own_questions, train_grpo
from vot_kernels.train.rl.own_questions import split_for_replies
from vot_kernels.train.rl.preferences import (
    RULES,
    SOURCE,
    build_reward_model,
    load_preference_reward,
    preference_metrics,
    preference_work,
    train_preference,
)
from vot_kernels.train.rl.settings import GrpoTraining, PreferenceTraining
from vot_kernels.train.sft.questions import data_identity
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.train.vlm.run import Origin, VlmStage, run_stage


def run_grpo(
    name: str,
    out: Path,
    checkpoint: Path,
    settings: GrpoTraining,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
    reward_model: Path | None = None,
    data: Path | None = None,
    held_out: float = 0.1,
) -> str:
    """Run one of the stages of GRPO on `checkpoint`, a video-language model; see `run_stage`.

    Args:
        reward_model: the model of the stage preference, for the stage that uses one.
        data: JSONL of questions about a user's own videos, in place of those about DigitWorld.
        held_out: share of its videos to measure with, where the file has no splits.
    """
    preference = None
    folders, words = {"checkpoint": checkpoint}, [str(checkpoint)]
    if reward_model is not None:
        preference = load_preference_reward(reward_model, device)
        folders["reward_model"] = reward_model
        words += ["--reward-model", str(reward_model)]
    identity: dict[str, Any] = {}
    if data is not None:
        identity = data_identity(data, held_out)
        split_for_replies(data, held_out)  # what is wrong with the file is found before anything is loaded
        words += ["--data", str(data), "--held-out", str(held_out)]

    def given(processor: Any) -> Data | None:
        if data is None:
            return None
        tokens = processor.tokens_per_track > 0
        return own_questions(data, held_out, settings, processor.image_processor.max_pixels, tokens)

    def train(out: Path, model: Any, processor: Any, settings: GrpoTraining, **options: Any) -> int:
        asked = given(processor)
        return train_grpo(out, model, processor, settings, preference=preference, data=asked, **options)

    def measure(model: Any, processor: Any, clips: int) -> dict[str, float]:
        asked = given(processor)
        return grpo_metrics(model, processor, clips, settings=settings, preference=preference, data=asked)

    def work(model: Any, processor: Any, settings: GrpoTraining) -> Work:
        return grpo_work(model, processor, settings, data=given(processor))

    stage = VlmStage(name, train, measure, work)
    return run_stage(
        stage,
        out,
        settings,
        Origin(folders, words, identity),
        lambda: load_vlm(checkpoint),
        eval_clips,
        device,
        dry_run,
    )


def run_preference(
    out: Path,
    checkpoint: Path,
    settings: PreferenceTraining,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
    data: Path | None = None,
    held_out: float = 0.1,
) -> str:
    """Train a reward model from the language model of `checkpoint`, a video-language model; see `run_stage`.

    `data` and `held_out` are as in `run_grpo`; of a user's own questions, too, the pairs are made by rules.
    """
    words, identity = [str(checkpoint)], {}
    train = measure = None
    if data is not None:
        identity = data_identity(data, held_out)
        train, measure = split_for_replies(data, held_out)
        words += ["--data", str(data), "--held-out", str(held_out)]

    def load() -> tuple[Any, Any]:
        return build_reward_model(*load_vlm(checkpoint), settings.seed)

    stage = VlmStage(
        "preference",
        partial(train_preference, questions=train, known=identity),
        partial(preference_metrics, questions=measure),
        partial(preference_work, questions=train),
    )
    origin = Origin({"checkpoint": checkpoint}, words, identity)
    notes = {"preferences": SOURCE, "rules": list(RULES)}
    return run_stage(stage, out, settings, origin, load, eval_clips, device, dry_run, notes)
