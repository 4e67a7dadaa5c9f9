"""Plots of time and memory: one picture per suite and direction, with a row for each family of sizes.

Workloads that differ only in size form a line over the tokens. A workload without such relatives is drawn as bars.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from statistics import median
from typing import Any

from benchmarks.report.figures import floor_s, in_order, is_timed
from benchmarks.report.runs import DIRECTION_NAMES, Row, Section
from benchmarks.report.tables import NOISY_SPREAD, device_name, is_noisy, milliseconds, number

# Okabe and Ito's palette, distinguishable with all kinds of colour vision. Only ours is blue; yellow is too pale on
# white.
OURS = "#0072B2"
PEERS = ("#D55E00", "#E69F00", "#CC79A7", "#009E73", "#7F7F7F", "#000000", "#8B5A2B")
DASHES = ("-", "-.", ":")  # dashed is the floor
MARKERS = "osD^vPX"
FLOOR = {"color": "#444444", "linestyle": "--", "linewidth": 1.2, "zorder": 1}
FLOOR_LABEL = "floor (measured ceilings)"
BAR = {"linewidth": 1, "height": 0.7}
ROWS = 4  # families in one picture
COLORS = 128  # of a picture's palette, so that edges stay smooth and files small
Styles = Mapping[str, Mapping[str, Any]]
_HOLLOW = {"linestyle": "none", "markerfacecolor": "white", "zorder": 4}
_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])\d+(\.\d+)?[km]?(?![a-z0-9])", re.IGNORECASE)
_SIZE_IN_TEXT = re.compile(r"\b[\d,]+ (tokens|patches)\b(?: in \d+ segments?\b)?")


@dataclass(frozen=True)
class Plot:
    """A picture, its file name and what it shows."""

    suite: str
    file: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Race:
    """The timed rows of one workload in one direction."""

    workload: str
    size: int
    rows: tuple[Row, ...]

    @property
    def floor_s(self) -> float | None:
        return next((floor for floor in map(floor_s, self.rows) if floor is not None), None)

    def row(self, provider: str) -> Row | None:
        return next((row for row in self.rows if row.provider == provider), None)


@dataclass(frozen=True)
class Family:
    """Workloads that differ only in size, smallest first, or a single one."""

    title: str
    races: tuple[Race, ...]

    @property
    def xs(self) -> list[float]:
        return [float(race.size) for race in self.races]

    @property
    def is_line(self) -> bool:
        """Whether there are several sizes to draw a line through."""
        return len(self.races) > 1


def plots(section: Section, prefix: str, styles: Styles) -> Iterator[Plot]:
    """Yield all pictures of a device; `prefix` begins their file names, `styles` are `styles_of` the whole report."""
    for suite in section.suites:
        for direction, direction_name in DIRECTION_NAMES.items():
            found = families_of(section, suite, direction)
            for begin in range(0, len(found), ROWS):
                number = str(begin // ROWS + 1) if len(found) > ROWS else ""
                title = f"{suite}, {direction_name}" + (f" ({number})" if number else "")
                name = "-".join(filter(None, (prefix, slug(suite), direction, number)))
                png = _draw(f"{title}: {device_name(section)}", found[begin : begin + ROWS], styles)
                yield Plot(suite, f"{name}.png", title, png)


def styles_of(sections: Sequence[Section]) -> Styles:
    """Return how each timed provider is drawn, ours first; the same in all pictures of a report.

    All of ours have one colour, with different markers and dashes. Peers that meet in a suite look different.
    """
    rows = [row for section in sections for rows in section.races.values() for row in rows if is_timed(row)]
    suites: dict[str, set[str]] = {}
    for row in rows:
        suites.setdefault(row.provider, set()).add(row.suite)
    styles: dict[str, Mapping[str, Any]] = {}
    for ours, colors, width, size in ((True, (OURS,), 3.0, 7), (False, PEERS, 1.3, 4.5)):
        looks: dict[str, int] = {}
        names = {row.provider for row in rows if row.ours == ours}
        for name in sorted(names, key=lambda name: (-len(suites[name]), name)):
            taken = {look for other, look in looks.items() if suites[other] & suites[name]}
            i = looks[name] = next(look for look in count() if look not in taken)
            styles[name] = {
                "color": colors[i % len(colors)],
                "linestyle": DASHES[i // len(colors) % len(DASHES)],
                "linewidth": width,
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": size,
                "zorder": 3 if ours else 2,
            }
    return styles


def slug(text: str) -> str:
    """Return `text` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def families_of(section: Section, suite: str, direction: str) -> list[Family]:
    """Group workloads by what their names and descriptions share without sizes; single workloads come last."""
    families: dict[str, list[Race]] = {}
    for (own_suite, workload, own_direction), rows in section.races.items():
        timed = tuple(row for row in rows if is_timed(row) and row.size)
        if (own_suite, own_direction) == (suite, direction) and timed:
            race = Race(workload, timed[0].size or 0, timed)
            families.setdefault(_shared(timed[0]), []).append(race)
    found, single = [], []
    for title, races in families.items():
        if len({race.size for race in races}) > 1:
            found.append(Family(title, tuple(sorted(races, key=lambda race: race.size))))
        else:
            single += [Family(f"{race.workload}: {_described(race.rows[0])}", (race,)) for race in races]
    return found + sorted(single, key=lambda family: family.xs)


def _described(row: Row) -> str:
    return ", ".join(filter(None, (row.op, row.describe, row.dtype)))


def _shared(row: Row) -> str:
    """Return what a workload has in common with the others of its family."""
    name = re.sub(r"[-_ ]{2,}", "-", _SIZE_IN_NAME.sub("", row.workload)).strip("-_ ")
    parts = [
        part
        for part in _SIZE_IN_TEXT.sub(r"\1", row.describe).split(", ")
        if part not in ("tokens", "patches")
    ]
    return ", ".join(filter(None, [row.op, *parts, row.dtype])) + (f" ({name})" if name else "")


def _draw(title: str, families: Sequence[Family], styles: Styles) -> bytes:
    """Draw time on the left and memory on the right, a family per row; the legend explains lines, bars have names."""
    matplotlib = _matplotlib()
    lines = [family for family in families if family.is_line]
    names = [name for name in styles if any(race.row(name) for family in lines for race in family.races)]
    legend = [matplotlib.lines.Line2D([], [], **styles[name], label=name) for name in names]
    heights = [2.8 if family.is_line else 0.7 + 0.22 * len(family.races[0].rows) for family in families]
    figure = matplotlib.figure.Figure(
        figsize=(10, max(0.5 + sum(heights), 0.2 * len(names))), dpi=90, layout="constrained"
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    grid = figure.subplots(len(families), 2, squeeze=False, height_ratios=heights)
    for family, (time_axes, memory_axes) in zip(families, grid, strict=True):
        time_axes.set_title(family.title, fontsize=9, loc="left")
        if not family.is_line:
            _bars(time_axes, memory_axes, family.races[0], styles)
            continue
        for name in names:
            rows = [race.row(name) for race in family.races]
            _line(time_axes, family, [_milliseconds(row) for row in rows], styles[name])
            _line(memory_axes, family, [_mebibytes(row) for row in rows], styles[name])
            noisy = [_milliseconds(row) if row and is_noisy(row.whole_s) else None for row in rows]
            _line(time_axes, family, noisy, {**styles[name], **_HOLLOW})
        floors = [race.floor_s and 1e3 * race.floor_s for race in family.races]
        _line(time_axes, family, floors, FLOOR)
        for axes, label in ((time_axes, "whole op, ms"), (memory_axes, "peak memory, MiB")):
            _dress(axes, label, family, matplotlib.ticker)
    if lines:
        legend.append(matplotlib.lines.Line2D([], [], **FLOOR, label=FLOOR_LABEL))
        if any(is_noisy(row.whole_s) for family in lines for race in family.races for row in race.rows):
            hollow = {**_HOLLOW, "color": OURS, "marker": "o"}
            label = f"hollow: ± more than {100 * NOISY_SPREAD:.0f} %"
            legend.append(matplotlib.lines.Line2D([], [], **hollow, label=label))
        figure.legend(handles=legend, loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _line(axes: Any, family: Family, values: Sequence[float | None], style: Mapping[str, Any]) -> None:
    """Draw a line over the sizes of a family."""
    points = [(x, value) for x, value in zip(family.xs, values, strict=True) if value]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _bars(time_axes: Any, memory_axes: Any, race: Race, styles: Styles) -> None:
    """Draw a bar for every provider, in the order of the tables, and one for the floor."""
    rows = in_order(race.rows)
    names = [row.provider for row in rows]
    colors = [styles[name]["color"] for name in names]
    times = [_milliseconds(row) or 0.0 for row in rows]
    time_axes.barh(names, times, color=colors, edgecolor=colors, **BAR)
    labels = [milliseconds(row.whole_s) for row in rows]
    if race.floor_s is not None:
        names, times = [*names, FLOOR_LABEL], [*times, 1e3 * race.floor_s]
        edge = {"edgecolor": FLOOR["color"], "linestyle": FLOOR["linestyle"]}
        time_axes.barh(names[-1:], times[-1:], color="none", **edge, **BAR)
        labels.append(f"{number(times[-1])} ms")
    memory = [_mebibytes(row) or 0.0 for row in rows]
    memory_axes.barh(range(len(rows)), memory, color=colors, edgecolor=colors, **BAR)
    memory_labels = [
        "" if row.peak_bytes is None else f"{number(row.peak_bytes / 2**20)} MiB" for row in rows
    ]
    for axes, values, texts in ((time_axes, times, labels), (memory_axes, memory, memory_labels)):
        for place, (value, text) in enumerate(zip(values, texts, strict=True)):
            axes.annotate(text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, 1.45 * max([*values, 1e-9]))
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
        axes.tick_params(labelsize=8, length=0)
        axes.xaxis.set_ticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    memory_axes.yaxis.set_ticks([])
    time_axes.set_xlabel("whole op, ms", fontsize=9)
    memory_axes.set_xlabel("peak memory, MiB", fontsize=9)


def _dress(axes: Any, label: str, family: Family, ticker: Any) -> None:
    """Set scales, ticks and labels of lines."""
    axes.set_ylabel(label, fontsize=9)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    axes.yaxis.set_major_locator(
        ticker.MaxNLocator(4) if high / low < 8 else ticker.LogLocator(subs=steps, numticks=12)
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xscale("log")
    axes.set_xlabel("tokens", fontsize=9)
    ticks = _apart(sorted(set(family.xs)))
    axes.set_xticks(ticks, [_tokens(int(tick)) for tick in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Any) -> bytes:
    """Return the picture with a small palette, a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    png = BytesIO()
    image.convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(png, format="png", optimize=True)
    return png.getvalue()


def _milliseconds(row: Row | None) -> float | None:
    return None if row is None else 1e3 * median(row.whole_s)


def _mebibytes(row: Row | None) -> float | None:
    return None if row is None or row.peak_bytes is None else row.peak_bytes / 2**20


def _apart(sizes: Sequence[float]) -> list[float]:
    """Return sizes whose labels do not touch on a logarithmic axis."""
    kept: list[float] = []
    for size in sizes:
        if not kept or size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _tokens(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


def _matplotlib() -> Any:
    """Return matplotlib without pyplot, so that no display and no global state is touched."""
    try:
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    except ImportError:
        raise ImportError("The plots need matplotlib: pip install 'vot-kernels[bench]'") from None
    return matplotlib
