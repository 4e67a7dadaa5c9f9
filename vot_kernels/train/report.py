"""The output and the records of the train commands."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vot_kernels.train.loop import Report


@contextmanager
def progress_bar(steps: int) -> Iterator[Report]:
    """Show a bar of `steps` steps; yield the function that the training loop reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps)

        def report(step: int, terms: dict[str, float]) -> None:
            bar.update(task, completed=step, description=f"loss {terms['loss']:.2f}")

        yield report


def command_line(command: str, settings: Any, options: Sequence[str], *words: str) -> str:
    """Return the `vot` command that repeats a run: `options` are the fields of `settings` that it can set."""
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(settings, name))) for name in options]
    return f"{command} {shlex.join([*words, *(word for pair in pairs for word in pair)])}"


def machine() -> dict[str, Any]:
    """Return the properties of the machine on which a run depends."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write training.json, which says how the checkpoint in `folder` was made."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def check_eval_clips(count: int) -> None:
    """Refuse metrics of no clips, which a run would otherwise find out after it has trained.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"Metrics need held-out clips: eval_clips must be at least 1, got {count}.")


def finished(folder: Path, same: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of the checkpoint that an earlier run wrote to `folder`, if it has every entry of `same`."""
    file = folder / "training.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record if record and all(record.get(name) == value for name, value in same.items()) else None


def format_metrics(metrics: Mapping[str, Mapping[str, float]], first: str = "split") -> str:
    """Format a plain table with one row per entry and one column per metric."""
    names = list(next(iter(metrics.values())))
    rows = [
        [first, *names],
        *([title, *(f"{values[n]:.3f}" for n in names)] for title, values in metrics.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
