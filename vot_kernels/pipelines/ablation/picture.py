"""A picture of ablations as SVG: a dot for each seed and a line at the mean."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from vot_kernels.files import atomic_write
from vot_kernels.pipelines.ablation.parts import MEASURES

_NAMES, _SCALE, _ROW, _GAP, _EDGE = 190, 480, 20, 40, 12  # px
_FOUND, _NONE = "#0072B2", "#999999"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the first measure of every part; grey is no difference from the first variant."""
    shapes: list[str] = []
    top = 0
    for part in result["parts"]:
        name = part["measures"][0]
        measured = [(v["name"], v["measures"][name]) for v in part["variants"] if name in v["measures"]]
        better = "more" if MEASURES[name].more_is_better else "less"
        title = f"{part['name']}: {MEASURES[name].title} ({better} is better)"
        shapes += [_text(_EDGE, top + 18, title, "start", "bold"), *_rows(measured, name, top + _GAP)]
        top += _GAP + _ROW * len(measured) + _ROW
    size = f'width="{_NAMES + _SCALE + 2 * _EDGE}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    background = '<rect width="100%" height="100%" fill="white"/>'
    with atomic_write(path) as draft:
        draft.write_text("\n".join([head, background, *shapes, "</svg>\n"]), encoding="utf-8")


def _rows(measured: list[tuple[str, Mapping[str, Any]]], name: str, top: int) -> Iterator[str]:
    """Yield a line per variant, and below them the ends of the scale."""
    values = [value for _, found in measured for value in found["values"]]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return _NAMES + _EDGE + (value - low) / span * (_SCALE - 2 * _EDGE)

    for row, (title, found) in enumerate(measured):
        y, colour = top + _ROW * row, _NONE if found["outcome"] == "none" else _FOUND
        yield _text(_NAMES - _EDGE, y + 4, title, "end")
        yield f'<path d="M{_NAMES} {y}h{_SCALE}" stroke="#dddddd"/>'
        yield f'<path d="M{place(found["mean"]):.1f} {y - 7}v14" stroke="{colour}" stroke-width="2"/>'
        for value in found["values"]:
            yield f'<circle cx="{place(value):.1f}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.6"/>'
    below = top + _ROW * len(measured) + 2
    for value, anchor in ((low, "start"), (high, "end")):
        yield _text(place(value), below, f"{value:.{MEASURES[name].digits}f}", anchor)


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
