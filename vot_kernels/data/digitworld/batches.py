"""Batches of DigitWorld episodes: frames with ground truth as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.episode import Episode
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES

MAX_OBJECTS = 5
CRFS = (18, 29)  # H.264 quality drawn per clip, lowest included, highest excluded; 23 is the usual default


@dataclass(frozen=True)
class TrainingBatch:
    """B clips of T frames, objects padded to N; padded entries are 0 (digit and colour: -1).

    Attributes:
        frames: uint8 `[B, T, H, W, 3]`.
        times: float64 `[T]`, seconds.
        centers: float32 `[B, T, N, 2]`, px (x, y).
        mask: bool `[B, N]`, True for objects that exist.
        digit: int64 `[B, N]`.
        colour: int64 `[B, N]`, index in `COLOUR_NAMES`.
        hits: bool `[B, T, N, N]`, symmetric.
        bounces: bool `[B, T, N]`.
        radius: px.
        indices: int64 `[B]`, index of each episode.
    """

    frames: np.ndarray
    times: np.ndarray
    centers: np.ndarray
    mask: np.ndarray
    digit: np.ndarray
    colour: np.ndarray
    hits: np.ndarray
    bounces: np.ndarray
    radius: float
    indices: np.ndarray


def episode_batch(
    episodes: Sequence[Episode],
    *,
    codec_fraction: float = 0.0,
    max_objects: int = MAX_OBJECTS,
    render: bool = True,
) -> TrainingBatch:
    """Stack episodes of one size, length and radius.

    Args:
        episodes: at least one.
        codec_fraction: share of the clips, from 0 to 1, that are encoded with H.264 and decoded.
        max_objects: number of objects to which the truth is padded.
        render: draw the frames; if False, they are black.
    """
    if not episodes:
        raise ValueError("episodes must hold at least one, got none.")
    if not 0 <= codec_fraction <= 1:
        raise ValueError(f"codec_fraction must be from 0 to 1, got {codec_fraction}.")
    kinds = {(e.scene.size, e.scene.num_frames) for e in episodes}
    if len(kinds) > 1:
        raise ValueError(f"The clips of a batch must have one size and length, got {len(kinds)}.")
    most = max(len(e.scene.digits) for e in episodes)
    if most > max_objects:
        raise ValueError(f"A clip must have at most {max_objects} objects (max_objects), got {most}.")

    batch, frames = len(episodes), episodes[0].scene.num_frames
    centers = np.zeros((batch, frames, max_objects, 2), np.float32)
    mask = np.zeros((batch, max_objects), bool)
    digit = np.full((batch, max_objects), -1, np.int64)
    colour = np.full((batch, max_objects), -1, np.int64)
    hits = np.zeros((batch, frames, max_objects, max_objects), bool)
    bounces = np.zeros((batch, frames, max_objects), bool)
    for b, episode in enumerate(episodes):
        n = len(episode.scene.digits)
        centers[b, :, :n] = episode.centers
        mask[b, :n] = True
        digit[b, :n] = episode.scene.digits
        colour[b, :n] = [COLOUR_NAMES.index(name) for name in episode.scene.colours]
        hits[b, :, :n, :n] = episode.hits
        bounces[b, :, :n] = episode.bounces
    return TrainingBatch(
        frames=_clips(episodes, codec_fraction) if render else _black(episodes),
        times=episodes[0].times,
        centers=centers,
        mask=mask,
        digit=digit,
        colour=colour,
        hits=hits,
        bounces=bounces,
        radius=episodes[0].radius,
        indices=np.array([episode.index for episode in episodes], np.int64),
    )


def _clips(episodes: Sequence[Episode], codec_fraction: float) -> np.ndarray:
    return np.stack([_clip(episode, codec_fraction) for episode in episodes])


def _black(episodes: Sequence[Episode]) -> np.ndarray:
    scene = episodes[0].scene
    return np.broadcast_to(np.uint8(0), (len(episodes), scene.num_frames, *scene.size, 3))


def _clip(episode: Episode, codec_fraction: float) -> np.ndarray:
    """Return the frames, through the codec or not as the episode's own random number decides."""
    frames = episode.frames()
    if codec_fraction == 0:
        return frames
    rng = episode.rng("codec")
    coin, crf = rng.random(), int(rng.integers(*CRFS))
    return h264_roundtrip(frames, crf) if coin < codec_fraction else frames
