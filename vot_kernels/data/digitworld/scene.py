"""Drawing of random scenes of DigitWorld: which digits, where, how fast, for each split."""

import math
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.data.digitworld.sprites import COLOUR_NAMES, image_split
from vot_kernels.data.digitworld.world import Motion, simulate

SPLITS = ("train", "val", "test", "held_out_pairs", "five_objects", "long", "resolution")
HELD_OUT_SIZES = ((96, 96), (48, 80))  # (height, width) px, never in train
DEFAULT_SIZE = (64, 64)
FPS = 8.0
NUM_FRAMES = 16
LONG_FRAMES = 32
RADIUS = 6.5  # px in a 64 × 64 frame; grows with the square root of the area
SPEEDS = (14.0, 30.0)  # px/s in a 64 × 64 frame
MIN_START_GAP = 2.0  # px between discs at the start
QUIET_START = 1.5  # frames without any event, so that the first velocities can be seen
MIN_HIT_SPEED = 2.0  # px/s; softer hits change nothing that can be seen
_TRIES = 1000


@dataclass(frozen=True)
class Scene:
    """A clip before it is simulated, with N objects.

    Attributes:
        positions: float64 `[N, 2]`, px.
        velocities: float64 `[N, 2]`, px/s.
        radius: half the side of a sprite's box, px.
        digits: digit of each object.
        images: index of each object's image.
        colours: name of each object's colour.
        size: (height, width), px.
        num_frames: length of the clip.
        fps: frames per second.
    """

    positions: np.ndarray
    velocities: np.ndarray
    radius: float
    digits: tuple[int, ...]
    images: tuple[int, ...]
    colours: tuple[str, ...]
    size: tuple[int, int]
    num_frames: int
    fps: float

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame."""
        return (self.num_frames - 1) / self.fps

    def simulate(self, duration: float | None = None) -> Motion:
        """Return the motion over the clip, or over `duration` seconds."""
        height, width = self.size
        seconds = self.duration if duration is None else duration
        return simulate(self.positions, self.velocities, self.radius, width, height, seconds)

    def without(self, body: int) -> "Scene":
        """Return the same scene with one object removed; later objects move up by one index."""
        if not 0 <= body < len(self.digits):
            raise ValueError(f"Object {body} does not exist; the scene has {len(self.digits)} objects.")
        keep = [i for i in range(len(self.digits)) if i != body]
        return replace(
            self,
            positions=self.positions[keep],
            velocities=self.velocities[keep],
            digits=tuple(self.digits[i] for i in keep),
            images=tuple(self.images[i] for i in keep),
            colours=tuple(self.colours[i] for i in keep),
        )


def pair_is_held_out(colour: str, digit: int) -> bool:
    """Whether this colour × digit pair appears only in the split "held_out_pairs" (16 of the 80 pairs)."""
    return (digit - COLOUR_NAMES.index(colour)) % 5 == 0


def draw_scene(
    split: str,
    rng: np.random.Generator,
    *,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> tuple[Scene, Motion]:
    """Draw a scene of `split` and its motion; `size` (height, width) px and `num_frames` override."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if split == "train" and size in HELD_OUT_SIZES:
        raise ValueError(
            f"Size {size} is held out for the split 'resolution' and must not be used in 'train'."
        )
    if split == "train" and num_frames is not None and num_frames >= LONG_FRAMES:
        raise ValueError(f"{LONG_FRAMES} frames and more are held out for the split 'long', not for 'train'.")
    if num_frames is not None and num_frames < 2:
        raise ValueError(f"num_frames must be at least 2, got {num_frames}.")
    if size is None:
        size = HELD_OUT_SIZES[rng.integers(2)] if split == "resolution" else DEFAULT_SIZE
    if min(size) < 40:
        raise ValueError(f"Both sides of size must be at least 40 px, got {size}.")
    frames = num_frames or (LONG_FRAMES if split == "long" else NUM_FRAMES)
    count = 5 if split == "five_objects" else int(rng.integers(3, 5))
    colours = tuple(COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES))[:count])
    digits = tuple(_draw_digit(colour, split == "held_out_pairs", rng) for colour in colours)
    pool = image_split()[split if split in ("train", "val") else "test"]
    images = tuple(int(rng.choice(pool[digit])) for digit in digits)

    scale = math.sqrt(size[0] * size[1]) / 64
    radius = RADIUS * scale
    for _ in range(_TRIES):
        positions = _place(count, radius, MIN_START_GAP * scale, size, rng)
        if positions is None:
            continue
        speed = rng.uniform(*SPEEDS, count) * scale
        angle = rng.uniform(0, 2 * math.pi, count)
        velocities = np.stack([speed * np.cos(angle), speed * np.sin(angle)], axis=1)
        scene = Scene(positions, velocities, radius, digits, images, colours, size, frames, FPS)
        motion = scene.simulate()
        if _is_clear(motion, scale):
            return scene, motion
    raise ValueError(f"No clear scene of {count} objects found in a frame of {size}; use a larger frame.")


def _draw_digit(colour: str, held_out: bool, rng: np.random.Generator) -> int:
    choices = [digit for digit in range(10) if pair_is_held_out(colour, digit) == held_out]
    return int(rng.choice(choices))


def _place(
    count: int, radius: float, gap: float, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray | None:
    """Return uniform centres [count, 2] at least 2·radius + gap apart, or None if no free space is left."""
    height, width = size
    low, high = (radius, radius), (width - radius, height - radius)
    placed = np.empty((count, 2))
    for n in range(count):
        for candidate in rng.uniform(low, high, (20, 2)):
            offsets = placed[:n] - candidate
            if ((offsets * offsets).sum(1) >= (2 * radius + gap) ** 2).all():
                placed[n] = candidate
                break
        else:
            return None
    return placed


def _is_clear(motion: Motion, scale: float) -> bool:
    """Whether no event happens before the first velocities can be seen, and no hit is too soft to be seen."""
    if len(motion.times) > 1 and motion.times[1] < QUIET_START / FPS:
        return False
    return all(hit.speed >= MIN_HIT_SPEED * scale for hit in motion.hits)
