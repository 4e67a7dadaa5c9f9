"""A contact sheet: the frames of a clip in a grid, with the tracklets of its scene graph drawn in."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vot_kernels.extras import imports_for
from vot_kernels.files import atomic_write

with imports_for("A contact sheet", "video"):
    from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vot_kernels.data.video import VideoClip
    from vot_kernels.scene_graph.graph import STSG, Box, Event, Tracklet

MIN_CELL_PX = 240  # shorter side of a frame on the sheet, so that 64 px frames are readable
MAX_CELL_PX = 320  # longer side, so that a sheet of large frames keeps a manageable size

_MARGIN, _GAP, _CAPTION, _LINE = 20, 12, 22, 24
_BACKGROUND, _PANEL, _INK, _FAINT, _EVENT = "#14161a", "#20242b", "#e8eaed", "#9aa0a6", "#ffd54a"
# Hues far apart on the wheel, light enough for dark video and for the dark sheet. A track whose attributes name a
# colour is drawn in that colour, the others in the remaining ones.
_NAMED_COLOURS = {
    "red": "#ff5252", "green": "#69d36e", "blue": "#6ea8ff", "yellow": "#ffe94d", "magenta": "#f06be0",
    "cyan": "#4dd9e6", "orange": "#ffa040", "white": "#f5f5f5",
}  # fmt: skip
_TRACK_COLOURS = (
    "#4fc3f7", "#ff8a65", "#aed581", "#ba68c8", "#fff176", "#f06292",
    "#4db6ac", "#ffb74d", "#9fa8da", "#e57373", "#dce775", "#80cbc4",
)  # fmt: skip


_Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def save_contact_sheet(
    path: str | os.PathLike[str],
    clip: "VideoClip",
    stsg: "STSG | None",
    *,
    title: str | None = None,
    columns: int | None = None,
    max_frames: int = 16,
) -> Path:
    """Draw a clip and its scene graph as one PNG.

    Each cell shows a frame with its time, the boxes of the tracklets in it (one colour per track, with id and
    name), where each tracklet's centre has been before, and the events at that frame. A legend lists tracks.

    Args:
        path: the file to write; its name must end in ".png".
        clip: the frames, uint8 RGB `[frames, height, width, 3]`, and their times.
        stsg: the scene graph of these frames, where frame index k is `clip.frames[k]`; None draws none.
        title: a heading.
        columns: cells per row; by default the sheet is somewhat wider than high.
        max_frames: of a longer clip, this many frames are shown: those with events first, then others, evenly spread.

    Returns:
        The path written.

    Raises:
        ValueError: a wrong file name, no frames, or a scene graph with another number of frames.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"A contact sheet is a PNG, so its name must end in '.png', got '{target}'.")
    image = contact_sheet(clip, stsg, title=title, columns=columns, max_frames=max_frames)
    with atomic_write(target) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return target


def contact_sheet(
    clip: "VideoClip",
    stsg: "STSG | None",
    *,
    title: str | None = None,
    columns: int | None = None,
    max_frames: int = 16,
) -> Image.Image:
    """Return what `save_contact_sheet` writes, as an RGB image of Pillow."""
    _check(clip, stsg, columns, max_frames)
    shown = _choose(len(clip.frames), stsg.events if stsg else (), max_frames)
    return _Sheet.plan(clip, stsg, shown, columns, title).draw()


def _check(clip: "VideoClip", stsg: "STSG | None", columns: int | None, max_frames: int) -> None:
    for name, value in (("columns", columns), ("max_frames", max_frames)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}.")
    if len(clip.frames) == 0:
        raise ValueError("A contact sheet needs at least one frame, but the clip has none.")
    if stsg is not None and len(stsg.frame_times_s) != len(clip.frames):
        raise ValueError(
            f"The scene graph must have the clip's {len(clip.frames)} frames, but it has"
            f" {len(stsg.frame_times_s)} frame times."
        )


def _choose(count: int, events: "Sequence[Event]", most: int) -> list[int]:
    """Return the frames to show: all if they fit, else those with events and an even spread of the others."""
    if count <= most:
        return list(range(count))
    chosen = sorted({event.t for event in events if 0 <= event.t < count})
    if len(chosen) >= most:
        return [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).round().astype(int)]
    spread = [int(k) for k in np.linspace(0, count - 1, most).round()]
    # The frames with events replace the nearest of the evenly spread ones.
    for event in chosen:
        if event not in spread:
            free = [k for k in spread if k not in chosen]
            spread.remove(min(free, key=lambda k: abs(k - event)))
            spread.append(event)
    return sorted(spread)


def track_colours(tracklets: "Sequence[Tracklet]") -> list[str]:
    """Return one colour per track: the one that its attributes name if it is free, else the next free one."""
    colours = [
        next((_NAMED_COLOURS[a] for a in t.attributes if a in _NAMED_COLOURS), None) for t in tracklets
    ]
    colours = [c if c not in colours[:i] else None for i, c in enumerate(colours)]
    free = itertools.cycle([c for c in _TRACK_COLOURS if c not in colours] or _TRACK_COLOURS)
    return [c or next(free) for c in colours]


def _says(event: "Event") -> str:
    """Describe the event in words: "o1 hits o2"."""
    return (
        " ".join((event.participants[0], event.kind, *event.participants[1:]))
        if event.participants
        else event.kind
    )


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _fit(text: str, font: Any, width: float) -> str:
    """Return the text, shortened with dots if it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


@dataclass(frozen=True)
class _Sheet:
    """Sizes and content of one sheet, in pixels."""

    clip: "VideoClip"
    stsg: "STSG | None"
    shown: list[int]
    columns: int
    cell: tuple[int, int]
    title: str | None
    tracklets: "tuple[Tracklet, ...]"
    colours: list[str]  # one per tracklet
    legend: list[str]
    legend_columns: int

    @classmethod
    def plan(
        cls, clip: "VideoClip", stsg: "STSG | None", shown: list[int], columns: int | None, title: str | None
    ) -> "_Sheet":
        height, width = clip.frames.shape[1:3]
        cell = _cell_size(width, height)
        if columns is None:  # a sheet about 1.4 times as wide as high
            ideal = math.sqrt(1.4 * len(shown) * (cell[1] + _CAPTION) / cell[0])
            near = range(max(1, math.floor(ideal)), math.ceil(ideal) + 1)
            columns = min(near, key=lambda n: (-len(shown) % n, abs(n - ideal)))  # fewest empty cells
        columns = max(1, min(columns, len(shown)))
        tracklets = tuple(stsg.tracklets) if stsg else ()
        colours = track_colours(tracklets)
        legend = [f"{t.id}  {t.name}  ({_extent(t, clip)})" for t in tracklets]
        inner = columns * (cell[0] + _GAP) - _GAP
        widest = max((_font(14).getlength(text) for text in legend), default=0) + 44
        legend_columns = max(1, int(inner // widest))
        return cls(clip, stsg, shown, columns, cell, title, tracklets, colours, legend, legend_columns)

    @property
    def rows(self) -> int:
        return math.ceil(len(self.shown) / self.columns)

    @property
    def top(self) -> int:
        return _MARGIN + (_LINE + 10 if self.title else 0)

    @property
    def legend_top(self) -> int:
        return self.top + self.rows * (self.cell[1] + _CAPTION + _GAP)

    @property
    def size(self) -> tuple[int, int]:
        width = 2 * _MARGIN + self.columns * (self.cell[0] + _GAP) - _GAP
        lines = math.ceil(len(self.legend) / self.legend_columns)
        return width, self.legend_top + lines * _LINE + _MARGIN - (_GAP if not lines else 0)

    def draw(self) -> Any:
        image = Image.new("RGB", self.size, _BACKGROUND)
        pen = ImageDraw.Draw(image)
        if self.title:
            font = _font(18)
            pen.text(
                (_MARGIN, _MARGIN - 4),
                _fit(self.title, font, self.size[0] - 2 * _MARGIN),
                fill=_INK,
                font=font,
            )
        for place, frame in enumerate(self.shown):
            row, column = divmod(place, self.columns)
            x = _MARGIN + column * (self.cell[0] + _GAP)
            y = self.top + row * (self.cell[1] + _CAPTION + _GAP)
            image.paste(self._frame(frame), (x, y))
            self._caption(pen, frame, x, y + self.cell[1])
        self._legend(pen)
        return image

    def _frame(self, k: int) -> Any:
        """Draw frame k, scaled to the cell, with boxes and trails."""
        picture = Image.fromarray(np.ascontiguousarray(self.clip.frames[k]))
        enlarged = self.cell[0] >= 2 * picture.width
        how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
        picture = picture.resize(self.cell, how)
        pen = ImageDraw.Draw(picture, "RGBA")
        events = self._events(k)
        involved = {name for event in events for name in event.participants}
        present = [(t, c) for t, c in zip(self.tracklets, self.colours, strict=True) if k in t.boxes]
        corners = [self._corners(tracklet.boxes[k][0]) for tracklet, _ in present]
        for tracklet, colour in present:
            self._trail(pen, tracklet, k, colour)
        for (tracklet, colour), where in zip(present, corners, strict=True):
            pen.rectangle(where, outline=colour, width=4 if tracklet.id in involved else 2)
        labels: list[_Rectangle] = []
        for (tracklet, colour), where in zip(present, corners, strict=True):
            texts = (f"{tracklet.id}  {tracklet.name}", tracklet.id)
            self._label(pen, where, texts, colour, labels, [other for other in corners if other is not where])
        if events:
            pen.rectangle((0, 0, self.cell[0] - 1, self.cell[1] - 1), outline=_EVENT, width=3)
        return picture

    def _corners(self, box: "Box") -> _Rectangle:
        width, height = self.cell
        x1, x2 = sorted(min(max(x, 0.0), 1.0) * (width - 1) for x in (box[0], box[2]))
        y1, y2 = sorted(min(max(y, 0.0), 1.0) * (height - 1) for y in (box[1], box[3]))
        return x1, y1, x2, y2

    def _trail(self, pen: Any, tracklet: "Tracklet", k: int, colour: str) -> None:
        """Draw past centres up to frame k, fading with age; a gap in the track is a gap in the line."""
        past = [frame for frame in sorted(tracklet.boxes) if frame <= k]
        centres = {}
        for frame in past:
            x1, y1, x2, y2 = self._corners(tracklet.boxes[frame][0])
            centres[frame] = ((x1 + x2) / 2, (y1 + y2) / 2)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        for older, newer in zip(past, past[1:], strict=False):
            fade = (red, green, blue, max(60, 230 - 16 * (k - newer)))
            if newer - older == 1:
                pen.line((*centres[older], *centres[newer]), fill=fade, width=2)
            x, y = centres[older]
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=fade)

    def _label(
        self,
        pen: Any,
        corners: _Rectangle,
        texts: tuple[str, str],
        colour: str,
        labels: list[_Rectangle],
        others: list[_Rectangle],
    ) -> None:
        """Write id and name beside the box, clear of labels and boxes; if necessary, the id alone or on a box."""
        font = _font(12)
        for obstacles, text in itertools.product(([*labels, *others], labels), texts):
            for spot in self._spots(corners, font.getlength(text) + 8, 16):
                if not any(_overlap(spot, other) for other in obstacles):
                    pen.rectangle(spot, fill=colour)
                    pen.text((spot[0] + 4, spot[1] + 1), text, fill="#101214", font=font)
                    labels.append(spot)
                    return

    def _spots(self, corners: _Rectangle, w: float, h: float) -> Iterator[_Rectangle]:
        """Yield places for a label of w × h pixels within the cell: above, below, right and left of the box."""
        width, height = self.cell
        left = min(max(corners[0], 0), width - 1 - w)
        right = min(max(corners[2] - w, 0), width - 1 - w)
        for x, y in (
            (left, corners[1] - h - 1),
            (right, corners[1] - h - 1),
            (left, corners[3] + 1),
            (right, corners[3] + 1),
            (corners[2] + 1, corners[1]),
            (corners[0] - w - 1, corners[1]),
            (left, corners[1] + 1),
        ):
            if x >= 0 and y >= 0 and x + w < width and y + h < height:
                yield x, y, x + w, y + h

    def _events(self, k: int) -> "list[Event]":
        return [event for event in (self.stsg.events if self.stsg else ()) if event.t == k]

    def _caption(self, pen: Any, k: int, x: int, y: int) -> None:
        """Write time and events under the frame."""
        font, width = _font(13), self.cell[0]
        pen.rectangle((x, y, x + width - 1, y + _CAPTION - 1), fill=_PANEL)
        clock = f"{float(self.clip.times[k]):.2f} s"
        pen.text((x + 6, y + 3), clock, fill=_FAINT, font=font)
        events = "; ".join(_says(event) for event in self._events(k))
        if events:
            left = font.getlength(clock) + 16
            words = _fit(events, font, width - left - 16)
            # The built-in font lacks this sign, so the marker is drawn.
            pen.regular_polygon((x + left + 5, y + _CAPTION / 2, 5), 4, rotation=45, fill=_EVENT)
            pen.text((x + left + 14, y + 3), words, fill=_EVENT, font=font)

    def _legend(self, pen: Any) -> None:
        font = _font(14)
        width = (self.size[0] - 2 * _MARGIN) / self.legend_columns
        for i, (colour, text) in enumerate(zip(self.colours, self.legend, strict=True)):
            row, column = divmod(i, self.legend_columns)
            x, y = _MARGIN + column * width, self.legend_top + row * _LINE
            pen.rectangle((x, y + 4, x + 14, y + 16), fill=colour)
            pen.text((x + 22, y + 1), _fit(text, font, width - 30), fill=_INK, font=font)


def _cell_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height of a frame on the sheet: whole multiples for small frames, to keep pixels square."""
    enlarge = math.ceil(MIN_CELL_PX / min(width, height))
    if enlarge > 1 and max(width, height) * enlarge <= 2 * MAX_CELL_PX:
        return width * enlarge, height * enlarge
    scale = MAX_CELL_PX / max(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _extent(tracklet: "Tracklet", clip: "VideoClip") -> str:
    """Return when a tracklet is seen: "0.00 to 1.88 s"."""
    frames = [k for k in tracklet.boxes if 0 <= k < len(clip.times)]
    if not frames:
        return "not seen"
    return f"{float(clip.times[min(frames)]):.2f} to {float(clip.times[max(frames)]):.2f} s"


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
