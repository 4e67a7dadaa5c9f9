"""Figures computed from the samples: medians, spreads, ratios, rates, and the floor as a share of the time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.core import Status
from benchmarks.report.runs import Row


@dataclass(frozen=True)
class Ratio:
    """Time over our time.

    Attributes:
        value: the median of the rounds' ratios; the ratio of the medians if the two did not run in turns.
        low, high: the quartiles of the rounds' ratios, None if the two did not run in turns.
    """

    value: float
    low: float | None = None
    high: float | None = None


def is_timed(row: Row) -> bool:
    """Whether there are figures to show; only a timed provider may have any."""
    return row.status is Status.TIMED and bool(row.whole_s)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile, interpolated within the samples."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> float | None:
    """Return half the distance between the quartiles over the median; None for a single sample."""
    low, middle, high = quartiles(values)
    return (high - low) / 2 / middle if len(values) > 1 else None


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    """Return the fastest timed backend of this package that computes the workload itself, None if there is none."""
    timed = [row for row in rows if row.ours and not row.instead and is_timed(row)]
    return min(timed, key=lambda row: median(row.whole_s), default=None)


def ratio(row: Row, ours: Row) -> Ratio:
    """Return how many times as long `row` takes as `ours`, paired round by round if they ran in turns."""
    in_turns = row.run is ours.run and len(row.whole_s) == len(ours.whole_s) and not (row.alone or ours.alone)
    if not in_turns:
        return Ratio(median(row.whole_s) / median(ours.whole_s))
    low, middle, high = quartiles([a / b for a, b in zip(row.whole_s, ours.whole_s, strict=True)])
    return Ratio(middle, low, high)


def floor_s(row: Row) -> float | None:
    """Return the seconds of the minimal work at the measured ceilings; None if a ceiling is not known."""
    if row.run.copy_bytes_per_s is None:
        return None
    moving = row.bytes / row.run.copy_bytes_per_s
    if not row.flops:
        return moving
    flops_per_s = row.run.matmul_flops_per_s.get(row.dtype)
    return None if flops_per_s is None else max(moving, row.flops / flops_per_s)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sort rows: ours first, then the fastest; those without figures after those with figures."""
    return sorted(
        rows,
        key=lambda row: (
            not row.ours,
            not is_timed(row),
            median(row.whole_s) if is_timed(row) else 0.0,
            row.provider,
        ),
    )
