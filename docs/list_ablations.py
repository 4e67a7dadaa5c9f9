"""`python docs/list_ablations.py` writes the tables and the picture of docs/ablations.md from the committed rows.

The rows are those of `vot ablate --out benchmarks/results/ablations.json`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import listing

from vot_kernels.pipelines.ablation.picture import draw
from vot_kernels.pipelines.ablation.summary import LEGEND, part_table

PAGE = Path(__file__).with_name("ablations.md")
PICTURE = Path(__file__).with_name("ablations.svg")
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "ablations.json"
MARK = "ablations"


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The tables of all parts."""
    for part in result["parts"]:
        head, *rows = part_table(part)
        yield from (f"### {part['name'].capitalize()}", "", f"{part['question']} {amount(part)}", "")
        yield from listing.table(head, [f"| {' | '.join(row)} |" for row in rows])
        yield ""
    yield LEGEND


def amount(part: Mapping[str, Any]) -> str:
    """How much was run of a part, in a sentence."""
    if part["task"] == "answers":
        return f"Answers of `vot eval digitworld`, in {part['seeds']} thirds."
    if not part["steps"]:
        return f"{part['clips']} held-out clips for each of {part['seeds']} seeds."
    each = "of each stage" if part["task"] == "reinforcement" else "each"
    return f"{part['seeds']} seeds, {part['steps']} steps {each}, {part['clips']} held-out clips."


if __name__ == "__main__":
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    listing.write(PAGE, MARK, lines(result))
    draw(result, PICTURE)
