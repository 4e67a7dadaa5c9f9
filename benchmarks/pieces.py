"""Work divided into pieces: each has a process of its own, a time limit, and its results in a file of JSON lines.

A piece that crashes or hangs affects no other. A line is written to disk as soon as its result exists, so a run may be
killed at any time; the next one repeats only the pieces that had not finished.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.core import anonymous

DONE, NO_TIME, INTERRUPTED = "done", "no time left", "interrupted"
UNFINISHED = (NO_TIME, INTERRUPTED)
"""States after which a later run tries a piece again; all others hold for this source on this machine."""

Write = Callable[..., None]
"""`write(kind, **facts)` adds a line."""


class Journal:
    """A file of JSON lines that is complete at any moment.

    Args:
        path: the file; existing lines are kept.
        stamp: a part of every line. Lines with another stamp are never read.
    """

    def __init__(self, path: Path, **stamp: str) -> None:
        self.path, self.stamp = path, stamp
        if path.exists():  # the last line is partial if the machine crashed
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def write(self, kind: str, **facts: Any) -> None:
        """Add a line and wait until it is on disk."""
        utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"kind": kind, **self.stamp, "utc": utc, **facts}, default=str, allow_nan=False)
        # One unbuffered write in append mode: lines of several processes never mix, and no partial line remains.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
            os.fsync(file.fileno())

    def read(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind that have this stamp, oldest first."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [json.loads(line) for line in lines]
        return [r for r in records if r["kind"] == kind and self.stamp.items() <= r.items()]


@dataclass(frozen=True)
class Piece:
    """A unit of work.

    Attributes:
        name: a unique name.
        work: called as `work(write)` in a process of its own.
        estimate: seconds that it takes; the piece is not started if fewer are left.
        limit: seconds after which it is killed.
        parts: pieces that run in its place if it fails, so that only the failing part is lost.
    """

    name: str
    work: Callable[[Write], None]
    estimate: float
    limit: float
    parts: tuple["Piece", ...] = ()


@dataclass
class Conductor:
    """Runs pieces within a budget, and writes the state of each.

    Attributes:
        journal: the file of the results.
        log: the file of the pieces' output.
        seconds: time for all of them together, from now on.
        method: how processes are started. A fork has everything imported already, and may use a GPU because this
            process never does.
    """

    journal: Journal
    log: Path
    seconds: float
    method: str = "fork"
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line of progress."""
        elapsed = time.monotonic() - self.started
        print(f"[{elapsed:5.1f} s, {self.left():5.1f} s left] {text}", file=sys.stderr, flush=True)

    def finished(self) -> dict[str, str]:
        """Return the state of every piece that does not have to run again."""
        states = {record["piece"]: record["status"] for record in self.journal.read("piece")}
        return {name: state for name, state in states.items() if state not in UNFINISHED}

    def run(self, pieces: Sequence[Piece], jobs: int = 1, again: bool = False) -> None:
        """Run the pieces that are not finished (all with `again`), in their order, `jobs` at a time."""
        waiting, running = list(pieces), list[_Running]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    piece = waiting.pop(0)
                    before = None if again else self.finished().get(piece.name)
                    if before is None and self._fits(piece):
                        running.append(_Running(piece, self))
                    elif before not in (None, DONE):
                        waiting[:0] = piece.parts
                for each in [each for each in running if each.ended()]:
                    running.remove(each)
                    if self._conclude(each) not in (DONE, *UNFINISHED):
                        waiting[:0] = each.piece.parts
                time.sleep(0.02)
        finally:
            for each in running:
                each.kill(INTERRUPTED)
                self._conclude(each)

    def _fits(self, piece: Piece) -> bool:
        fits = piece.estimate <= self.left()
        if not fits:
            reason = f"takes about {piece.estimate:.0f} s, {max(0.0, self.left()):.0f} s are left"
            self.journal.write("piece", piece=piece.name, status=NO_TIME, reason=reason)
            self.say(f"{piece.name}: {NO_TIME}")
        return fits

    def _conclude(self, each: "_Running") -> str:
        state, printed = each.state(), each.output.read_text(errors="replace")
        each.output.unlink()
        facts: dict[str, Any] = {"status": state, "seconds": round(time.monotonic() - each.started, 2)}
        if state not in (DONE, INTERRUPTED):
            facts["output"] = anonymous("\n".join(printed.splitlines()[-12:]))[-2000:]
        with self.log.open("a") as log:
            log.write(f"== {each.piece.name}: {state}\n{printed}")
        self.journal.write("piece", piece=each.piece.name, **facts)
        self.say(f"{each.piece.name}: {state} in {facts['seconds']:.1f} s")
        return state


class _Running:
    """The process of a piece."""

    def __init__(self, piece: Piece, conductor: Conductor) -> None:
        self.piece, self.started, self.killed = piece, time.monotonic(), ""
        self.limit = min(piece.limit, conductor.left())
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.output = Path(name)
        arguments = (piece, conductor.journal, self.output, os.getpid())
        context: Any = multiprocessing.get_context(conductor.method)
        self.process: BaseProcess = context.Process(target=_perform, args=arguments)
        self.process.start()
        self.group: int = self.process.pid  # type: ignore[assignment]  # it has one from now on

    def ended(self) -> bool:
        """Return whether the process has ended, by itself or just now because of its limit."""
        if not self.process.is_alive():
            return True
        if time.monotonic() - self.started < self.limit:
            return False
        self.kill(NO_TIME if self.limit < self.piece.limit else f"not finished in {self.limit:.0f} s")
        return True

    def kill(self, state: str) -> None:
        self.killed = state
        self.process.kill()

    def state(self) -> str:
        self.process.join(10)  # not forever, because a hung driver may block it
        with contextlib.suppress(ProcessLookupError):  # the compilers that it has started
            os.killpg(self.group, signal.SIGKILL)
        code = self.process.exitcode or 0
        if self.killed:
            return self.killed
        return DONE if code == 0 else "failed" if code > 0 else f"crashed ({signal.Signals(-code).name})"


def _perform(piece: Piece, journal: Journal, output: Path, parent: int) -> None:
    """Run a piece in its process."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    for stream in (1, 2):  # what is not Python prints there
        os.dup2(sys.stdout.fileno(), stream)
    journal.stamp["piece"] = piece.name
    piece.work(journal.write)


def _follow(parent: int) -> None:
    """End this process and its children once its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)
