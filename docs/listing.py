"""What the scripts share that write a table into a page: `list_towers.py`, `list_experts.py` and the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

END = "<!-- end -->"


def table(header: Sequence[str], rows: Iterable[str]) -> list[str]:
    """The lines of a table in Markdown; each row is a line already."""
    return ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |", *rows]


def written(page: str, mark: str, lines: Iterable[str]) -> str:
    """The page with other lines between `<!-- mark -->` and the end mark after it."""
    begin = f"<!-- {mark} -->"
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(END)
    return "\n".join([head + begin, *lines, END]) + tail


def write(page: Path, mark: str, lines: Iterable[str]) -> None:
    """Write the lines into a page."""
    page.write_text(written(page.read_text(encoding="utf-8"), mark, lines), encoding="utf-8")


def statuses(rows: Iterable[str], column: int) -> str:
    """How many rows have which status: "62 exact, 3 refused"."""
    found = [row.split(" | ")[column] for row in rows]
    return ", ".join(f"{found.count(status)} {status}" for status in sorted(set(found)))


def relative(found: Tensor, expected: Tensor, least: float = 1e-9) -> float:
    """The largest error by the largest number, which counts as `least` at least; infinite if anything is not finite."""
    if not expected.numel():
        return 0.0
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=least)).item()
    return error if error == error else float("inf")
