"""Moving discs read from a scene graph: tracks in units of their radius, and states to simulate from."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from vot_kernels.data.digitworld.world import Motion, simulate
from vot_kernels.scene_graph.events import TURNED
from vot_kernels.scene_graph.graph import STSG, Event, Tracklet

FIT_FRAMES = 6  # a velocity is fitted to at most this many frames
TOUCHING = 2.4  # radii between centres at which two discs may have hit


class Tracks:
    """The tracklets of an STSG as discs of radius 1 in a box of `width` × `height` radii.

    Boxes are fractions of the frame, whose shape the graph does not have. But a disc's box is square in pixels, so its
    sides in fractions give the frame's sides in radii. Tracklets without boxes are left out; missing frames are
    interpolated, and held constant before the first and after the last box.
    """

    def __init__(self, stsg: STSG) -> None:
        self.tracklets: list[Tracklet] = [t.interpolated() for t in stsg.tracklets if t.boxes]
        self.times = np.array(stsg.frame_times_s)
        self.num_frames = stsg.num_frames
        shape = len(self.tracklets), self.num_frames, 4
        corners = np.array([self._corners(t) for t in self.tracklets]).reshape(shape)
        sides = corners[..., 2:] - corners[..., :2]
        side = np.median(sides, axis=(0, 1)) if sides.size else np.array([0.2, 0.2])
        self.scale = 2.0 / np.maximum(side, 1e-3)  # radii per frame width and height
        self.width, self.height = self.scale.tolist()
        self.centers = (corners[..., :2] + corners[..., 2:]) / 2 * self.scale  # [N, T, 2] in radii
        self._index = {t.id: n for n, t in enumerate(self.tracklets)}
        self._given = [e for e in stsg.events if all(p in self._index for p in e.participants)]

    def _corners(self, tracklet: Tracklet) -> np.ndarray:
        known = tracklet.frames
        frames = np.clip(np.arange(self.num_frames), known[0], known[-1])
        return np.array([tracklet.boxes[k][0] for k in frames.tolist()])

    def index(self, id: str) -> int | None:
        """Return the number of the track with this id; None if it has no boxes."""
        return self._index.get(id)

    def named(self, name: str) -> int | None:
        """Return the track called "the red digit", the most certain if there are several; None if there is none."""
        words = set(name.lower().replace("digit", "").split()) - {"the"}
        fitting = [n for n, t in enumerate(self.tracklets) if words & set(t.attributes)]
        return max(fitting, key=self._certainty, default=None)

    def _certainty(self, n: int) -> float:
        return float(sum(score for _, score in self.tracklets[n].boxes.values()))

    @cached_property
    def hits(self) -> list[tuple[int, int, int]]:
        """(frame, track, track), by time; found from the tracks if the graph has no events."""
        if self._given:
            return sorted(self._pair(e) for e in self._given if e.kind == "hits" and len(e.participants) == 2)
        return sorted(self._seen_hits())

    @cached_property
    def bounces(self) -> list[tuple[int, int]]:
        """(frame, track), by time; found from the tracks if the graph has no events."""
        if self._given:
            return sorted((e.t, self._index[e.participants[0]]) for e in self._given if e.kind == "bounces")
        return sorted(self._seen_bounces())

    def _pair(self, event: Event) -> tuple[int, int, int]:
        a, b = (self._index[p] for p in event.participants)
        return event.t, min(a, b), max(a, b)

    def hits_of(self, *tracks: int) -> list[int]:
        """Return the frames of the hits in which all the given tracks take part."""
        return [t for t, a, b in self.hits if set(tracks) <= {a, b}]

    def partners(self, track: int) -> list[tuple[int, int]]:
        """Return (frame, other track) of each hit of a track, by time."""
        return [(t, b if a == track else a) for t, a, b in self.hits if track in (a, b)]

    def _seen_hits(self) -> list[tuple[int, int, int]]:
        """Return closest approaches within reach at which both paths bend."""
        found = []
        for a in range(len(self.tracklets)):
            for b in range(a + 1, len(self.tracklets)):
                gap = np.linalg.norm(self.centers[a] - self.centers[b], axis=1)
                for t in range(1, self.num_frames - 1):
                    closest = gap[t] <= gap[t - 1] and gap[t] < gap[t + 1]
                    if closest and gap[t] < TOUCHING and self._bends(a, t) and self._bends(b, t):
                        found.append((t, a, b))
        return found

    def _seen_bounces(self) -> list[tuple[int, int]]:
        """Return frames at a wall where the motion across it reverses."""
        found = []
        for n in range(len(self.tracklets)):
            for axis, side in enumerate((self.width, self.height)):
                place = self.centers[n, :, axis]
                for t in range(1, self.num_frames - 1):
                    before, after = place[t] - place[t - 1], place[t + 1] - place[t]
                    low = place[t] < 1.5 and before < 0 <= after
                    high = place[t] > side - 1.5 and before > 0 >= after
                    if low or high:
                        found.append((t, n))
        return found

    def _bends(self, n: int, t: int) -> bool:
        before = self.centers[n, t] - self.centers[n, t - 1]
        after = self.centers[n, t + 1] - self.centers[n, t]
        speed = max(float(np.linalg.norm(before)), float(np.linalg.norm(after)), 1e-6)
        return float(np.linalg.norm(after - before)) > TURNED * speed

    def state(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and velocities of all tracks at `frame`, [N, 2] in radii and radii per second.

        A line is fitted to each track over the frames around `frame` between two of its events.
        """
        fits = [self._fit(n, frame) for n in range(len(self.tracklets))]
        positions = np.array([place for place, _ in fits]).reshape(-1, 2)
        return positions, np.array([velocity for _, velocity in fits]).reshape(-1, 2)

    def _fit(self, n: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        events = [t for t, a, b in self.hits if n in (a, b)] + [t for t, m in self.bounces if m == n]
        # An event is within half a frame of the frame that is recorded for it, so the next frames are clear of it.
        first = max((t for t in events if t <= frame), default=-1) + 1
        last = min((t for t in events if t > frame), default=self.num_frames) - 1
        frames = np.arange(max(first, 0), last + 1)
        if len(frames) < 2:
            low = min(max(frame - 1, 0), max(self.num_frames - 2, 0))
            frames = np.arange(low, min(low + 2, self.num_frames))
        frames = np.sort(frames[np.argsort(np.abs(frames - frame), kind="stable")[:FIT_FRAMES]])
        if len(frames) < 2:
            return self.centers[n, frame], np.zeros(2)
        elapsed = self.times[frames] - self.times[frames].mean()
        places = self.centers[n, frames]
        velocity = elapsed @ places / (elapsed @ elapsed)
        return places.mean(0) + velocity * (self.times[frame] - self.times[frames].mean()), velocity

    def simulate(self, frame: int, seconds: float, keep: Sequence[int]) -> Motion:
        """Continue from `frame` for `seconds` with the tracks `keep` only; body i is track keep[i]."""
        positions, velocities = self.state(frame)
        placed, radius = _placed(positions[list(keep)], self.width, self.height)
        return simulate(placed, velocities[list(keep)], radius, self.width, self.height, seconds)


def _placed(positions: np.ndarray, width: float, height: float) -> tuple[np.ndarray, float]:
    """Return positions pushed into the box and apart, and the radius that then fits (1, rarely less)."""
    positions = positions.copy()
    low, high = np.array([1.0, 1.0]), np.maximum([width - 1.0, height - 1.0], 1.0)
    closest = 2.0
    for _ in range(20):
        positions = np.clip(positions, low, high)
        closest = 2.0
        for a in range(len(positions)):
            for b in range(a + 1, len(positions)):
                offset = positions[b] - positions[a]
                gap = float(np.linalg.norm(offset))
                closest = min(closest, gap)
                if gap < 2.0:
                    push = offset / gap if gap > 1e-9 else np.array([1.0, 0.0])
                    positions[a] -= push * (2.0 - gap) / 2
                    positions[b] += push * (2.0 - gap) / 2
        if closest >= 2.0 - 1e-9:
            return positions, 1.0
    positions = np.clip(positions, low, high)
    gaps = [float(np.linalg.norm(p - q)) for i, p in enumerate(positions) for q in positions[:i]]
    return positions, max(min([2.0, *gaps]) / 2, 1e-6)
