"""A question that one frame cannot answer: which colours do the digits behind a cover have?"""

from dataclasses import dataclass

import numpy as np

from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES


@dataclass(frozen=True)
class HiddenColours:
    """N clips of F frames, in each of which one frame is half black.

    Attributes:
        frames: uint8 `[N, F, H, W, 3]`.
        covered: int64 `[N]`, the frame that is half black.
        present: bool `[N, colours]`, the colours of all digits of the clip, in the order of `COLOUR_NAMES`.
        shown: bool `[N, colours]`, those of digits whose centre is in the other half of the covered frame.
    """

    frames: np.ndarray
    covered: np.ndarray
    present: np.ndarray
    shown: np.ndarray


def hidden_colours(split: str, clips: int, *, num_frames: int = 4, seed: int = 0) -> HiddenColours:
    """Return clips of a split with a random half of a random frame covered; the same for the same arguments.

    Args:
        split: see `generate_episode`.
        clips: number of clips.
        num_frames: frames of a clip, evenly spaced over the episode.
        seed: seed of the episodes and of the covers.
    """
    episodes = [generate_episode(split, index, seed) for index in range(clips)]
    found = HiddenColours(
        frames=np.stack(
            [episode.frames()[_spread(episode.scene.num_frames, num_frames)] for episode in episodes]
        ),
        covered=np.zeros(clips, np.int64),
        present=np.zeros((clips, len(COLOUR_NAMES)), bool),
        shown=np.zeros((clips, len(COLOUR_NAMES)), bool),
    )
    for row, episode in enumerate(episodes):
        rng = episode.rng("covered half")
        frame, on_the_right = int(rng.integers(num_frames)), bool(rng.integers(2))
        middle = episode.scene.size[1] // 2
        found.covered[row] = frame
        found.frames[row, frame, :, slice(middle, None) if on_the_right else slice(middle)] = 0
        when = _spread(episode.scene.num_frames, num_frames)[frame]
        for name, (x, _) in zip(episode.scene.colours, episode.centers[when], strict=True):
            colour = COLOUR_NAMES.index(name)
            found.present[row, colour] = True
            found.shown[row, colour] |= (x >= middle) != on_the_right
    return found


def _spread(length: int, count: int) -> np.ndarray:
    """Return the indices of `count` frames out of `length`, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)
