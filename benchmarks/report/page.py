"""The report as one self-contained HTML page: plots are embedded, and nothing is loaded."""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from benchmarks.report.plots import Plot
from benchmarks.report.runs import Section
from benchmarks.report.tables import (
    COLUMNS,
    LEGEND,
    NOISY,
    Group,
    Kind,
    Line,
    captions,
    device_name,
    groups,
    is_partial,
    not_installed,
)

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #5b6470; --line: #d5dae0;
  --head: #f1f3f5; --ours: #e8f1fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --back: #14171a; --soft: #9aa4af; --line: #343b43;
  --head: #20252a; --ours: #16293b; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 80rem; padding: 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%;
  table-layout: fixed; }
th, td { padding: .3rem .4rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--head); }
thead th { width: 7%; overflow-wrap: normal; }
thead th:first-child { width: 22%; }
thead th:nth-child(2), thead th:nth-child(3), thead th:nth-child(4) { width: 16%; }
thead th:last-child { width: 9%; }
th:first-child, td:first-child, td.why { text-align: left; }
td.figure span { display: inline-block; white-space: nowrap; }
td.noisy { color: var(--bad); }
tr.group th { text-align: left; padding-top: .9rem; font-weight: 400; background: none; }
tr.ours { background: var(--ours); font-weight: 600; }
tr.untimed td { color: var(--soft); }
tr.mismatch td { color: var(--bad); }
tr.mismatch td.why, .partial { color: var(--bad); font-weight: 700; }
.caption, .legend { color: var(--soft); font-size: 13px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .8rem 0; }
@media (max-width: 60rem) { table, tbody, tr, th, td { display: block; text-align: left; }
  thead { display: none; } tr { border-bottom: 1px solid var(--line); padding: .2rem 0; }
  th, td { border: 0; padding: .1rem .4rem; } td.figure::before { content: attr(data-column) ": ";
  color: var(--soft); font-weight: 400; } }
""".strip()


def page(sections: Sequence[Section], plots: Sequence[Sequence[Plot]]) -> str:
    """Return the whole page; `plots[i]` are those of `sections[i]`."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>vot-kernels benchmarks</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>",
        f'<h1>vot-kernels benchmarks</h1>\n<p class="legend">{escape(LEGEND)}</p>',
    ]
    for section, own in zip(sections, plots, strict=True):
        partial = ' <span class="partial">partial run</span>' if is_partial(section) else ""
        parts.append(f"<h2>{escape(device_name(section))}{partial}</h2>")
        for lines in captions(section):
            parts.append(f'<p class="caption">{"<br>".join(escape(text) for text in lines)}</p>')
        for suite in section.suites:
            parts += [f"<h3>{escape(suite)}</h3>", _table(list(groups(section, suite)))]
            parts += [f"<p>{escape(text)}</p>"] if (text := not_installed(section, suite)) else []
            parts += [_image(plot) for plot in own if plot.suite == suite]
    return "\n".join([*parts, "</body>\n</html>\n"])


def _table(found: Sequence[Group]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = [f"<thead><tr>{head}</tr></thead>"]
    for group in found:
        title = f"<b>{escape(group.workload)}, {escape(group.direction)}</b> {escape(group.describe)}"
        rows.append(f'<tr class="group"><th colspan="{len(COLUMNS)}">{title}</th></tr>')
        for line in group.lines:
            rows.append(f'<tr class="{line.kind}">{_cells(line)}</tr>')
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _cells(line: Line) -> str:
    """Return the provider, then its figures, or in place of these why there are none."""
    provider, *others = map(escape, line.cells)
    if line.kind in (Kind.UNTIMED, Kind.MISMATCH):
        found = [f'<td class="why" colspan="{len(COLUMNS) - 1}">{others[0]}</td>']
    else:
        found = [_figure(column, text) for column, text in zip(COLUMNS[1:], others, strict=True)]
    return "".join([f"<td>{provider}</td>", *found])


def _figure(column: str, text: str) -> str:
    """Return a cell that can break only before its spread or its quartiles."""
    kind = "figure noisy" if NOISY in text else "figure"
    parts = " ".join(f"<span>{part}</span>" for part in re.split(r" (?=[±(])", text))
    return f'<td class="{kind}" data-column="{escape(column)}">{parts}</td>'


def _image(plot: Plot) -> str:
    data = b64encode(plot.png).decode("ascii")
    return f'<img alt="{escape(plot.title, quote=True)}" src="data:image/png;base64,{data}">'
