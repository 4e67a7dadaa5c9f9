"""A progress bar on stderr for decoding that takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic as _now
from typing import Any

from vot_kernels.extras import imports_for


@contextmanager
def progress_bar(name: str, start: float, end: float, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function to report the position in seconds to; a bar appears if it takes over a second."""
    began, bar, task = _now(), None, None

    def report(position: float) -> None:
        nonlocal bar, task
        if not shown or (bar is None and _now() - began < 1.0):
            return
        if bar is None:
            bar = _rich_progress()
            bar.start()
            task = bar.add_task(f"decoding {name}", total=max(end - start, 1e-9))
        bar.update(task, completed=min(max(position - start, 0.0), end - start))

    if shown:
        _rich_progress()  # a missing package should be reported before the work, not during it
    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _rich_progress() -> Any:
    with imports_for("A progress bar", "cli"):
        from rich.console import Console
        from rich.progress import Progress
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
