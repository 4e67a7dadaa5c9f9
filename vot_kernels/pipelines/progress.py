"""A progress bar on stderr, so that stdout holds results alone; none where stderr is not a terminal."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from vot_kernels.extras import imports_for

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, *, done: int = 0, shown: bool = True) -> Iterable[Item]:
    """Iterate over `items` with a bar; `done` items were finished by an earlier run."""
    with imports_for("A progress bar", "cli"):
        from rich.console import Console
        from rich.progress import track
    console = Console(stderr=True)
    return track(
        items,
        description=description,
        total=done + len(items),
        completed=done,
        console=console,
        disable=not (shown and console.is_terminal),
    )
