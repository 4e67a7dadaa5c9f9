"""Physics of DigitWorld: equal discs of equal mass, elastic hits, reflecting walls.

Between events every disc moves in a straight line, so the simulation jumps from event to event and is exact
up to float64 rounding; positions at any time follow from the last event before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WALLS = ("left", "right", "top", "bottom")
MAX_EVENTS = 100_000


@dataclass(frozen=True)
class Hit:
    """Two discs touch.

    Attributes:
        time: seconds.
        a, b: body indices, a < b.
        speed: approach speed along the line of centres, px/s.
    """

    time: float
    a: int
    b: int
    speed: float

    @property
    def pair(self) -> tuple[int, int]:
        return self.a, self.b


@dataclass(frozen=True)
class Bounce:
    """A disc touches a wall.

    Attributes:
        time: seconds.
        body: body index.
        wall: one of `WALLS`.
    """

    time: float
    body: int
    wall: str


@dataclass(frozen=True)
class Motion:
    """Piecewise linear paths. Piece s starts at `times[s]` with `positions[s]` and `velocities[s]`.

    Attributes:
        times: float64 `[pieces]`, seconds.
        positions: float64 `[pieces, bodies, 2]`, px.
        velocities: float64 `[pieces, bodies, 2]`, px/s.
        hits, bounces: in time order, all within (0, duration].
        duration: seconds.
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    hits: tuple[Hit, ...]
    bounces: tuple[Bounce, ...]
    duration: float

    def centers(self, times: np.ndarray) -> np.ndarray:
        """Return positions at `times` (float [T], seconds, not negative): float64 [T, bodies, 2] in px."""
        piece = np.searchsorted(self.times, times, side="right") - 1
        elapsed = (np.asarray(times) - self.times[piece])[:, None, None]
        return self.positions[piece] + self.velocities[piece] * elapsed

    def closest(self, a: int, b: int, start: float = 0.0, end: float | None = None) -> float:
        """Return the smallest distance between the centres of a and b between `start` and `end` seconds, in px."""
        end = self.duration if end is None else end
        until = np.append(self.times[1:], math.inf)
        inside = (self.times <= end) & (until >= start)
        begins, ends = np.clip(self.times, start, end), np.clip(until, start, end)
        offset = self.positions[:, b] - self.positions[:, a]
        drift = self.velocities[:, b] - self.velocities[:, a]
        speed2 = np.maximum((drift * drift).sum(1), 1e-12)
        best = np.clip(-(offset * drift).sum(1) / speed2, begins - self.times, ends - self.times)
        distance = np.linalg.norm(offset + drift * best[:, None], axis=1)
        return float(distance[inside].min())


def simulate(
    positions: np.ndarray | Sequence[Sequence[float]],
    velocities: np.ndarray | Sequence[Sequence[float]],
    radius: float,
    width: float,
    height: float,
    duration: float,
) -> Motion:
    """Simulate discs of one radius and mass in the box [0, width] × [0, height] for `duration` seconds.

    positions, velocities: [bodies, 2] as (x, y) in px and px/s.

    Raises:
        ValueError: discs overlap or are outside the box, or an array has the wrong shape or is not finite.
    """
    xs, ys = _columns(positions, "positions")
    us, vs = _columns(velocities, "velocities")
    if len(xs) != len(us):
        raise ValueError(f"There must be as many velocities as positions, got {len(us)} and {len(xs)}.")
    _check_placement(xs, ys, radius, width, height)

    times = [0.0]
    states = [(xs[:], ys[:], us[:], vs[:])]
    hits: list[Hit] = []
    bounces: list[Bounce] = []
    now = 0.0
    for _ in range(MAX_EVENTS):
        delay, first, second = _next_event(xs, ys, us, vs, radius, width, height)
        if now + delay > duration:
            break
        now += delay
        for i in range(len(xs)):
            xs[i] += us[i] * delay
            ys[i] += vs[i] * delay
        if second >= 0:
            hits.append(Hit(now, first, second, _collide(xs, ys, us, vs, first, second)))
        else:
            wall = WALLS[-second - 1]
            _reflect(xs, ys, us, vs, first, wall, radius, width, height)
            bounces.append(Bounce(now, first, wall))
        times.append(now)
        states.append((xs[:], ys[:], us[:], vs[:]))
    else:
        raise ValueError(
            f"The simulation passed {MAX_EVENTS} events; shorten the duration or lower the speeds."
        )
    table = np.array(states, dtype=np.float64).transpose(0, 2, 1)  # [pieces, bodies, (x, y, u, v)]
    return Motion(
        np.array(times), table[..., :2].copy(), table[..., 2:].copy(), tuple(hits), tuple(bounces), duration
    )


def _columns(values: np.ndarray | Sequence[Sequence[float]], name: str) -> tuple[list[float], list[float]]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers [bodies, 2], got {array.tolist()}.")
    return array[:, 0].tolist(), array[:, 1].tolist()


def _check_placement(xs: list[float], ys: list[float], radius: float, width: float, height: float) -> None:
    slack = 1e-6
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if min(x, y, width - x, height - y) < radius - slack:
            where = f"({x:.2f}, {y:.2f})"
            raise ValueError(f"Disc {i} at {where} with radius {radius:.2f} is not inside the box.")
        for j in range(i):
            if math.hypot(x - xs[j], y - ys[j]) < 2 * radius - slack:
                raise ValueError(f"Discs {j} and {i} overlap; centres must be two radii apart.")


def _next_event(
    xs: list[float], ys: list[float], us: list[float], vs: list[float], r: float, width: float, height: float
) -> tuple[float, int, int]:
    """Return (delay, body, other): other is the second body of a hit, or -1-k for WALLS[k]."""
    best, first, second = math.inf, -1, -1
    for i in range(len(xs)):
        x, y, u, v = xs[i], ys[i], us[i], vs[i]
        if u:
            delay = (width - r - x) / u if u > 0 else (r - x) / u
            if delay < best:
                best, first, second = max(delay, 0.0), i, -2 if u > 0 else -1
        if v:
            delay = (height - r - y) / v if v > 0 else (r - y) / v
            if delay < best:
                best, first, second = max(delay, 0.0), i, -4 if v > 0 else -3
        for j in range(i + 1, len(xs)):
            dx, dy, du, dv = xs[j] - x, ys[j] - y, us[j] - u, vs[j] - v
            closing = dx * du + dy * dv
            if closing >= 0:
                continue
            speed2 = du * du + dv * dv
            excess = dx * dx + dy * dy - 4 * r * r
            root = closing * closing - speed2 * excess
            if root <= 0:
                continue
            # This is the smaller root, in the form without cancellation; touching discs that approach hit at once.
            delay = max(excess / (math.sqrt(root) - closing), 0.0)
            if delay < best:
                best, first, second = delay, i, j
    return best, first, second


def _collide(xs: list[float], ys: list[float], us: list[float], vs: list[float], i: int, j: int) -> float:
    """Exchange the velocities of equal masses along the line of centres; return the approach speed."""
    nx, ny = xs[j] - xs[i], ys[j] - ys[i]
    norm = math.hypot(nx, ny)
    nx, ny = nx / norm, ny / norm
    approach = (us[i] - us[j]) * nx + (vs[i] - vs[j]) * ny
    us[i] -= approach * nx
    vs[i] -= approach * ny
    us[j] += approach * nx
    vs[j] += approach * ny
    return approach


def _reflect(
    xs: list[float],
    ys: list[float],
    us: list[float],
    vs: list[float],
    i: int,
    wall: str,
    r: float,
    width: float,
    height: float,
) -> None:
    if wall in ("left", "right"):
        us[i] = -us[i]
        xs[i] = r if wall == "left" else width - r
    else:
        vs[i] = -vs[i]
        ys[i] = r if wall == "top" else height - r
