"""Training batches of DigitWorld: frames with truth tensors, a pure function of (split, seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES

MAX_OBJECTS = 5
CRFS = (18, 29)  # H.264 quality drawn per clip, lowest included, highest excluded; 23 is the usual default


@dataclass(frozen=True)
class TrainingBatch:
    """B clips of T frames, objects padded to N; padded entries are 0 (digit and colour: -1).

    frames uint8 [B, T, H, W, 3]; times float64 [T] seconds; centers float32 [B, T, N, 2] px (x, y);
    mask bool [B, N]; digit, colour int64 [B, N] (colour indexes `COLOUR_NAMES`);
    hits bool [B, T, N, N], symmetric; bounces bool [B, T, N]; radius float px; indices int64 [B].
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


def training_batch(
    step: int,
    batch_size: int,
    *,
    seed: int = 0,
    split: str = "train",
    codec_fraction: float = 0.0,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    max_objects: int = MAX_OBJECTS,
) -> TrainingBatch:
    """Batch number `step`: the episodes step·batch_size … (step + 1)·batch_size - 1 of `split`.

    The share `codec_fraction` (0 to 1) of the clips goes through H.264 and back. size (height, width) px and
    num_frames override the split's own. Resuming at a step gives the same batch as running up to it.
    """
    if step < 0 or batch_size < 1:
        raise ValueError(f"Got step {step} and batch size {batch_size}; they start at 0 and at 1.")
    if split == "resolution" and size is None:
        raise ValueError("The split 'resolution' mixes frame sizes; give size=(height, width) to batch it.")
    indices = range(step * batch_size, (step + 1) * batch_size)
    return episode_batch(
        [generate_episode(split, index, seed, size=size, num_frames=num_frames) for index in indices],
        codec_fraction=codec_fraction,
        max_objects=max_objects,
    )


def episode_batch(
    episodes: Sequence[Episode],
    *,
    codec_fraction: float = 0.0,
    max_objects: int = MAX_OBJECTS,
    render: bool = True,
) -> TrainingBatch:
    """Stack episodes of one size, length and radius; see `training_batch`. Without `render` all is black."""
    if not episodes:
        raise ValueError("Got no episodes; a batch needs at least one.")
    if not 0 <= codec_fraction <= 1:
        raise ValueError(f"Got codec_fraction {codec_fraction}; it must lie in 0 to 1.")
    kinds = {(e.scene.size, e.scene.num_frames) for e in episodes}
    if len(kinds) > 1:
        raise ValueError(f"Got clips of {len(kinds)} different sizes or lengths; a batch needs one.")
    most = max(len(e.scene.digits) for e in episodes)
    if most > max_objects:
        raise ValueError(f"Got a clip of {most} objects; max_objects is {max_objects}.")

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
    """The frames, through the codec or not as the episode's own coin falls."""
    frames = episode.frames()
    if codec_fraction == 0:
        return frames
    rng = episode.rng("codec")
    coin, crf = rng.random(), int(rng.integers(*CRFS))
    return h264_roundtrip(frames, crf) if coin < codec_fraction else frames
