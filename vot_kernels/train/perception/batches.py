"""Training batches of DigitWorld clips with dense ground truth, as a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vot_kernels.data.digitworld.batches import TrainingBatch, episode_batch
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.data.digitworld.truth import VOCABULARY
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.loss import Targets
from vot_kernels.scene_graph.relations import MOTIONS, geometric_relations
from vot_kernels.train.loop import load_ahead
from vot_kernels.train.ranks import ALONE, Ranks

UNARY_EVENTS = ["bounces"]
TRAIN_SIZES = ((64, 64), (64, 64), (64, 64), (56, 72), (72, 56), (80, 64))
"""Frame sizes (height, width) of training batches; the split "resolution" holds others."""


def digitworld_config(
    attention: Literal["hybrid", "softmax"] = "hybrid", **encoder: Any
) -> VotPerceptionConfig:
    """Return the nano perception model's configuration with DigitWorld's vocabulary, this attention, and further fields
    of the encoder."""
    return VotPerceptionConfig(
        encoder=VotEncoderConfig.preset("nano", **{"attention": attention, **encoder}),
        labels=list(VOCABULARY.labels),
        attributes=list(VOCABULARY.attributes),
        predicates=list(VOCABULARY.predicates),
        unary_predicates=list(MOTIONS),
        events=list(VOCABULARY.events),
        unary_events=UNARY_EVENTS,
        max_pixels=96 * 96,
    )


@dataclass
class Batch:
    """Clips of one size with their ground truth.

    Attributes:
        clips: uint8 `[B, T, H, W, 3]`; over several ranks, the part of this one alone.
        fps: frame rate of all clips.
        targets: the ground truth of all clips on every rank, as the loss needs it.
    """

    clips: np.ndarray
    fps: float
    targets: Targets


class TrainingBatches(Dataset[Batch]):
    """The batches of the training split by number, each a step or a part of one.

    They are the same on every machine and in every process.

    Args:
        seed: seed of the whole run.
        batch_size: clips per batch.
        h264_share: share of the clips that are encoded with H.264 at a random quality, as real files are.
        render: draw the frames; if False, clips are black and only their ground truth is useful.
        num_frames: frames per clip; None is that of the split.
        ranks: the processes that share every batch; each draws its own clips alone.

    Raises:
        ValueError: there are fewer clips than ranks.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        h264_share: float = 0.5,
        render: bool = True,
        num_frames: int | None = None,
        ranks: Ranks = ALONE,
    ):
        self.seed, self.batch_size, self.h264_share, self.render = seed, batch_size, h264_share, render
        self.num_frames, self.own = num_frames, ranks.part(batch_size)

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        size = TRAIN_SIZES[rng.integers(len(TRAIN_SIZES))]
        first = step * self.batch_size
        episodes = [
            generate_episode("train", first + i, self.seed, size=size, num_frames=self.num_frames)
            for i in range(self.batch_size)
        ]
        truth = episode_batch(episodes, render=False)
        own = episode_batch(episodes[self.own], codec_fraction=self.h264_share, render=self.render)
        return Batch(own.frames, episodes[0].scene.fps, dense_targets(truth, episodes))

    def loader(self, start: int, stop: int) -> DataLoader[Batch]:
        """Load batches `start` … `stop - 1` in order, prepared in advance by one worker process."""
        return load_ahead(self, range(start, stop))


def dense_targets(batch: TrainingBatch, episodes: Sequence[Episode]) -> Targets:
    """Return the ground truth of a batch and its episodes, in the form that the loss takes."""
    clips, length, most = batch.centers.shape[:3]
    pixels = np.array([batch.frames.shape[3], batch.frames.shape[2]], np.float32)
    binary = [p for p in VOCABULARY.predicates if p not in MOTIONS]
    pair = torch.zeros(clips, most, most, length, len(binary), dtype=torch.bool)
    unary = torch.zeros(clips, most, length, len(MOTIONS), dtype=torch.bool)
    for b, episode in enumerate(episodes):
        _fill_relations(pair[b], unary[b], episode, binary)
    exists = torch.from_numpy(batch.mask)
    side = torch.from_numpy(2 * batch.radius / pixels).float()
    return Targets(
        centers=torch.from_numpy(batch.centers / pixels).transpose(1, 2).contiguous(),
        sizes=side.expand(clips, most, length, 2),
        present=exists[..., None].expand(clips, most, length),
        exists=exists,
        labels=torch.from_numpy(batch.digit).clamp_min(0),
        attributes=torch.from_numpy(batch.colour).clamp_min(0),
        pair_events=torch.from_numpy(batch.hits).permute(0, 2, 3, 1)[..., None],
        unary_events=torch.from_numpy(batch.bounces).transpose(1, 2)[..., None],
        pair_relations=pair,
        unary_relations=unary,
    )


def _fill_relations(pair: Tensor, unary: Tensor, episode: Episode, binary: list[str]) -> None:
    index = {tracklet.id: n for n, tracklet in enumerate(episode.stsg.tracklets)}
    for relation in geometric_relations(episode.stsg, inverses=True):
        a, b, frames = index[relation.subject], index[relation.object], slice(relation.t0, relation.t1 + 1)
        if relation.predicate in MOTIONS:
            unary[a, frames, MOTIONS.index(relation.predicate)] = True
        else:
            pair[a, b, frames, binary.index(relation.predicate)] = True
