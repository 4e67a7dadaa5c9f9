"""Needle questions: of a clip of any length, each decided by one hit somewhere in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.data.digitworld.questions import YES_NO, Question
from vot_kernels.data.digitworld.scene import MIN_HIT_SPEED, Scene
from vot_kernels.data.digitworld.sprites import render
from vot_kernels.data.digitworld.world import Hit, Motion
from vot_kernels.scene_graph.interval import Interval

NEEDLE_FORMS = ("which", "did", "when")
APART = 0.5  # seconds; no other hit of the digit that is asked about is so near
EDGE = 0.3  # seconds; no hit of the pair is so near the ends of the time that is asked about
SPANS = {"did": 4.0, "when": 16.0}  # seconds that are asked about, at most half or all of the clip
_TRIES = 200
_CHUNK = 64  # frames drawn together


@dataclass(frozen=True)
class LongClip:
    """A clip of DigitWorld of any length.

    Attributes:
        scene, motion: the objects and their exact motion.
    """

    scene: Scene
    motion: Motion

    def frames(self) -> Iterator[np.ndarray]:
        """Draw the frames one by one, uint8 `[H, W, 3]`."""
        scene = self.scene
        for first in range(0, scene.num_frames, _CHUNK):
            times = np.arange(first, min(first + _CHUNK, scene.num_frames)) / scene.fps
            centers = self.motion.centers(times)
            yield from render(centers, scene.images, scene.colours, scene.radius, *scene.size)


@dataclass(frozen=True)
class Needle:
    """A question, and the moment, in seconds, of the hit that decides it."""

    question: Question
    time_s: float


def long_clip(split: str, index: int, frames: int, seed: int = 0) -> LongClip:
    """Return an episode's scene that goes on for `frames` frames. Arguments as in `generate_episode`.

    Raises:
        ValueError: fewer than 2 frames, or what `generate_episode` refuses.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}.")
    scene = replace(generate_episode(split, index, seed).scene, num_frames=frames)
    return LongClip(scene, scene.simulate())


def needle(clip: LongClip, form: str, rng: np.random.Generator) -> Needle | None:
    """Return a question of one of `NEEDLE_FORMS` about a moment drawn uniformly; None if the clip admits none.

    "which": whom a digit hits at a moment. "did": whether two digits hit each other in some seconds, equally often yes
    and no. "when": when two digits hit each other in some seconds, in which they do it once.
    """
    if form not in NEEDLE_FORMS:
        raise ValueError(f"form must be one of {', '.join(NEEDLE_FORMS)}, got {form!r}.")
    hits = [hit for hit in clip.motion.hits if hit.speed >= MIN_HIT_SPEED and _seen(clip, hit)]
    if not hits:
        return None
    times = np.array([hit.time for hit in hits])
    wanted = YES_NO[rng.integers(2)]
    for _ in range(_TRIES):
        near = hits[int(np.abs(times - rng.uniform(0, clip.scene.duration)).argmin())]
        found = _which(clip, near, rng) if form == "which" else _between(clip, near, form, wanted, rng)
        if found is not None:
            return Needle(found, near.time)
    return None


def _seen(clip: LongClip, hit: Hit) -> bool:
    """Whether the frames show the motion before and after a hit."""
    frame = 1 / clip.scene.fps
    return frame < hit.time < clip.scene.duration - frame


def _name(clip: LongClip, body: int) -> str:
    return f"the {clip.scene.colours[body]} digit"


def _times(clip: LongClip, *bodies: int) -> list[float]:
    return [hit.time for hit in clip.motion.hits if set(bodies) <= set(hit.pair)]


def _which(clip: LongClip, hit: Hit, rng: np.random.Generator) -> Question | None:
    body, other = hit.pair if rng.random() < 0.5 else hit.pair[::-1]
    if sum(abs(time - hit.time) < APART for time in _times(clip, body)) > 1:
        return None
    others = [n for n in range(len(clip.scene.colours)) if n != body]
    rng.shuffle(others)
    text = f"Which digit does {_name(clip, body)} hit at {hit.time:.1f} s?"
    return Question(
        "which", text, tuple(_name(clip, n) for n in others), _name(clip, other), objects=_ids(body)
    )


def _between(clip: LongClip, hit: Hit, form: str, wanted: str, rng: np.random.Generator) -> Question | None:
    """Ask about a pair in a time around a hit; a pair that does not hit each other then has a digit that hits."""
    duration = clip.scene.duration
    span = min(SPANS[form], duration / 2 if form == "did" else duration)
    begin = round(float(np.clip(hit.time - rng.uniform(0, span), 0, duration - span)), 1)
    end = round(begin + span, 1)
    a, b = hit.pair if rng.random() < 0.5 else hit.pair[::-1]
    if form == "did" and wanted == "no":
        b = int(rng.choice([n for n in range(len(clip.scene.colours)) if n not in hit.pair]))
    times = _times(clip, a, b)
    inside = [time for time in times if begin <= time <= end]
    edges = [edge for edge in (begin, end) if 0 < edge < duration]
    if any(abs(time - edge) < EDGE for time in times for edge in edges):
        return None
    when = f"between {begin:.1f} and {end:.1f} s"
    if form == "did":
        if bool(inside) != (wanted == "yes"):
            return None
        text = f"Does {_name(clip, a)} hit {_name(clip, b)} {when}?"
        return Question("did", text, YES_NO, wanted, objects=_ids(a, b))
    if len(inside) != 1:
        return None
    frame = 1 / clip.scene.fps
    interval = Interval(max(0.0, inside[0] - frame), min(duration, inside[0] + frame))
    text = f"When does {_name(clip, a)} hit {_name(clip, b)} {when}?"
    return Question(
        "when", text, (), str(interval), objects=_ids(a, b), interval=interval, cell="hit: needle"
    )


def _ids(*bodies: int) -> tuple[str, ...]:
    return tuple(f"o{body + 1}" for body in bodies)


def needles(clip: LongClip, forms: Sequence[str], count: int, rng: np.random.Generator) -> list[Needle]:
    """Return up to `count` questions of each form about a clip, no two the same."""
    found: dict[str, Needle] = {}
    for form in forms:
        for _ in range(count):
            item = needle(clip, form, rng)
            if item is not None:
                found.setdefault(item.question.text, item)
    return list(found.values())
