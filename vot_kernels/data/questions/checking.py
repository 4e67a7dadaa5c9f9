"""The check of a file of questions: a sentence for each bad line, and a summary."""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from vot_kernels.data.questions.lines import read_lines
from vot_kernels.data.questions.question import KINDS, VideoQuestion
from vot_kernels.scene_graph.interval import Interval

SLACK_S = 0.1
"""Seconds by which an interval may end after its video, since annotations are rounded."""
_NAMED = 8  # unread keys that the summary names


@dataclass
class Summary:
    """What a file has.

    Attributes:
        lines, bad: lines that are not empty, and those of them that are no questions.
        videos: different videos.
        kinds: questions of each kind.
        graphs, times: questions with a scene graph, and with an interval.
        unread: for the first keys that mean nothing here, the lines that have them.
    """

    lines: int = 0
    bad: int = 0
    videos: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    times: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kinds[kind]:,} {kind}" for kind in KINDS if self.kinds[kind]) or "none"
        text = (
            f"{self.lines:,} lines, {self.bad:,} of them bad; {self.lines - self.bad:,} questions about "
            f"{self.videos:,} videos: {kinds}; {self.graphs:,} with a scene graph, {self.times:,} with times."
        )
        if self.unread:
            names = ", ".join(f'"{key}" ({count:,})' for key, count in self.unread.items())
            text += f"\nNot read, with the number of lines: {names}."
        return text


def check_questions(
    path: str | os.PathLike[str],
    report: Callable[[int, str], None],
    *,
    videos: bool = False,
    progress: Callable[[int], None] = lambda position: None,
) -> Summary:
    """Read a file of questions, whose length does not matter for memory, and return what it has.

    Args:
        path: the JSONL file.
        report: called with the number of each bad line and the sentence on what is wrong.
        videos: also decode a frame of each video, and compare intervals with its length.
        progress: called with the number of bytes read.

    Raises:
        OSError: the file cannot be read.
    """
    summary = Summary()
    with closing(_Seen(Path(path).parent, videos)) as seen:
        for line in read_lines(path):
            summary.lines += 1
            problem = line.problem
            if line.question is not None:
                problem = seen.problem(line.question, line.number)
            if problem is not None:
                summary.bad += 1
                report(line.number, problem)
            elif line.question is not None:
                _count(summary, line.question, line.unread)
            progress(line.end)
        summary.videos = seen.count_videos()
    return summary


def _count(summary: Summary, question: VideoQuestion, unread: tuple[str, ...]) -> None:
    summary.kinds[question.kind] += 1
    summary.graphs += question.stsg is not None
    summary.times += question.interval is not None
    summary.unread.update(key for key in unread if key in summary.unread or len(summary.unread) < _NAMED)


class _Seen:
    """The ids and videos of earlier lines, in a database that goes to a temporary file where it is large."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode
        self.database = sqlite3.connect("")
        self.database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self.database.execute(
            "CREATE TABLE videos (path TEXT PRIMARY KEY, problem TEXT, seconds REAL) WITHOUT ROWID"
        )

    def close(self) -> None:
        self.database.close()

    def count_videos(self) -> int:
        return self.database.execute("SELECT COUNT(*) FROM videos WHERE problem IS NULL").fetchone()[0]

    def problem(self, question: VideoQuestion, line: int) -> str | None:
        """Return what is wrong with a question, given the earlier lines; None if nothing is."""
        known = self.database.execute("SELECT line FROM ids WHERE id = ?", (question.id,)).fetchone()
        if known is not None:
            return f'"id" must be unique, but {question.id!r} is also that of line {known[0]}.'
        self.database.execute("INSERT INTO ids VALUES (?, ?)", (question.id, line))
        problem, seconds = self._video(question.video)
        if problem is not None or seconds is None:
            return problem
        graph = question.stsg
        last = max(graph.frame_times_s, default=0.0) if graph is not None else 0.0
        seen = Interval(0.0, last) if last > 0 else None
        return (
            _outside("interval", question.interval, seconds)
            or _outside("part", question.part, seconds)
            or _outside("frames of the scene graph", seen, seconds)
        )

    def _video(self, path: str) -> tuple[str | None, float | None]:
        """Return what is wrong with a video, and its length; each is decoded once."""
        row = self.database.execute("SELECT problem, seconds FROM videos WHERE path = ?", (path,)).fetchone()
        if row is None:
            row = _decoded(self.folder / path) if self.decode else (None, None)
            self.database.execute("INSERT INTO videos VALUES (?, ?, ?)", (path, *row))
        return row


def _decoded(path: Path) -> tuple[str | None, float | None]:
    from vot_kernels.data.video import VideoError, load_video

    try:
        info = load_video(path, num_frames=1, max_pixels=4096).info
    except (VideoError, OSError) as error:
        return f"The video cannot be read: {error}", None
    if not info.complete:
        return f"The video cannot be read to its end: {' '.join(info.warnings)}", None
    return None, info.duration_s


def _outside(what: str, interval: Interval | None, seconds: float) -> str | None:
    if interval is None or interval.end_s <= seconds + SLACK_S:
        return None
    return f"The {what} {interval} must lie in the video, which ends at {seconds:.2f} s."
