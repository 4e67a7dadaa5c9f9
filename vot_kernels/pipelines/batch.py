"""Answers to the questions of a JSONL file, resumable."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vot_kernels.data.questions.lines import parse_line
from vot_kernels.data.questions.question import id_of, part_of
from vot_kernels.files import append_json_lines, atomic_write, check_output, read_json_lines
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.sampling import Sampling

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoQA

Row = dict[str, Any]


class BatchCounts(NamedTuple):
    """The counts of a batch.

    Attributes:
        answered: lines answered now.
        skipped: lines that an earlier run had answered.
        failed: lines that could not be answered.
    """

    answered: int
    skipped: int
    failed: int


def answer_batch(
    video_qa: "VideoQA",
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sampling: Sampling | None = None,
) -> BatchCounts:
    """Answer every line of `questions` and append one line each to `out`.

    See `read_questions` for the format of a line. A question that `out` already answers is skipped, so that the same
    call resumes an interrupted run; a partly written last line is dropped first.
    A video that cannot be read gets a line with "error" instead of an answer; the next run tries it again.

    Args:
        video_qa: what answers.
        questions: JSONL of questions.
        out: JSONL of answers.
        sampling: which frames to look at; of a question with a "part" of the video, those of the part.

    Raises:
        ValueError: `read_questions` refuses a line, or `out` is `questions` or has other contents; nothing is answered
            then.
    """
    folder = Path(questions).parent
    return write_answers(
        lambda todo: (answer_question(video_qa, item, folder, sampling) for item in todo),
        questions,
        out,
        sampling,
    )


def write_answers(
    answers: Callable[[Sequence[Row]], Iterable[Row]],
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sampling: Sampling | None = None,
) -> BatchCounts:
    """Append to `out` what `answers` yields for those of the `questions` that `out` does not answer yet.

    Args:
        answers: takes the questions, as `read_questions` returns them, and yields a row for each, in their order.
        questions, out, sampling: as for `answer_batch`.

    Raises:
        ValueError: as in `answer_batch`.
    """
    source, target = Path(questions), Path(out)
    items, todo = _asked(source, target, sampling)
    with append_json_lines(target) as append:
        failed = 0
        rows = answers(todo) if todo else ()
        for row in track(rows, source.name, total=len(todo), shown=bool(todo)):
            failed += "error" in row
            append(row)
    return BatchCounts(len(todo) - failed, len(items) - len(todo), failed)


def jobs_of(
    questions: str | os.PathLike[str], out: str | os.PathLike[str], sampling: Sampling | None = None
) -> list[tuple[Path, int, Sampling]]:
    """Return the videos of the questions that `out` does not answer, each with the number of its questions in a row,
    and which frames they are about.

    Raises:
        ValueError: as in `answer_batch`.
    """
    _, todo = _asked(Path(questions), Path(out), sampling)
    shown = ((Path(questions).parent / item["video"], _sampling_of(item, sampling)) for item in todo)
    return [(video, len(list(group)), frames) for (video, frames), group in groupby(shown)]


def _asked(questions: Path, out: Path, sampling: Sampling | None) -> tuple[list[Row], list[Row]]:
    """Return all questions, and those that `out` does not answer."""
    items = read_questions(questions, sampling)
    check_output(out, "", questions)
    done = _finished(out)
    return items, [item for item in items if item["id"] not in done]


def _sampling_of(item: Row, sampling: Sampling | None) -> Sampling:
    """Return which frames a question is about."""
    return (sampling or Sampling()).of_part(part_of(item))


def answer_question(
    video_qa: "VideoQA", item: Row, folder: str | os.PathLike[str], sampling: Sampling | None = None
) -> Row:
    """Return the row about a question of `read_questions`: its answer, or the "error" that prevented one.

    `folder` is what a relative path of the video is relative to.
    """
    known = {key: item[key] for key in ("id", "video", "part") if item.get(key) is not None}
    try:
        shown = _sampling_of(item, sampling)
        result = video_qa.ask(Path(folder, item["video"]), item["question"], item.get("candidates"), shown)
    except (ValueError, OSError) as error:
        return {**known, "question": item["question"], "error": str(error)}
    eyes = result.sight.to_dict()
    read = {} if result.read is None else {"reader_looked_at": result.read.info.describe()}
    return {**known, **result.answer.to_dict(), "eyes": eyes, **read}


def read_questions(path: str | os.PathLike[str], sampling: Sampling | None = None) -> list[Row]:
    """Return the questions of a JSONL file, each with an "id".

    A line is an object with "video" (a path, relative to the file's folder if not absolute), "question", and
    optionally "candidates" (a list), "part" (the seconds of the video that are shown) and "id" (by default the line's
    number). Keys that are null count as missing.

    Raises:
        ValueError: the path is that of a folder, a device or a pipe; a line is not such an object, or has a "part"
            where `sampling` has a start or an end; two lines have the same id, or there is no line.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} must be a regular file, for it is read more than once.")
    items: list[Row] = []
    seen: dict[str, int] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = _question(parse_line(line, number), str(number))
                _sampling_of(item, sampling)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if item["id"] in seen:
                lines_ = f"{seen[item['id']]} and {number}"
                raise ValueError(f'{path}: an id must be unique, got "{item["id"]}" in the lines {lines_}.')
            seen[item["id"]] = number
            items.append(item)
    if not items:
        raise ValueError(
            f"{path}: must have at least one question, each line a JSON object with a video and a question."
        )
    return items


def _question(item: Any, number: str) -> Row:
    """Return a question with its id, by default the number of its line."""
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("video", "question")):
        raise ValueError('A line must be an object with the strings "video" and "question".')
    candidates = item.get("candidates")
    if candidates is not None and not (
        isinstance(candidates, list) and candidates and all(isinstance(c, str) for c in candidates)
    ):
        raise ValueError('"candidates" must be a non-empty list of strings.')
    return item | {"id": id_of(item, number)}


def _finished(path: Path) -> Collection[str]:
    """Return the ids that are already answered. Lines with an error are removed, so that they are asked again."""
    if path.exists():
        with append_json_lines(path):  # nobody else writes to it
            pass
    try:
        rows = read_json_lines(path, mend=False)  # what is no file of answers stays as it is
        # Every answer has a text; questions with ids have none.
        done = {str(row["id"]): row["text"] for row in rows if "error" not in row}
        read_json_lines(path)
        if len(done) < len(rows):
            with atomic_write(path) as temporary, append_json_lines(temporary) as append:
                for row in rows:
                    if "error" not in row:
                        append(row)
        return done
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} exists and is not a JSONL of answers with an "id" each.') from None
