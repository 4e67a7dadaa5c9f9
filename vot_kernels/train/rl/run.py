"""`vot train grpo-…` and `vot train preference`: the stages of reinforcement learning, in the frame of every stage."""

from functools import partial
from pathlib import Path
from typing import Any

from vot_kernels.models.checkpoint import on_device
from vot_kernels.train.rl.grpo import grpo_metrics, grpo_work, train_grpo
from vot_kernels.train.rl.preferences import (
    RULES,
    SOURCE,
    PreferenceReward,
    build_reward_model,
    load_reward_model,
    preference_metrics,
    preference_work,
    train_preference,
)
from vot_kernels.train.rl.settings import GrpoTraining, PreferenceTraining
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
) -> str:
    """Run one of the stages of GRPO on `checkpoint`, a video-language model; see `run_stage`.

    `reward_model` is the model of the stage preference, for the stage that uses one.
    """
    preference = None
    folders, words = {"checkpoint": checkpoint}, [str(checkpoint)]
    if reward_model is not None:
        scorer, tokenizer = load_reward_model(reward_model)
        preference = PreferenceReward(on_device(scorer, device), tokenizer)
        folders["reward_model"] = reward_model
        words += ["--reward-model", str(reward_model)]
    stage = VlmStage(
        name,
        partial(train_grpo, preference=preference),
        partial(grpo_metrics, settings=settings, preference=preference),
        grpo_work,
    )
    return run_stage(
        stage,
        out,
        settings,
        Origin(folders, words),
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
) -> str:
    """Train a reward model from the language model of `checkpoint`, a video-language model; see `run_stage`."""

    def load() -> tuple[Any, Any]:
        return build_reward_model(*load_vlm(checkpoint), settings.seed)

    stage = VlmStage("preference", train_preference, preference_metrics, preference_work)
    origin = Origin({"checkpoint": checkpoint}, [str(checkpoint)])
    notes = {"preferences": SOURCE, "rules": list(RULES)}
    return run_stage(stage, out, settings, origin, load, eval_clips, device, dry_run, notes)
