"""A scene graph over time as an SVG: a row for each tracklet, a numbered mark for each event."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from vot_kernels.data.contact_sheet import track_colours
from vot_kernels.reasoning.types import Evidence
from vot_kernels.scene_graph.graph import STSG, Event, Tracklet

_WIDTH, _ROW, _NAMES, _RIGHT, _AXIS = 640, 28, 150, 25, 30  # pixels
_FAINT = 0.3  # opacity of what the answer does not rest on
_TICKS = 8


def timeline(stsg: STSG, evidence: Evidence, spacing: int = 1) -> str:
    """Return an SVG, followed by the list of the numbered events, as HTML that scales with its place.

    Bars show when a tracklet is seen. Tracklets and events that are no part of `evidence` are faint, and such events
    have no number. Text has the colour of its surroundings; names are escaped.

    Args:
        spacing: number of frames from one box to the next up to which a tracklet is seen in between as well.

    Raises:
        ValueError: the graph has no frames.
    """
    if not stsg.frame_times_s:
        raise ValueError("A timeline needs a scene graph with at least one frame.")
    scale = _Scale(stsg.frame_times_s)
    rows = {tracklet.id: n for n, tracklet in enumerate(stsg.tracklets)}
    told = {box.id for box in evidence.boxes}
    names = {tracklet.id: tracklet.name for tracklet in stsg.tracklets}
    numbers = _numbers(stsg.events, names, evidence)
    parts = [*_axis(scale, len(rows))]
    for tracklet, colour in zip(stsg.tracklets, track_colours(stsg.tracklets), strict=True):
        runs = _runs(tracklet.frames, spacing)
        parts += _bars(tracklet, runs, rows[tracklet.id], colour, scale, tracklet.id in told)
    for event in sorted(stsg.events, key=lambda event: event in numbers):  # numbered marks lie on top
        parts += _mark(event, rows, names, scale, numbers.get(event))
    height = _ROW * len(rows) + _AXIS
    drawing = f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" aria-label="timeline">'
    listed = "".join(f"<li>{stsg.frame_times_s[e.t]:.2f} s: {escape(_words(e, names))}</li>" for e in numbers)
    return f"{drawing}{''.join(parts)}</svg><ol>{listed}</ol>"


class _Scale:
    """Seconds to pixels; the last frame lasts as long as the others."""

    def __init__(self, times: Sequence[float]) -> None:
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
        self.times, self.start, self.end = [*times, times[-1] + step], times[0], times[-1] + step

    def __call__(self, seconds: float) -> float:
        share = (seconds - self.start) / (self.end - self.start)
        return _NAMES + share * (_WIDTH - _NAMES - _RIGHT)


def _numbers(events: Sequence[Event], names: dict[str, str], evidence: Evidence) -> dict[Event, int]:
    told = {(e.frame, e.kind, e.participants) for e in evidence.events}
    shown = [e for e in events if (e.t, e.kind, tuple(names[id] for id in e.participants)) in told]
    return {event: number for number, event in enumerate(sorted(shown, key=lambda e: e.t), 1)}


def _words(event: Event, names: dict[str, str]) -> str:
    actor, *others = (names[id] for id in event.participants)
    return " ".join([actor, event.kind, *others])


def _axis(scale: _Scale, rows: int) -> Iterator[str]:
    bottom = rows * _ROW
    for seconds in np.linspace(scale.start, scale.end, _TICKS + 1):
        x = scale(seconds)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" stroke="currentColor" opacity="0.12"/>'
        yield _text(f"{seconds:.2f} s", x, bottom + 18, anchor="middle", opacity=0.7)


def _bars(
    tracklet: Tracklet, runs: Iterator[tuple[int, int]], row: int, colour: str, scale: _Scale, told: bool
) -> Iterator[str]:
    opacity, y = (1 if told else _FAINT), row * _ROW
    yield _text(
        f"{tracklet.id} {tracklet.name}", _NAMES - 10, y + 19, anchor="end", opacity=max(opacity, 0.6)
    )
    for first, last in runs:
        left, right = scale(scale.times[first]), scale(scale.times[last + 1])
        yield (
            f'<rect x="{left:.1f}" y="{y + 8}" width="{right - left:.1f}" height="{_ROW - 14}" rx="4" '
            f'fill="{colour}" stroke="#888" opacity="{opacity}"/>'
        )


def _runs(frames: Sequence[int], spacing: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of frames, which lie at most `spacing` from one to the next."""
    breaks = [(a, b) for a, b in pairwise(frames) if b > a + spacing]
    if frames:
        yield from zip(
            [frames[0], *(b for _, b in breaks)], [*(a for a, _ in breaks), frames[-1]], strict=True
        )


def _mark(
    event: Event, rows: dict[str, int], names: dict[str, str], scale: _Scale, number: int | None
) -> Iterator[str]:
    x, ys = scale(scale.times[event.t]), [rows[id] * _ROW + 15 for id in event.participants]
    opacity = _FAINT if number is None else 1
    yield f'<g opacity="{opacity}"><title>{escape(_words(event, names))}</title>'
    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{min(ys)}" y2="{max(ys)}" stroke="currentColor" stroke-width="2"/>'
    for y in ys:
        yield f'<circle cx="{x:.1f}" cy="{y}" r="9" fill="#14161a" stroke="#ffd54a" stroke-width="2"/>'
        if number is not None:
            yield _text(str(number), x, y + 4, anchor="middle", colour="#ffd54a", size=11)
    yield "</g>"


def _text(
    words: str,
    x: float,
    y: float,
    *,
    anchor: str,
    opacity: float = 1,
    colour: str = "currentColor",
    size: int = 13,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
        f'opacity="{opacity}">{escape(words)}</text>'
    )
