"""Results of the suite: read, checked, and merged by device."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.core import Status

SCHEMA = 1
DIRECTION_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


class BrokenResult(ValueError):
    """A file that cannot be reported; the message names it and says what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """The facts of one run of the suite.

    Attributes:
        file: name of its JSON file.
        device: facts that do not change from minute to minute.
        complete: False for a run that was interrupted.
        copy_bytes_per_s, matmul_flops_per_s: the measured ceilings, the second by dtype; empty or None if
            nothing was measured.
    """

    file: str
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    command: str
    complete: bool
    copy_bytes_per_s: float | None
    matmul_flops_per_s: Mapping[str, float]
    commit: str = ""


@dataclass(frozen=True)
class Row:
    """One provider on one workload in one direction.

    Attributes:
        whole_s, kernel_s: seconds of every round, in the order of the rounds; empty unless `status` is timed.
        flops, bytes: the minimal work of the workload.
        size: number of tokens.
        alone: whether it was timed by itself, because it did not fit into memory beside the others.
        instead: what a peer computes in place of the workload, empty if it computes the workload.
    """

    run: Run
    suite: str
    workload: str
    direction: str
    provider: str
    status: Status
    reason: str = ""
    op: str = ""
    ours: bool = False
    instead: str = ""
    describe: str = ""
    dtype: str = ""
    size: int = 0
    flops: int = 0
    bytes: int = 0
    alone: bool = False
    peak_bytes: int | None = None
    whole_s: tuple[float, ...] = ()
    kernel_s: tuple[float, ...] = ()

    @property
    def race(self) -> tuple[str, str, str]:
        """The key of rows that were measured against each other."""
        return self.suite, self.workload, self.direction

    @property
    def was_tried(self) -> bool:
        """Whether the run got far enough to learn something about the provider."""
        if self.status is Status.TIMED:
            return bool(self.whole_s)
        return self.status not in (Status.NO_TIME, Status.MISSING, Status.UNSUPPORTED)


@dataclass(frozen=True)
class Section:
    """All rows of one device, race by race, in the order of the files."""

    device: Mapping[str, Any]
    runs: tuple[Run, ...]
    races: Mapping[tuple[str, str, str], tuple[Row, ...]]

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(suite for suite, _, _ in self.races))


def read_result(path: Path) -> tuple[Run, list[Row]]:
    """Return the run of a file and its rows; `BrokenResult` with one sentence for a file that is not a result."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenResult(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise BrokenResult(f"{path} is not JSON: {error}.") from None
    if not isinstance(data, dict) or not isinstance(data.get("vot_kernels"), dict):
        raise BrokenResult(f"{path} is not a result of `pytest benchmarks/`: it has no object 'vot_kernels'.")
    schema = data["vot_kernels"].get("schema")
    if schema != SCHEMA:
        raise BrokenResult(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}.")
    try:
        run = _run(path, data)
        return run, _rows(run, data)
    except KeyError as error:
        raise BrokenResult(f"{path} is not whole: the key {error} is missing.") from None
    except ValueError as error:
        raise BrokenResult(f"{path} is not whole: {error}.") from None
    except (TypeError, AttributeError) as error:
        raise BrokenResult(f"{path} is not whole: a part of it has the wrong type ({error}).") from None


def read_sections(paths: Iterable[Path]) -> list[Section]:
    """Merge all files by device; if a provider was tried twice on a device, the last file counts."""
    sections: dict[str, Section] = {}
    for path in paths:
        run, rows = read_result(path)
        key = json.dumps(run.device, sort_keys=True)
        old = sections.get(key) or Section(run.device, (), {})
        sections[key] = replace(old, runs=(*old.runs, run), races=_merged(old.races, rows))
    return list(sections.values())


def _merged(
    races: Mapping[tuple[str, str, str], tuple[Row, ...]], rows: Sequence[Row]
) -> dict[tuple[str, str, str], tuple[Row, ...]]:
    merged = {race: {row.provider: row for row in old} for race, old in races.items()}
    for row in rows:
        known = merged.setdefault(row.race, {})
        if row.provider not in known or row.was_tried or not known[row.provider].was_tried:
            known[row.provider] = row
    return {race: tuple(by_provider.values()) for race, by_provider in merged.items()}


def _run(path: Path, data: Mapping[str, Any]) -> Run:
    facts = data["vot_kernels"]
    device = {key: value for key, value in facts["device"].items() if key != "load_average"}
    ceilings = facts["ceilings"]
    copy = ceilings.get("copy_bytes_per_s")
    return Run(
        file=path.name,
        device={"type": device["type"], "name": device["name"], **device},
        versions=dict(facts["versions"]),
        command=str(facts["command"]),
        complete=facts["complete"] is True,
        copy_bytes_per_s=None if copy is None else _positive([copy])[0],
        matmul_flops_per_s={
            dtype: _positive([flops])[0] for dtype, flops in ceilings.get("matmul_flops_per_s", {}).items()
        },
        commit=str((data.get("commit_info") or {}).get("id") or ""),
    )


def _rows(run: Run, data: Mapping[str, Any]) -> list[Row]:
    """Return the rows; outcomes decide what is shown, and figures are looked up for those that were timed."""
    figures = {_key(benchmark["extra_info"]): benchmark for benchmark in data["benchmarks"]}
    keys = [_key(outcome) for outcome in data["vot_kernels"]["outcomes"]]
    strays = set(figures) - set(keys)
    if strays:
        raise ValueError(f"there are figures of {' '.join(min(strays))} without an outcome")
    rows = []
    for key, outcome in zip(keys, data["vot_kernels"]["outcomes"], strict=True):
        suite, workload, direction, provider = key
        row = Row(
            run=run,
            suite=suite,
            workload=workload,
            direction=direction,
            provider=provider,
            status=Status(outcome["status"]),
            reason=str(outcome["reason"]),
            op=str(outcome["op"]),
            ours=bool(outcome["ours"]),
            instead=str(outcome["instead"]),
            describe=str(outcome["describe"]),
            dtype=str(outcome["dtype"]),
            size=_count(outcome["size"]),
            flops=_count(outcome["flops"]),
            bytes=_count(outcome["bytes"]),
            alone=bool(outcome.get("notes", {}).get("alone")),
        )
        rows.append(_timed(row, figures.get(key)) if row.status is Status.TIMED else row)
    return rows


def _timed(row: Row, benchmark: Mapping[str, Any] | None) -> Row:
    if benchmark is None:
        return replace(row, reason="the run ended before its figures were stored")
    info = benchmark["extra_info"]
    return replace(
        row,
        whole_s=_positive(benchmark["stats"]["data"]),
        kernel_s=_positive(info["kernel_s"]),
        peak_bytes=_count(info["peak_bytes"]),
    )


def _key(facts: Mapping[str, Any]) -> tuple[str, str, str, str]:
    key = facts["suite"], facts["workload"], facts["direction"], facts["provider"]
    if not all(isinstance(name, str) for name in key):
        raise ValueError(f"suite, workload, direction and provider are not all text: {key}")
    return key


def _count(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError(f"{value!r} is not a count")
    return value


def _positive(values: Sequence[float]) -> tuple[float, ...]:
    if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
        raise ValueError("a measured value is not a positive number")
    return tuple(float(v) for v in values)
