"""Small encoders, trained for a few steps and measured."""

import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.cost import encoder_cost
from vot_kernels.models.encoder.modeling import VotEncoder
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.pipelines.ablation.padding import PaddedEncoder
from vot_kernels.pipelines.ablation.tasks.base import Changes, Sources, Step, Task, seconds_of
from vot_kernels.train.encoder import stage as encoder_stage
from vot_kernels.train.encoder.metrics import encoder_metrics
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.loop import Report
from vot_kernels.train.perception.batches import (
    TRAIN_SIZES,
    Batch,
    TrainingBatches,
    dense_targets,
    digitworld_config,
)
from vot_kernels.train.perception.metrics import perception_metrics
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.perception.stage import make_processor, perception_losses, train_perception

_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "expert_rank": 16,
    "projection_size": 64,
}
_FRAMES = 8
_TRAINING = 3  # a step backward takes twice the operations of a step forward
_ROUNDS = 5  # in which the times of two encoders are measured in turns
_MIXED_FRAMES = (2, 4, 6, 8, 12, 16)  # clips of the batch whose steps are timed


class Perception(Task):
    """A small encoder with the head of scene graphs learns to find, name and follow digits."""

    steps, clips = 80, 32
    batch_size = 4

    def settings(self, seed: int = 0, steps: int = 1) -> PerceptionTraining:
        return PerceptionTraining(
            steps=steps,
            batch_size=self.batch_size,
            num_frames=_FRAMES,
            warmup=min(20, steps),
            seed=seed,
        )

    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        """Train the first stage alone, which sees pixels."""
        model = train_perception(
            folder,
            self.settings(seed, steps),
            stop_at=steps,
            report=report,
            config=perception_config(changes),
        )
        processor = make_processor(model)
        found = {"step_time": step_time(changes)}
        for split in ("test", "resolution"):
            seen = perception_metrics(model, processor, split, self.clips, num_frames=_FRAMES)
            found |= {
                f"{split}_loss": held_out_loss(model, processor, split, self.clips),
                f"{split}_center_px": seen["center_error_px"],
                f"{split}_presence": seen["presence"],
                f"{split}_colour": seen["attribute_accuracy"],
            }
        return found

    def cost(self, changes: Changes) -> dict[str, int]:
        return training_cost(encoder_config(changes), (_FRAMES, 8, 8), self.batch_size)

    def step(self, changes: Changes) -> Step:
        model = VotPerceptionModel(perception_config(changes)).train()
        batch = TrainingBatches(0, self.batch_size, num_frames=_FRAMES)[0]
        return partial(_backward, model, partial(perception_losses, model, make_processor(model), batch))


class Encoder(Task):
    """A small encoder learns from the bundled one, and from captions."""

    steps, clips = 50, 48
    batch_size = 8

    def settings(self, changes: Changes, seed: int = 0, steps: int = 1) -> EncoderTraining:
        small = {"caption_width": 48, "caption_layers": 1, "h264_share": 0.0, "num_frames": _FRAMES}
        return EncoderTraining(
            steps=steps,
            batch_size=self.batch_size,
            warmup=min(20, steps),
            seed=seed,
            **{**small, **changes.get("training", {})},
        )

    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        settings, config = self.settings(changes, seed, steps), encoder_config(changes)
        model = encoder_stage.train_encoder(
            folder, settings, config, _teacher(), report=report, kind=encoder_class(changes)
        )
        return encoder_metrics(model, _teacher(), settings, self.clips) | {"step_time": step_time(changes)}

    def cost(self, changes: Changes) -> dict[str, int]:
        size = (10, 8) if changes.get("kind") == "padded" else (8, 8)  # of the longest clip of a batch
        return training_cost(encoder_config(changes), (_FRAMES, *size), self.batch_size)

    def step(self, changes: Changes) -> Step:
        settings, config = self.settings(changes), encoder_config(changes)
        model = encoder_stage.build(settings, config, _teacher(), encoder_class(changes)).train()
        batch = encoder_stage.CaptionBatches(settings)[0]
        inputs = encoder_stage.make_processor(config)(batch.clips, fps=batch.fps)
        return partial(_backward, model, partial(model.losses, inputs, batch.captions, _teacher(), settings))


def encoder_config(changes: Changes) -> VotEncoderConfig:
    """Return the configuration of a small encoder, half as wide as nano, with the changes of a variant."""
    return VotEncoderConfig.preset("nano", **_TINY | changes.get("encoder", {}))


def perception_config(changes: Changes) -> VotPerceptionConfig:
    """Return the configuration of that encoder with the head of scene graphs."""
    return digitworld_config(**_TINY | changes.get("encoder", {}))


def encoder_class(changes: Changes) -> type[VotEncoder]:
    """Return the class of a variant's encoder."""
    return PaddedEncoder if changes.get("kind") == "padded" else VotEncoder


def training_cost(config: VotEncoderConfig, grid: tuple[int, int, int], clips: int) -> dict[str, int]:
    """Return an encoder's parameters, and its operations in a training step of that many clips."""
    cost = encoder_cost(config, grid)
    return {"parameters": cost.parameters, "operations": _TRAINING * clips * cost.flops}


def step_time(changes: Changes, rounds: int = _ROUNDS) -> float:
    """Return the time of a variant's training step, relative to the default encoder's on the same clips.

    The clips have the sizes of training and 2 to 16 frames. Medians are taken of rounds in turns, so that other work on
    the machine hits both.
    """
    encoders = [VotEncoder(encoder_config({})), encoder_class(changes)(encoder_config(changes))]
    sizes = [TRAIN_SIZES[n % len(TRAIN_SIZES)] for n in range(len(_MIXED_FRAMES))]
    clips = [
        generate_episode("train", n, size=size, num_frames=frames).frames()
        for n, (size, frames) in enumerate(zip(sizes, _MIXED_FRAMES, strict=True))
    ]
    inputs = encoder_stage.make_processor(encoders[0].config)(clips, fps=8.0)

    def terms(encoder: VotEncoder) -> dict[str, Tensor]:
        seen = encoder(**inputs)
        return {"all": seen.last_hidden_state.square().mean() + seen.pooler_output.square().mean()}

    steps = [partial(_backward, encoder.train(), partial(terms, encoder)) for encoder in encoders]
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            taken.append(seconds_of(step))
    default, own = (statistics.median(taken[1:]) for taken in times)  # the first one compiles and allocates
    return own / default


def _backward(model: nn.Module, terms: Callable[[], Mapping[str, Tensor]]) -> None:
    torch.stack(list(terms().values())).sum().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_loss(model: VotPerceptionModel, processor: VotImageProcessor, split: str, clips: int) -> float:
    """Return the mean loss of the first clips of a split: the terms of training, but for the balance of experts."""
    groups: dict[tuple[int, int], list[Episode]] = {}
    for index in range(clips):
        episode = generate_episode(split, index, num_frames=_FRAMES)
        groups.setdefault(episode.scene.size, []).append(episode)
    total = 0.0
    for episodes in groups.values():
        frames = episode_batch(episodes)
        batch = Batch(frames.frames, episodes[0].scene.fps, dense_targets(frames, episodes))
        losses = perception_losses(model, processor, batch)
        total += len(episodes) * sum(term.item() for name, term in losses.items() if name != "balance")
    return total / clips


@cache
def _teacher() -> encoder_stage.Teacher:
    return encoder_stage.load_teacher(BUNDLED_CHECKPOINT)
