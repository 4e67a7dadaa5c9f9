"""Events as the mechanics explain them: a particle filter over the motion that a scene graph shows.

Boxes say where discs are to less than a tenth of their radius, but what happened between two frames has to be guessed
from them, above all where a disc hits and bounces at about the same time. So many worlds are simulated from frame to
frame, each with its own guess of places and velocities; those that agree with the boxes live on (Gordon, Salmond and
Smith 1993, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation"), and what happened in most of them is
what happened.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.data.digitworld.tracks import Tracks
from vot_kernels.scene_graph.events import GEOMETRIC_EVENTS
from vot_kernels.scene_graph.graph import STSG, Event

PARTICLES = (128, 512)  # the larger number for a clip in which the smaller one loses a disc
NOISE = 0.07  # of a place that is seen, in radii
LOST = (0.3, 1.0)  # radii: a disc is lost that is seen farther than that from all simulated ones
_PULL = 0.3  # part of the way that a place is drawn towards the one that is seen
_STEER, _STEER_NEW = 0.25, 0.45  # the same of a velocity, and of one that an event has just changed
_SPREAD = 0.4  # of particles that are drawn several times, in units of the noise
_CAP = 25.0  # of a squared error in units of its variance, so that one outlier does not decide
_MAX_EVENTS = 64  # of a particle between two frames


def explain_events(graph: STSG) -> STSG:
    """Return the graph with the hits and bounces that DigitWorld's mechanics make of its boxes, and its other events.

    The score of an event is the share of the simulated worlds in which it happened within a frame of it. A graph of
    fewer than three frames, with times that do not rise, without boxes, or with motion that the mechanics do not
    explain is returned as it is.
    """
    tracks = Tracks(graph)
    if graph.num_frames < 3 or not tracks.tracklets or np.diff(tracks.times).min() <= 0:
        return graph
    names = [tracklet.id for tracklet in tracks.tracklets]
    found: list[Event] = []
    for sign in (1, -1):
        tries = (_filter(tracks, sign, *how) for how in zip(PARTICLES, LOST, strict=True))
        particles = next(filter(None, tries), None)
        if particles is None:
            return graph
        found += particles.events(names)
    kept = [event for event in graph.events if event.kind not in GEOMETRIC_EVENTS]
    return replace(graph, events=tuple(sorted(found + kept, key=lambda e: (e.t, e.kind, e.participants))))


@dataclass
class _Particles:
    """Simulated worlds, [M] of them, with N discs each.

    Attributes:
        places, velocities: [M, N, 2] in radii and radii per second.
        hits, bounces: [M, frames, N, N] and [M, frames, N, 2 axes], how often what happened, at the nearest frame.
        last: [M, N], the number of the last hit of a disc that has not bounced since, else -1; see `_next_events`.
        new: [M, N], 1 for a velocity that an event has just changed, and less with every frame since.
        log_weights: [M].
    """

    places: np.ndarray
    velocities: np.ndarray
    hits: np.ndarray
    bounces: np.ndarray
    last: np.ndarray
    new: np.ndarray
    log_weights: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        weights = np.exp(self.log_weights - self.log_weights.max())
        return weights / weights.sum()

    def record(self, frames: np.ndarray, worlds: np.ndarray, events: np.ndarray) -> None:
        """Count events of worlds, one each, at frames; see `_next_events` for their numbers."""
        walls, (body, axis), (first, second) = _parties(events, self.places.shape[1])
        self.bounces[worlds[walls], frames[walls], body, axis] += 1
        self.last[worlds[walls], body] = -1
        self.new[worlds[walls], body] = 1
        self.hits[worlds[~walls], frames[~walls], first, second] += 1
        for disc in (first, second):
            self.last[worlds[~walls], disc] = events[~walls]
            self.new[worlds[~walls], disc] = 1

    def correct(self, seen: np.ndarray, seconds: float) -> float:
        """Weigh and steer the worlds by the places that are seen, [N, 2], and return how far the nearest is off."""
        error = seen - self.places
        squares = (error**2).sum(-1)
        self.log_weights -= 0.5 * np.minimum(squares / (2 * NOISE) ** 2, _CAP).sum(1)
        self.places += _PULL * error
        steer = _STEER + (_STEER_NEW - _STEER) * self.new[..., None]
        self.velocities += steer * error / seconds
        return float(np.sqrt(squares.min(0).max()))

    def resample(self, rng: np.random.Generator, seconds: float) -> None:
        """Draw worlds by their weights, once few have most of the weight."""
        weights, count = self.weights, len(self.places)
        if 1 / (weights**2).sum() >= count / 2:
            return
        drawn = np.searchsorted(np.cumsum(weights), (rng.random() + np.arange(count)) / count)
        drawn = np.minimum(drawn, count - 1)
        for name in ("places", "velocities", "hits", "bounces", "last", "new"):
            setattr(self, name, getattr(self, name)[drawn])
        self.places += rng.normal(0, _SPREAD * NOISE, self.places.shape)
        self.velocities += rng.normal(0, _SPREAD * NOISE / seconds, self.velocities.shape)
        self.log_weights = np.zeros(count)

    def events(self, names: list[str]) -> Iterator[Event]:
        """Yield the events of one world: of those in which most of the weight agrees what happened how often."""
        weights, count = self.weights, len(self.places)
        sums = [counts.sum(1).reshape(count, -1) for counts in (self.hits, self.bounces)]
        _, story = np.unique(np.concatenate(sums, 1), axis=0, return_inverse=True)
        story = story.ravel()
        best = np.flatnonzero(story == np.bincount(story, weights).argmax())
        world = best[weights[best].argmax()]
        for t, first, second in np.argwhere(self.hits[world]).tolist():
            near = self.hits[:, max(t - 1, 0) : t + 2, first, second].any(1)
            event = Event("hits", t, (names[first], names[second]), float(weights @ near))
            yield from [event] * int(self.hits[world, t, first, second])
        for t, body, axis in np.argwhere(self.bounces[world]).tolist():
            near = self.bounces[:, max(t - 1, 0) : t + 2, body, axis].any(1)
            event = Event("bounces", t, (names[body],), float(weights @ near))
            yield from [event] * int(self.bounces[world, t, body, axis])


def _filter(tracks: Tracks, sign: int, count: int, lost: float) -> _Particles | None:
    """Simulate from the frame around which all discs move most steadily to the end, or with sign -1 back to the begin.

    Returns None if a disc is lost, that is seen farther than `lost` from the nearest of `count` particles.
    """
    seen = np.clip(tracks.centers.transpose(1, 0, 2), 1, np.array([tracks.width, tracks.height]) - 1)
    times, last = tracks.times, tracks.num_frames - 1
    middle = _steadiest(seen, times)
    rng = np.random.default_rng(0)
    around = slice(middle - 1, middle + 2)
    particles = _begin(seen[around], times[around], sign, last + 1, count, rng)
    for frame in range(middle + sign, last if sign > 0 else 0, sign):
        seconds = abs(float(times[frame + sign] - times[frame]))
        particles.new *= 0.6
        for elapsed, worlds, events in _advance(particles, seconds, tracks.width, tracks.height):
            moments = times[frame] + sign * elapsed
            particles.record(np.searchsorted((times[1:] + times[:-1]) / 2, moments), worlds, events)
        if particles.correct(seen[frame + sign], seconds) > lost:
            return None
        particles.resample(rng, seconds)
    return particles


def _steadiest(seen: np.ndarray, times: np.ndarray) -> int:
    """Return the frame, neither the first nor the last, at which the velocity that changes most changes least."""
    velocities = np.diff(seen, axis=0) / np.diff(times)[:, None, None]
    return int(np.linalg.norm(np.diff(velocities, axis=0), axis=-1).max(1).argmin()) + 1


def _begin(
    seen: np.ndarray, times: np.ndarray, sign: int, frames: int, count: int, rng: np.random.Generator
) -> _Particles:
    """Return particles at the last of three frames, or with sign -1 at the first, that move on from there."""
    span = float(times[2] - times[0])
    velocity = (seen[2] - seen[0]) / span * sign
    place = seen.mean(0) + velocity * sign * (times[1 + sign] - times.mean())
    shape = (count, *place.shape)
    discs = len(place)
    return _Particles(
        place + rng.normal(0, NOISE, shape),
        velocity + rng.normal(0, 1.4 * NOISE / span, shape),
        np.zeros((count, frames, discs, discs), np.int16),
        np.zeros((count, frames, discs, 2), np.int16),
        np.full((count, discs), -1),
        np.zeros((count, discs)),
        np.zeros(count),
    )


def _advance(
    particles: _Particles, seconds: float, width: float, height: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Move all worlds on; yield times since the start, worlds and events, one event of a world at a time.

    This is `world.simulate` for many worlds at once, whose discs may overlap a little.
    """
    places, velocities = particles.places, particles.velocities
    left = np.full(len(places), seconds)
    for _ in range(_MAX_EVENTS):
        delay, events = _next_events(places, velocities, particles.last, np.array([width, height]))
        happens = delay < left
        places += velocities * np.where(happens, delay, left)[:, None, None]
        left = np.where(happens, left - delay, 0)
        worlds = np.flatnonzero(happens)
        if not len(worlds):
            return
        _turn(places, velocities, worlds, events[worlds])
        yield seconds - left[worlds], worlds, events[worlds]


def _next_events(
    places: np.ndarray, velocities: np.ndarray, last: np.ndarray, sides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many seconds it takes to the next event of each world, and the event's number.

    Number 2 n + axis is a bounce of disc n; the hits of the pairs follow, in the order of `np.triu_indices`. Two discs
    do not hit each other twice if nothing turns one of them in between, however they are steered.
    """
    worlds, discs, _ = places.shape
    first, second = np.triu_indices(discs, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        to_wall = np.where(velocities > 0, sides - 1 - places, 1 - places) / velocities
        offset, drift = (x[:, second] - x[:, first] for x in (places, velocities))
        closing = (offset * drift).sum(-1)
        excess = (offset**2).sum(-1) - 4
        root = closing**2 - (drift**2).sum(-1) * excess
        to_hit = excess / (np.sqrt(root) - closing)  # the smaller root, in the form without cancellation
    to_wall = np.where(velocities == 0, np.inf, np.maximum(to_wall, 0)).reshape(worlds, -1)
    number = 2 * discs + np.arange(len(first))
    again = (last[:, first] == number) & (last[:, second] == number)
    to_hit = np.where((closing < 0) & (root > 0) & ~again, np.maximum(to_hit, 0), np.inf)
    delays = np.concatenate([to_wall, to_hit], 1)
    events = delays.argmin(1)
    return delays[np.arange(worlds), events], events


def _parties(
    events: np.ndarray, discs: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return which events are bounces, disc and axis of these, and the two discs of each of the others."""
    walls = events < 2 * discs
    first, second = (index[events[~walls] - 2 * discs] for index in np.triu_indices(discs, 1))
    return walls, (events[walls] // 2, events[walls] % 2), (first, second)


def _turn(places: np.ndarray, velocities: np.ndarray, worlds: np.ndarray, events: np.ndarray) -> None:
    """Change the velocities of what bounces, and of the pairs that hit along the line of their centres."""
    walls, (body, axis), (first, second) = _parties(events, places.shape[1])
    velocities[worlds[walls], body, axis] *= -1
    hit = worlds[~walls]
    normal = places[hit, second] - places[hit, first]
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    approach = ((velocities[hit, first] - velocities[hit, second]) * normal).sum(1, keepdims=True)
    velocities[hit, first] -= approach * normal
    velocities[hit, second] += approach * normal
