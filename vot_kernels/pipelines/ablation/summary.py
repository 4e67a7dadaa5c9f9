"""What the runs say: means and spreads, which differences are none, as tables and as a picture."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from vot_kernels.pipelines.ablation.parts import MEASURES, Part, Variant

RowsOf = Callable[[Part, Variant], Sequence[Mapping[str, Any]]]
LEGEND = (
    "Mean ± half of the spread between the seeds. Compared with the first line: + better, − worse, = no difference, "
    "since the means differ by no more than the larger of the two spreads."
)
_OUTCOMES = {"better": "+", "worse": "−", "none": "="}


def summarise(parts: Sequence[Part], rows_of: RowsOf) -> dict[str, Any]:
    """Return for each part its variants with the values of each measure, their mean, spread and outcome.

    The spread is that between the seeds, the largest value less the smallest. The outcome is that of the comparison
    with the first variant: "better" or "worse" where the means differ by more than the larger of the two spreads, else
    "none"; of the first variant it is None. A measure that a variant does not have is left out.
    """
    found = []
    for part in parts:
        variants: list[dict[str, Any]] = []
        for variant in part.variants:
            rows = rows_of(part, variant)
            measured = {
                name: _values([row["metrics"][name] for row in rows])
                for name in part.measures
                if name in rows[0]["metrics"]
            }
            first = variants[0]["measures"] if variants else {}
            for name, values in measured.items():
                values["outcome"] = _outcome(name, values, first.get(name))
            cost = {name: rows[0][name] for name in ("parameters", "operations") if name in rows[0]}
            variants.append({"name": variant.name, **cost, "measures": measured})
        runs = {name: rows[0]["run"][name] for name in ("steps", "clips")}
        found.append(
            {
                "name": part.name,
                "question": part.question,
                "task": part.task,
                "measures": list(part.measures),
                **runs,
                "seeds": len(rows),
                "variants": variants,
            }
        )
    return {"parts": found}


def _values(values: Sequence[float]) -> dict[str, Any]:
    return {"values": list(values), "mean": fmean(values), "spread": max(values) - min(values)}


def _outcome(name: str, found: Mapping[str, Any], first: Mapping[str, Any] | None) -> str | None:
    if first is None:
        return None
    difference = found["mean"] - first["mean"]
    if abs(difference) <= max(found["spread"], first["spread"]):
        return "none"
    return "better" if (difference > 0) == MEASURES[name].more_is_better else "worse"


def part_table(part: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a part's table, the heads of its columns first."""
    has_cost = "parameters" in part["variants"][0]
    heads = ["variant", *(["parameters", "GFLOP a step"] if has_cost else [])]
    rows = [[*heads, *(MEASURES[name].title for name in part["measures"])]]
    for variant in part["variants"]:
        cost = [f"{variant['parameters']:,}", f"{variant['operations'] / 1e9:.1f}"] if has_cost else []
        cells = [_cell(name, variant["measures"].get(name)) for name in part["measures"]]
        rows.append([variant["name"], *cost, *cells])
    return rows


def _cell(name: str, values: Mapping[str, Any] | None) -> str:
    """Return the mean, half of the spread, and the outcome: "+" better, "−" worse, "=" no difference."""
    if values is None:
        return "–"
    digits = MEASURES[name].digits
    sign = f" {_OUTCOMES[values['outcome']]}" if values["outcome"] else ""
    return f"{values['mean']:.{digits}f} ± {values['spread'] / 2:.{digits}f}{sign}"


def format_summary(result: Mapping[str, Any]) -> str:
    """Return all tables as plain text."""
    texts = []
    for part in result["parts"]:
        rows = part_table(part)
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        texts.append("\n".join([f"{part['name']}: {part['question']}", *lines]))
    return "\n\n".join([*texts, LEGEND])
