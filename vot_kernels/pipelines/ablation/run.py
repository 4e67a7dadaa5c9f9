"""The runner: what is to be run, what has been run, and the rest of it one by one, each kept as soon as it ends."""

import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vot_kernels.files import append_json_lines, atomic_write, check_output, read_json_lines
from vot_kernels.models.checkpoint import weights_file
from vot_kernels.pipelines.ablation.parts import PARTS, Part, Variant
from vot_kernels.pipelines.ablation.picture import draw
from vot_kernels.pipelines.ablation.summary import format_summary, summarise
from vot_kernels.pipelines.ablation.tasks import TASKS
from vot_kernels.pipelines.ablation.tasks.base import Sources, seconds_of
from vot_kernels.train.report import machine, progress_bar

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        parts: to be compared.
        seeds: runs of each variant.
        steps: optimiser steps of a run, in the place of each task's own.
        sources: what some parts begin with.
    """

    parts: Sequence[Part]
    seeds: int = 3
    steps: int | None = None
    sources: Sources = Sources()

    def seeds_of(self, part: Part) -> range:
        """Return the seeds of a part's runs."""
        return range(min(self.seeds, TASKS[part.task].seeds))

    def run_of(self, part: Part, variant: Variant, seed: int) -> Row:
        """Return what tells a run from every other; a variant that several parts have is run once."""
        task = TASKS[part.task]
        steps = self.steps if self.steps is not None and task.steps else task.steps
        return {
            "task": part.task,
            **variant.changes,
            "seed": seed,
            "steps": steps,
            "clips": task.clips,
            **self._identity(part.task),
        }

    def runs(self) -> list[Row]:
        """Return every run once: of each part all variants with the first seed, then with the next."""
        found = {
            key(run): run
            for part in self.parts
            for seed in self.seeds_of(part)
            for run in (self.run_of(part, variant, seed) for variant in part.variants)
        }
        return list(found.values())

    def _identity(self, task: str) -> Row:
        """Return the files on which a run depends, by name and contents."""
        model = [weights_file(self.sources.vlm)] if self.sources.vlm else []
        read = {"reading": model, "reinforcement": model, "answers": list(self.sources.answers)}
        files = {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in read.get(task, [])}
        return {"of": files} if files else {}


def choose_parts(only: Collection[str] | None, sources: Sources) -> list[Part]:
    """Return the parts of these names, or all for which the sources are given.

    Raises:
        ValueError: there is no part of a name, or it needs a source that is not given.
    """
    names = [part.name for part in PARTS]
    for name in only or ():
        if name not in names:
            raise ValueError(f"A part must be one of {', '.join(names)}, got {name!r}.")
    chosen = [part for part in PARTS if not only or part.name in only]
    lacking = {part.name: lack for part in chosen if (lack := _lacks(part, sources))}
    if only and lacking:
        name, option = next(iter(lacking.items()))
        raise ValueError(f"The part {name!r} needs {option}.")
    return [part for part in chosen if part.name not in lacking]


def _lacks(part: Part, sources: Sources) -> str | None:
    lacking = [TASKS[part.task].lacks(variant.changes, sources) for variant in part.variants]
    return next(filter(None, lacking), None)


def run_ablations(out: Path, plan: Plan, plot: Path | None = None) -> str:
    """Run what is not yet in the rows beside `out`, and write `out`; return the tables.

    Each finished run is a line of a file named like `out` with the suffix .rows.jsonl. A run that was interrupted goes
    on from its last checkpoint, in a folder with the suffix .runs. Files for other plans may be gone on with: runs that
    this plan has not are left alone.

    Args:
        out: JSON file for the summary.
        plan: what to run.
        plot: SVG file for a picture of it.
    """
    rows_file, folders = out.with_suffix(".rows.jsonl"), out.with_suffix(".runs")
    read = plan.sources.answers
    check_output(out, ".json", *read)
    check_output(rows_file, "", *read)
    if plot is not None:
        check_output(plot, ".svg", *read)
    done = _finished(rows_file)
    wanted = plan.runs()
    missing = [run for run in wanted if key(run) not in done]
    began = time.perf_counter()
    for number, run in enumerate(missing):
        row = _train(run, plan.sources, folders / key(run))
        with append_json_lines(rows_file) as append:
            append(row)
        done[key(run)] = row
        shutil.rmtree(folders / key(run), ignore_errors=True)
        left = (time.perf_counter() - began) / (number + 1) * (len(missing) - number - 1)
        finished = len(wanted) - len(missing) + number + 1
        print(
            f"{finished} of {len(wanted)}: {describe(run)}, {row['seconds']:.0f} s; about {_minutes(left)} remain",
            file=sys.stderr,
            flush=True,
        )
    if folders.is_dir() and not os.listdir(folders):
        folders.rmdir()
    result = summarise(plan.parts, lambda part, variant: _rows_of(plan, part, variant, done))
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(result, plot)
    return format_summary(result)


def _finished(rows_file: Path) -> dict[str, Row]:
    """Return the rows of finished runs, by their keys."""
    try:
        return {key(row["run"]): row for row in read_json_lines(rows_file)}
    except (KeyError, TypeError):
        raise ValueError(f"{rows_file} exists and has other rows than those of `vot ablate`.") from None


def _rows_of(plan: Plan, part: Part, variant: Variant, done: dict[str, Row]) -> list[Row]:
    return [done[key(plan.run_of(part, variant, seed))] for seed in plan.seeds_of(part)]


def _train(run: Row, sources: Sources, folder: Path) -> Row:
    task, start = TASKS[run["task"]], time.perf_counter()
    with progress_bar(run["steps"], shown=sys.stderr.isatty() and run["steps"] > 0) as report:
        metrics = task.run(run, run["seed"], run["steps"], folder, report, sources)
    return {
        "run": run,
        **task.cost(run),
        "seconds": round(time.perf_counter() - start, 1),
        **machine(),
        "metrics": metrics,
    }


def plan_text(plan: Plan) -> str:
    """Return a table of all runs: parameters and operations of the encoder, and seconds, from a step measured here."""
    lines = ["parameters  GFLOP/step  seconds  run"]
    total, unknown = 0.0, 0
    for run in plan.runs():
        task = TASKS[run["task"]]
        cost, seconds = task.cost(run), run["steps"] * _step_seconds(json.dumps(_without_seed(run)))
        total += seconds
        unknown += not cost and run["steps"] > 0
        numbers = (
            [f"{cost['parameters']:,}", f"{cost['operations'] / 1e9:.1f}", f"{seconds:.0f}"]
            if cost
            else ["–"] * 3
        )
        lines.append(
            f"{numbers[0]:>10}  {numbers[1]:>10}  {numbers[2]:>7}  {describe(run)}, {run['steps']} steps"
        )
    lines.append(f"{len(lines) - 1} runs, {_minutes(total)} of training as measured here, and the measuring.")
    if unknown:
        lines.append(f"Not in it: {unknown} of them, which train the model of --vlm.")
    return "\n".join(lines)


@cache
def _step_seconds(run: str) -> float:
    """Return the seconds of a training step, the first one left out."""
    changes = json.loads(run)
    step = TASKS[changes["task"]].step(changes)
    if step is None:
        return 0.0
    step()
    return min(seconds_of(step) for _ in range(2))


def key(run: Row) -> str:
    """Return a name for a folder that is the same for the same run alone."""
    return f"{zlib.crc32(json.dumps(run, sort_keys=True).encode()):08x}"


def describe(run: Row) -> str:
    """Return a run in words: its task, what differs from the default, and its seed."""
    changes = [
        f"{name}={value}" for kind in ("encoder", "training") for name, value in run.get(kind, {}).items()
    ] + [f"{name}={run[name]}" for name in ("kind", "reads", "stages", "system") if name in run]
    return f"{run['task']}, {' '.join(changes) or 'default'}, seed {run['seed']}"


def _without_seed(run: Row) -> Row:
    return {name: value for name, value in run.items() if name not in ("seed", "steps")}


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
