"""README tables from raw results: `python -m benchmarks.report` rewrites what lies between the markers.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a test checks that every table is what the
committed JSON gives, so no figure in the README can be edited by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def cpu_table() -> str:
    """Ratios of medians, ours against each peer in the same run."""
    run = _read(RESULTS / "cpu-epyc-2threads.json")
    rows = []
    for result in run["results"]:
        ours, *peers = result["providers"]
        for peer in peers:
            milliseconds = [1e3 * result["providers"][name]["median_s"] for name in (ours, peer)]
            rows.append(
                [
                    f"{result['workload']}: {result['shape']}",
                    peer,
                    f"{milliseconds[0]:,.0f} / {milliseconds[1]:,.0f} ms",
                    f"**{result['speedup'][peer]:.1f} ×**",
                ]
            )
    machine = run["machine"]
    note = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; medians of runs in turns."
    )
    return _markdown(["workload", "compared with", "ours / theirs", "faster"], rows) + f"\n{note}\n"


def perception_table() -> str:
    """What the bundled checkpoint reaches on held-out splits."""
    record = _read(ROOT / "vot_kernels" / "checkpoints" / "digitworld-nano" / "training.json")
    columns = {
        "presence": ("objects present or not", _percent),
        "exact_count": ("clips with the right number", _percent),
        "center_error_px": ("median centre error", lambda v: f"{v:.2f} px"),
        "attribute_accuracy": ("colour", _percent),
        "label_accuracy": ("digit", _percent),
        "hits_f1": ("hits F1", lambda v: f"{v:.2f}"),
        "bounces_f1": ("bounces F1", lambda v: f"{v:.2f}"),
        "relations_f1": ("relations F1", lambda v: f"{v:.2f}"),
    }
    rows = [
        [split.replace("_", " "), *(show(metrics[name]) for name, (_, show) in columns.items())]
        for split, metrics in record["metrics"].items()
    ]
    parameters = sum(record["parameters"].values()) / 1e6
    note = (
        f"{parameters:.2f} M parameters, trained in {record['training_seconds'] / 60:.1f} minutes on "
        f"{record['threads']} CPU threads by `{record['command']}`; {record['eval_clips_per_split']} clips a split, "
        "all through H.264."
    )
    return _markdown(["split", *(title for title, _ in columns.values())], rows) + f"\n{note}\n"


def question_table() -> str:
    """Accuracy on held-out questions, from `vot eval digitworld`."""
    from vot_kernels.pipelines.evaluation import SYSTEMS

    result = _read(RESULTS / "digitworld-questions.json")
    columns = ["motion", "did_hit", "count", "which_first", "causal", "counterfactual", "next", "flip", "all"]
    rows = [
        [
            SYSTEMS.get(name, f"blind: {name.replace('_', ' ')}"),
            *(f"{100 * accuracy[c]:.0f}" for c in columns),
        ]
        for name, accuracy in result["accuracy"].items()
    ]
    settings, fixed, broke = result["settings"], *(result["verification"][key] for key in ("fixed", "broke"))
    seconds = result["seconds_per_question"]
    note = (
        f"`vot eval digitworld --videos {settings['videos']} --out results.json`: as many held-out videos, one "
        f"question each, {settings['llm']}, per cent right. Verification fixed {fixed} answers and broke {broke}. "
        f"Seconds a question on two cores that had other work too: {seconds['vot']:.1f} with VoT, "
        f"{seconds['direct']:.1f} direct."
    )
    return _markdown(["answered by", *(c.replace("_", " ") for c in columns)], rows) + f"\n{note}\n"


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "perception": perception_table,
    "questions": question_table,
}


def render(text: str) -> str:
    """`text` with every marked table made anew; ValueError for a marker of an unknown table."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"There is no table {match[2]!r}; the tables are {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return _MARKED.sub(table, text)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the tables of {readme}")
