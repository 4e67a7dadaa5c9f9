"""Time and memory over tokens: one picture per suite, direction and family of sizes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import median
from typing import Any

from benchmarks.report.figures import floor_s, is_timed
from benchmarks.report.runs import DIRECTION_NAMES, Row, Section
from benchmarks.report.tables import device_name

# Okabe and Ito's palette, told apart by all kinds of colour vision; its yellow is too pale on white.
OURS = ("#0072B2", "#009E73", "#56B4E9")
PEERS = ("#D55E00", "#E69F00", "#CC79A7", "#7F7F7F", "#000000")
DASHES = ("-", "-.", ":")  # dashed is the floor
MARKERS = "osD^vPX"
FLOOR = {"color": "#444444", "linestyle": "--", "linewidth": 1.2, "zorder": 1}
ROWS = 4  # families in one picture
COLORS = 128  # of a picture's palette: edges stay smooth, files stay small
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
    """One workload in one direction: the rows that were timed."""

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
    """Workloads that differ in size alone, smallest first; with `alike` False, ones that have no such relatives."""

    title: str
    races: tuple[Race, ...]
    alike: bool = True

    @property
    def xs(self) -> list[float]:
        return [float(race.size) if self.alike else float(i) for i, race in enumerate(self.races)]


def plots(section: Section, prefix: str) -> Iterator[Plot]:
    """All pictures of a device; `prefix` begins their file names."""
    for suite in section.suites:
        styles = _styles(section, suite)
        for direction, direction_name in DIRECTION_NAMES.items():
            found = families_of(section, suite, direction)
            for begin in range(0, len(found), ROWS):
                number = str(begin // ROWS + 1) if len(found) > ROWS else ""
                title = f"{suite}, {direction_name}" + (f" ({number})" if number else "")
                name = "-".join(filter(None, (prefix, slug(suite), direction, number)))
                png = _draw(f"{title}: {device_name(section)}", found[begin : begin + ROWS], styles)
                yield Plot(suite, f"{name}.png", title, png)


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def families_of(section: Section, suite: str, direction: str) -> list[Family]:
    """By what their names and descriptions share once the sizes are taken out; the others together at the end."""
    families: dict[str, list[Race]] = {}
    for (own_suite, workload, own_direction), rows in section.races.items():
        timed = tuple(row for row in rows if is_timed(row) and row.size)
        if (own_suite, own_direction) == (suite, direction) and timed:
            race = Race(workload, timed[0].size or 0, timed)
            families.setdefault(_shared(timed[0]), []).append(race)
    found, alone = [], []
    for title, races in families.items():
        if len({race.size for race in races}) > 1:
            found.append(Family(title, tuple(sorted(races, key=lambda race: race.size))))
        else:
            alone += races
    if alone:
        title = _described(alone[0].rows[0]) if len(alone) == 1 else ""
        found.append(Family(title, tuple(sorted(alone, key=lambda race: race.size)), alike=False))
    return found


def _described(row: Row) -> str:
    return ", ".join(filter(None, (row.op, row.describe, row.dtype)))


def _shared(row: Row) -> str:
    """What a workload has in common with the others of its family."""
    name = re.sub(r"[-_ ]{2,}", "-", _SIZE_IN_NAME.sub("", row.workload)).strip("-_ ")
    parts = [
        part
        for part in _SIZE_IN_TEXT.sub(r"\1", row.describe).split(", ")
        if part not in ("tokens", "patches")
    ]
    return ", ".join(filter(None, [row.op, *parts, row.dtype])) + (f" ({name})" if name else "")


def _styles(section: Section, suite: str) -> dict[str, dict[str, Any]]:
    """How a provider is drawn, ours first: the same in all pictures of a suite."""
    rows = {row.provider: row for race, rows in section.races.items() if race[0] == suite for row in rows}
    styles: dict[str, dict[str, Any]] = {}
    for ours, palette, width, size in ((True, OURS, 3.0, 7), (False, PEERS, 1.3, 4.5)):
        for i, name in enumerate(sorted(name for name, row in rows.items() if row.ours == ours)):
            styles[name] = {
                "color": palette[i % len(palette)],
                "linestyle": DASHES[i // len(palette) % len(DASHES)],
                "linewidth": width,
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": size,
                "zorder": 3 if ours else 2,
            }
    return styles


def _draw(title: str, families: Sequence[Family], styles: Mapping[str, dict[str, Any]]) -> bytes:
    """Time on the left, memory on the right, a family a row."""
    matplotlib = _matplotlib()
    names = [name for name in styles if any(race.row(name) for family in families for race in family.races)]
    height = max(0.8 + 2.8 * len(families), 1 + 0.2 * len(names))
    figure = matplotlib.figure.Figure(figsize=(10, height), dpi=90, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for family, (time_axes, memory_axes) in zip(
        families, figure.subplots(len(families), 2, squeeze=False), strict=True
    ):
        time_axes.set_title(family.title, fontsize=9, loc="left")
        for name in names:
            rows = [race.row(name) for race in family.races]
            _line(time_axes, family, [_milliseconds(row) for row in rows], styles[name])
            _line(memory_axes, family, [_mebibytes(row) for row in rows], styles[name])
        floors = [race.floor_s and 1e3 * race.floor_s for race in family.races]
        _line(
            time_axes, family, floors, FLOOR if family.alike else {**FLOOR, "marker": "_", "markersize": 16}
        )
        for axes, label in ((time_axes, "whole op, ms"), (memory_axes, "peak memory, MiB")):
            _dress(axes, label, family, matplotlib.ticker)
    lines = [matplotlib.lines.Line2D([], [], **styles[name], label=name) for name in names]
    lines.append(matplotlib.lines.Line2D([], [], **FLOOR, label="floor (measured ceilings)"))
    figure.legend(handles=lines, loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _line(axes: Any, family: Family, values: Sequence[float | None], style: Mapping[str, Any]) -> None:
    """A line over the sizes of a family; unconnected points where its members are not alike."""
    points = [(x, value) for x, value in zip(family.xs, values, strict=True) if value]
    if points:
        axes.plot(*zip(*points, strict=True), **(style if family.alike else {**style, "linestyle": "none"}))


def _dress(axes: Any, label: str, family: Family, ticker: Any) -> None:
    """Scales, ticks and labels."""
    axes.set_ylabel(label, fontsize=9)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    axes.yaxis.set_major_locator(
        ticker.MaxNLocator(4) if high / low < 8 else ticker.LogLocator(subs=steps, numticks=12)
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    if family.alike:
        axes.set_xscale("log")
        axes.set_xlabel("tokens", fontsize=9)
        ticks = _apart(sorted(set(family.xs)))
        axes.set_xticks(ticks, [_tokens(int(tick)) for tick in ticks])
    else:
        names = [f"{race.workload}\n{_tokens(race.size)} tokens" for race in family.races]
        few = len(names) < 4
        axes.set_xticks(family.xs, names, rotation=0 if few else 30, ha="center" if few else "right")
        axes.set_xlim(-0.5, len(names) - 0.5)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Any) -> bytes:
    """The picture with a small palette: a third of the bytes."""
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
    """Sizes whose labels do not touch on a logarithmic axis."""
    kept: list[float] = []
    for size in sizes:
        if not kept or size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _tokens(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


def _matplotlib() -> Any:
    """matplotlib without pyplot: no display and no global state is touched."""
    try:
        import matplotlib.figure
        import matplotlib.lines
        import matplotlib.ticker
    except ImportError:
        raise ImportError("The plots need matplotlib: pip install 'vot-kernels[bench]'") from None
    return matplotlib
