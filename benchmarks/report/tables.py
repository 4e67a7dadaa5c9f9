"""One table per suite: a line for every provider on every workload, whether it was timed or not.

The providers that do not support a workload share one line. Those that are not installed are named once per suite,
below the table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from benchmarks.core import Status
from benchmarks.report.figures import best_of_ours, floor_s, in_order, is_timed, ratio, spread
from benchmarks.report.runs import DIRECTION_NAMES, Row, Run, Section

COLUMNS = (
    "provider",
    "whole op",
    "kernel alone",
    "time ÷ ours",
    "TFLOP/s",
    "GB/s",
    "of the floor",
    "peak memory",
)
NOTHING = "–"
NOISY = "⚠"
NOISY_SPREAD = 0.2
LEGEND = (
    "Whole op: median ± half the distance between the quartiles, with everything that the op needs built anew "
    "(layout, mask, index). Kernel alone: the same with all of that prepared; a backward prepares nothing. "
    f"{NOISY}: the samples spread by more than ± {NOISY_SPREAD * 100:.0f} %, so the figure says little; measure again. "
    "Time ÷ ours: against the fastest of our backends, the median (and quartiles) of the ratios of rounds taken "
    "in turns; ≈ marks a ratio of medians of two runs. TFLOP/s and GB/s: the workload's least work over the time of "
    "the whole op, so none for a peer that computes something else. Of the floor: the least time at the measured "
    "ceilings over the time taken; it may pass 100 % where a small workload stays in the cache. Peak memory: on top "
    "of the inputs. ❌: the provider's output disagrees with the reference, so it gets no figure."
)


class Kind(StrEnum):
    """The style of a line."""

    OURS = "ours"
    PEER = "peer"
    UNTIMED = "untimed"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class Line:
    """The cells of `COLUMNS`, plain text; a line without figures has two: the provider, and why there are none."""

    cells: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True)
class Group:
    """All providers on one workload in one direction."""

    workload: str
    direction: str
    describe: str
    lines: tuple[Line, ...]


def groups(section: Section, suite: str) -> Iterator[Group]:
    """Yield the table of a suite, race by race."""
    for (own_suite, workload, direction), rows in section.races.items():
        if own_suite != suite:
            continue
        ours = best_of_ours(rows)
        described = next((row for row in rows if row.describe), rows[0])
        describe = ", ".join(filter(None, (described.op, described.describe, described.dtype)))
        folded = (Status.MISSING, Status.UNSUPPORTED)
        lines = [line(row, ours) for row in in_order(rows) if row.status not in folded]
        lines += [unsupported(rows)] if any(row.status is Status.UNSUPPORTED for row in rows) else []
        yield Group(workload, DIRECTION_NAMES.get(direction, direction), describe, tuple(lines))


def not_installed(section: Section, suite: str) -> str:
    """Return one sentence naming the providers that are missing on the machine, empty if none is."""
    rows = [row for race, rows in section.races.items() if race[0] == suite for row in rows]
    missing = {row.provider: row.reason for row in rows if row.status is Status.MISSING}
    listed = "; ".join(f"{provider} ({reason})" for provider, reason in missing.items())
    return f"Missing on this machine: {listed}." if missing else ""


def unsupported(rows: Sequence[Row]) -> Line:
    """Return a line with all providers that do not support a workload, by their reasons."""
    names: dict[str, list[str]] = {}
    for row in in_order(rows):
        if row.status is Status.UNSUPPORTED:
            names.setdefault(row.reason, []).append(row.provider)
    listed = "; ".join(f"{', '.join(found)} ({reason})" for reason, found in names.items())
    return Line((f"{sum(map(len, names.values()))} unsupported", listed), Kind.UNTIMED)


def line(row: Row, ours: Row | None) -> Line:
    """Return the line of one provider; `ours` is what it is compared with."""
    provider = f"{row.provider} (computes {row.instead} instead)" if row.instead else row.provider
    if row.status is Status.MISMATCH:
        return Line((provider, f"❌ {row.status}: {row.reason}"), Kind.MISMATCH)
    if not is_timed(row):
        why = row.reason if row.status is Status.TIMED else f"{row.status}: {row.reason}"
        return Line((provider, why), Kind.UNTIMED)
    seconds = median(row.whole_s)
    cells = (
        provider,
        milliseconds(row.whole_s),
        milliseconds(row.kernel_s),
        ratio_text(row, ours),
        *_rates(row, seconds),
        NOTHING if row.peak_bytes is None else f"{number(row.peak_bytes / 2**20)} MiB",
    )
    return Line(cells, Kind.OURS if row.ours else Kind.PEER)


def _rates(row: Row, seconds: float) -> tuple[str, str, str]:
    """Return TFLOP/s, GB/s and the floor's share of the time."""
    if row.instead:
        return NOTHING, NOTHING, NOTHING
    return (
        number(row.flops / seconds / 1e12) if row.flops else NOTHING,
        number(row.bytes / seconds / 1e9),
        of_the_floor(row),
    )


def of_the_floor(row: Row) -> str:
    """Return the least time at the measured ceilings as a share of the time taken."""
    floor = floor_s(row)
    return NOTHING if floor is None else percent(floor / median(row.whole_s))


def ratio_text(row: Row, ours: Row | None) -> str:
    """Return "3.9 × (3.7–4.1)", or "1 ×" for our best backend itself."""
    if ours is None or not is_timed(row):
        return NOTHING
    if row is ours:
        return "1 ×"
    found = ratio(row, ours)
    if found.low is None or found.high is None:
        return f"≈ {times(found.value)} ×"
    if len(row.whole_s) == 1:
        return f"{times(found.value)} ×"
    return f"{times(found.value)} × ({times(found.low)}–{times(found.high)})"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median with its spread: "12.3 ms ± 4.0 %"; "12.3 ms ± 40 % ⚠" if it is noisy."""
    if not seconds:
        return NOTHING
    share = spread(seconds)
    text = f"{number(1e3 * median(seconds))} ms" + ("" if share is None else f" ± {percent(share)}")
    return f"{text} {NOISY}" if is_noisy(seconds) else text


def is_noisy(seconds: Sequence[float]) -> bool:
    """Whether the samples are spread so far that their median says little."""
    share = spread(seconds)
    return share is not None and share > NOISY_SPREAD


def number(value: float) -> str:
    """Format with three significant digits, more only before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def times(value: float) -> str:
    """Format a ratio: two significant digits above 2, two decimals close to 1."""
    return f"{value:.2f}" if value < 1.995 else f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def percent(share: float) -> str:
    """Format whole per cent, one decimal below ten."""
    value = 100 * share
    return f"{value:.1f} %" if value < 9.95 else f"{value:,.0f} %"


def device_name(section: Section) -> str:
    """Return the heading of a section."""
    device, details = section.device, []
    if device.get("capability"):
        details.append(str(device["capability"]))
    if device.get("memory_gib"):
        details.append(f"{device['memory_gib']} GiB")
    if device.get("threads"):
        pinned = " pinned to as many cores" if device.get("pinned_to") else ""
        details.append(("1 thread" if device["threads"] == 1 else f"{device['threads']} threads") + pinned)
    if device.get("cpp_isa"):
        details.append(f"C++ kernels for {device['cpp_isa']}")
    return ", ".join([str(device["name"]), *details])


def is_partial(section: Section) -> bool:
    """Whether one of the runs was interrupted."""
    return not all(run.complete for run in section.runs)


def captions(section: Section) -> list[list[str]]:
    """Return everything that a reader needs to judge and repeat the runs, as paragraphs of lines."""
    merged = [["Providers that several of these runs have tried are shown as the last of them found them."]]
    return [_caption(run) for run in section.runs] + (merged if len(section.runs) > 1 else [])


def _caption(run: Run) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items() if value and name != "utc")
    commit = f", commit {run.commit[:12]}" if run.commit else ""
    return [
        f"{'Complete' if run.complete else 'Partial'} run: {run.command}"
        + ("" if run.complete else " (interrupted: what is missing below was not reached)"),
        f"{run.versions.get('utc') or 'date unknown'}, {run.file}{commit}",
        versions,
        f"measured ceilings: {ceilings(run) or 'none'}",
    ]


def ceilings(run: Run) -> str:
    """Return the rates that the machine reached in a copy and in matrix products, empty if none was measured."""
    copy = [] if run.copy_bytes_per_s is None else [f"copy {number(run.copy_bytes_per_s / 1e9)} GB/s"]
    products = [
        f"{dtype} matrix product {number(flops / 1e12)} TFLOP/s"
        for dtype, flops in run.matmul_flops_per_s.items()
    ]
    return ", ".join(copy + products)
