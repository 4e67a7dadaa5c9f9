"""Episodes of DigitWorld: a clip with its exact ground truth, deterministic in (split, index, seed)."""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vot_kernels.data.digitworld.questions import Question, ask_all
from vot_kernels.data.digitworld.scene import SPLITS, Scene, draw_scene
from vot_kernels.data.digitworld.sprites import render
from vot_kernels.data.digitworld.truth import frame_of, true_stsg
from vot_kernels.data.digitworld.world import Motion
from vot_kernels.scene_graph.graph import STSG


@dataclass(frozen=True)
class Episode:
    """One clip. Objects have the same order everywhere: object n is track f"o{n + 1}".

    Attributes:
        split, index, seed: the values that determine the clip.
        scene: the objects and how they are drawn.
        motion: their motion.
    """

    split: str
    index: int
    seed: int
    scene: Scene
    motion: Motion

    @property
    def name(self) -> str:
        """A file name without suffix, unique per (split, index, seed)."""
        return f"{self.split}-{self.seed}-{self.index:06d}"

    @property
    def radius(self) -> float:
        """Half the side of a sprite's box, px."""
        return self.scene.radius

    @cached_property
    def times(self) -> np.ndarray:
        """float64 [T], seconds."""
        return np.arange(self.scene.num_frames) / self.scene.fps

    @cached_property
    def centers(self) -> np.ndarray:
        """float32 [T, N, 2], px as (x, y); pixel i covers [i, i + 1)."""
        return self.motion.centers(self.times).astype(np.float32)

    @cached_property
    def hits(self) -> np.ndarray:
        """bool [T, N, N], symmetric: whether the two hit each other closest to this frame."""
        count = len(self.scene.digits)
        table = np.zeros((self.scene.num_frames, count, count), dtype=bool)
        for hit in self.motion.hits:
            frame = frame_of(hit.time, self.scene.fps)
            table[frame, hit.a, hit.b] = table[frame, hit.b, hit.a] = True
        return table

    @cached_property
    def bounces(self) -> np.ndarray:
        """bool [T, N]: whether the object bounces off a wall closest to this frame."""
        table = np.zeros((self.scene.num_frames, len(self.scene.digits)), dtype=bool)
        for bounce in self.motion.bounces:
            table[frame_of(bounce.time, self.scene.fps), bounce.body] = True
        return table

    @cached_property
    def stsg(self) -> STSG:
        """The exact scene graph of the clip, with geometric relations."""
        return true_stsg(self.scene, self.motion, source=self.name)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most one question of each kind; `generate_questions` gives exactly balanced sets."""
        return ask_all(self.scene, self.motion, self.rng("questions"))

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a random generator of this episode for one purpose, independent of every other purpose."""
        return np.random.default_rng(
            [self.seed, SPLITS.index(self.split), self.index, zlib.crc32(purpose.encode())]
        )

    def frames(self) -> np.ndarray:
        """Render the frames, uint8 [T, H, W, 3], RGB."""
        scene = self.scene
        return render(self.motion.centers(self.times), scene.images, scene.colours, scene.radius, *scene.size)


def generate_episode(
    split: str = "train",
    index: int = 0,
    seed: int = 0,
    *,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> Episode:
    """Draw an episode; the same (split, index, seed) gives the same clip on every machine.

    Args:
        split: one of `SPLITS`.
        index, seed: whole numbers from 0 on.
        size: (height, width) in px, instead of the split's own.
        num_frames: number of frames, instead of the split's own.

    Raises:
        ValueError: an unknown split, a negative index or seed, or a size or length held out from "train".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0, got {index} and {seed}.")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene, motion = draw_scene(split, rng, size=size, num_frames=num_frames)
    return Episode(split, index, seed, scene, motion)
