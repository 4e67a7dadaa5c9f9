"""The report as markdown."""

from collections.abc import Sequence

from benchmarks.report.plots import Plot
from benchmarks.report.runs import Section
from benchmarks.report.tables import (
    COLUMNS,
    LEGEND,
    Group,
    Kind,
    Line,
    captions,
    device_name,
    groups,
    is_partial,
    not_installed,
)


def report(sections: Sequence[Section], plots: Sequence[Sequence[Plot]]) -> str:
    """Return the whole report; `plots[i]` are those of `sections[i]`, in the same folder."""
    parts = ["# vot-kernels benchmarks", LEGEND]
    for section, own in zip(sections, plots, strict=True):
        parts.append(f"## {escape(device_name(section))}{' (partial run)' if is_partial(section) else ''}")
        parts += ["  \n".join(escape(text) for text in lines) for lines in captions(section)]
        for suite in section.suites:
            parts += [f"### {escape(suite)}", _suite_table(list(groups(section, suite)))]
            parts += [escape(text)] if (text := not_installed(section, suite)) else []
            parts += [f"![{escape(plot.title)}]({plot.file})" for plot in own if plot.suite == suite]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table of cells that are already markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def escape(text: str) -> str:
    """Return markdown that shows exactly this plain text, on one line."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|#~":
        text = text.replace(character, f"\\{character}")
    return text


def _suite_table(found: Sequence[Group]) -> str:
    rows = []
    for group in found:
        title = f"**{escape(group.workload)}, {group.direction}**: {escape(group.describe)}"
        for i, line in enumerate(group.lines):
            rows.append([title if i == 0 else "", *_cells(line)])
    return table(["workload", *COLUMNS], rows).rstrip("\n")


def _cells(line: Line) -> list[str]:
    cells = [escape(cell) for cell in line.cells] + [""] * (len(COLUMNS) - len(line.cells))
    if line.kind is Kind.OURS:
        cells[0] = f"**{cells[0]}**"
    if line.kind is Kind.MISMATCH:
        cells[1] = f"**{cells[1]}**"
    return cells
