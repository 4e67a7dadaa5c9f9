"""How every command ends: errors in one sentence, and Ctrl-C with a word on what is kept."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import typer

from vot_kernels.pipelines.errors import CORRECTABLE, sentence

Command = TypeVar("Command", bound=Callable[..., None])


def when_interrupted(kept: Callable[[dict[str, Any]], str]) -> Callable[[Command], Command]:
    """Handle Ctrl-C in a command: print what is kept, by its arguments, and how to continue, and exit with 130."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            try:
                command(**given)
            except KeyboardInterrupt:
                print(f"Interrupted: {kept(given)}", file=sys.stderr)
                raise typer.Exit(130) from None

        return run  # type: ignore[return-value]

    return decorate


def nothing_is_kept(given: dict[str, Any]) -> str:
    return "nothing was written; run the same command again."


def kept_in(what: str, *paths: Path) -> str:
    """Say that something is kept in those of some files and folders that have contents, so that a run goes on there."""
    there = [str(path) for path in paths if has_contents(path)]
    if not there:
        return nothing_is_kept({})
    return f"{what} are kept in {' and '.join(there)}; the same command goes on from there."


def has_contents(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def checkpoints_are_kept(given: dict[str, Any]) -> str:
    return kept_in("the steps so far", given["out"])


def answers_are_kept(given: dict[str, Any]) -> str:
    suffixes = {"videos": ".rows.jsonl", "when": ".when.jsonl"}  # of an evaluation, by what it was asked for
    files = [given["out"].with_suffix(suffix) for option, suffix in suffixes.items() if given.get(option)]
    if given.get("batch") is not None and given["out"] is not None:
        files = [given["out"]]
    return kept_in("the answers so far", *files)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn errors that a user can correct into one sentence on stderr; VOT_DEBUG=1 shows the traceback."""
    try:
        yield
    except (typer.Abort, KeyboardInterrupt):
        print(f"Interrupted: {nothing_is_kept({})}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, of click or of the click inside typer
            _fail(" ".join(error.format_message().split()))
        if not isinstance(error, CORRECTABLE) or os.environ.get("VOT_DEBUG"):
            raise
        _fail(sentence(error))


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)
