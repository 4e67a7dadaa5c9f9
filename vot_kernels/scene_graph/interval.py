"""An interval of time, and how well two of them agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An interval of time in seconds, both ends included; a moment has equal ends.

    Attributes:
        start_s, end_s: seconds; an end may be infinite.

    Raises:
        ValueError: it ends before it begins, or an end is not a number.
    """

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_s", float(self.start_s))
        object.__setattr__(self, "end_s", float(self.end_s))
        if not self.start_s <= self.end_s:
            raise ValueError(
                f"An interval must not end before it begins, got {self.start_s} to {self.end_s} s."
            )

    def __str__(self) -> str:
        """The words that `vot_kernels.reasoning` reads back: "1.00 s to 1.25 s"."""
        return f"{self.start_s:.2f} s to {self.end_s:.2f} s"

    def __contains__(self, time_s: float) -> bool:
        return self.start_s <= time_s <= self.end_s

    @property
    def length_s(self) -> float:
        """Seconds from the first to the last moment."""
        return self.end_s - self.start_s

    def shared(self, other: Interval) -> Interval | None:
        """Return the part that belongs to both, None if there is none."""
        start, end = max(self.start_s, other.start_s), min(self.end_s, other.end_s)
        return Interval(start, end) if start <= end else None

    def iou(self, other: Interval) -> float:
        """Return the temporal intersection over union, in [0, 1], of two finite intervals.

        It is the measure of moment retrieval (Gao et al. 2017, TALL): shared seconds by seconds that either covers.
        Two equal moments have 1; a moment has 0 with everything else.
        """
        if self == other:
            return 1.0
        both = self.shared(other)
        if both is None or both.length_s == 0:
            return 0.0
        return min(1.0, both.length_s / (self.length_s + other.length_s - both.length_s))
