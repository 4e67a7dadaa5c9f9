"""Progress on stderr, so that stdout has only results: bars on a terminal, and the current activity."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from vot_kernels.extras import imports_for

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, done: int = 0, shown: bool = True
) -> Iterable[Item]:
    """Iterate over `items` with a bar; `done` items were finished by an earlier run.

    `total` is the number of items, for those that have no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with imports_for("A progress bar", "cli"):
        from rich.console import Console
        from rich.progress import track
    console = Console(stderr=True)
    return track(
        items,
        description=description,
        total=None if total is None else done + total,
        completed=done,
        console=console,
        disable=not (shown and console.is_terminal),
    )


@contextmanager
def meter(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows on a terminal how much is done, and of how much, in any unit."""
    with imports_for("A progress bar", "cli"):
        from rich.console import Console
        from rich.progress import Progress
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps(shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current activity: beside a spinner on a terminal, else in a line each.

    An empty text hides the spinner until the next activity, so that a result can be printed.
    """
    with imports_for("A progress bar", "cli"):
        from rich.console import Console
    console = Console(stderr=True)
    if not shown:
        yield lambda text: None
    elif not console.is_terminal:
        yield lambda text: print(f"{text} …", file=sys.stderr, flush=True) if text else None
    else:
        with console.status("Starting …") as status:

            def show(text: str) -> None:
                if text:
                    status.update(f"{text} …")
                    status.start()
                else:
                    status.stop()

            yield show
