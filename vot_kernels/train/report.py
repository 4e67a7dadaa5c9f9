"""The output and the records of the train commands."""

import csv
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vot_kernels.files import atomic_write
from vot_kernels.models.checkpoint import checkpoint_name
from vot_kernels.train.checkpoint import newest_checkpoint
from vot_kernels.train.loop import Report


@contextmanager
def progress_bar(steps: int, shown: bool = True) -> Iterator[Report]:
    """Show a bar of `steps` steps with an estimate; yield the function that the training loop reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("training", total=steps)

        def report(step: int, terms: dict[str, float]) -> None:
            bar.update(task, completed=step, description=f"loss {terms['loss']:.2f}")

        yield report


@contextmanager
def reporting(out: Path, steps: int) -> Iterator[Report]:
    """Show a progress bar, and log every step to `out/log.csv` and, if it is installed, to `out/tensorboard`."""
    with progress_bar(steps) as show, Log(out) as log:

        def report(step: int, terms: dict[str, float]) -> None:
            show(step, terms)
            log.write(step, terms)

        yield report


class Log:
    """The values of each step as lines of a CSV file, and as scalars of TensorBoard if that is installed.

    A resumed run goes on after the step of its checkpoint; what a killed run had written of later steps is dropped.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.file = out, out / "log.csv"
        self.names: dict[str, None] | None = None
        self.board: Any = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step; those of other steps that it lacks, or that they lack, are empty."""
        if self.board is None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=step)
        if self.names is None or not self.names.keys() >= values.keys():
            self._begin(step, values)
        with self.file.open("a", encoding="utf-8", newline="") as lines:
            csv.writer(lines).writerow([step, *(values.get(name, "") for name in self.names or ())])
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def _begin(self, step: int, values: Mapping[str, float]) -> None:
        """Write the file anew, with all columns and the lines before this step."""
        rows: list[dict[str, str]] = []
        if self.file.is_file():
            with self.file.open(encoding="utf-8", newline="") as lines:
                rows = [row for row in csv.DictReader(lines) if _is_before(row, step)]
        self.names = dict.fromkeys([*(rows[0] if rows else ()), *values])
        self.names.pop("step", None)
        with atomic_write(self.file) as draft, draft.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, ["step", *self.names])
            writer.writeheader()
            writer.writerows(rows)


def _is_before(row: Mapping[str, str | None], step: int) -> bool:
    """Whether a line was written as a whole, for an earlier step."""
    number = row.get("step") or ""
    return None not in row.values() and number.isdigit() and int(number) < step


def command_line(command: str, settings: Any, *words: str) -> str:
    """Return the `vot` command that repeats a run with these settings."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in asdict(settings).items()]
    named = map(checkpoint_name, words)
    return f"{command} {shlex.join([*named, *(word for pair in pairs for word in pair)])}"


def resumed(out: Path) -> dict[str, int]:
    """Return the entry of a record for a run that goes on, asked before it does: its time counts from this step."""
    checkpoint = newest_checkpoint(out)
    return {} if checkpoint is None else {"resumed_at_step": int(checkpoint.name.rpartition("-")[2])}


def machine() -> dict[str, Any]:
    """Return the properties of the machine on which a run depends."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write training.json, which says how the checkpoint in `folder` was made; what was not measured is null."""
    (folder / "training.json").write_text(json.dumps(_without_nan(record), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


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


def format_metrics(metrics: Mapping[str, Mapping[str, float | None]], first: str = "split") -> str:
    """Format a plain table with one row per entry and one column per metric; a dash is what was not measured."""
    names = list(next(iter(metrics.values())))
    rows = [
        [first, *names],
        *([title, *(_three_digits(values[n]) for n in names)] for title, values in metrics.items()),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _three_digits(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
