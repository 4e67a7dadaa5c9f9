"""Answers to the questions of a JSONL file, resumable."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vot_kernels.files import append_json_lines, atomic_write, read_json_lines
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

    Raises:
        ValueError: `read_questions` refuses a line, or `out` has other contents; nothing is answered then.
    """
    folder = Path(questions).parent
    return write_answers(
        lambda todo: (answer_question(video_qa, item, folder, sampling) for item in todo), questions, out
    )


def write_answers(
    answers: Callable[[Sequence[Row]], Iterable[Row]],
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> BatchCounts:
    """Append to `out` what `answers` yields for those of the `questions` that `out` does not answer yet.

    Args:
        answers: takes the questions, as `read_questions` returns them, and yields a row for each, in their order.
        questions: JSONL of questions.
        out: JSONL of answers.

    Raises:
        ValueError: as in `answer_batch`.
    """
    source, target = Path(questions), Path(out)
    items = read_questions(source)
    todo = _unanswered(items, target)
    with append_json_lines(target) as append:
        failed = 0
        rows = answers(todo) if todo else ()
        for row in track(rows, source.name, total=len(todo), shown=bool(todo)):
            failed += "error" in row
            append(row)
    return BatchCounts(len(todo) - failed, len(items) - len(todo), failed)


def jobs_of(questions: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """Return the videos of the questions that `out` does not answer, each with the number of its questions in a row.

    Raises:
        ValueError: as in `answer_batch`.
    """
    todo = _unanswered(read_questions(questions), Path(out))
    videos = groupby(Path(questions).parent / item["video"] for item in todo)
    return [(video, len(list(group))) for video, group in videos]


def _unanswered(items: list[Row], out: Path) -> list[Row]:
    done = _finished(out)
    return [item for item in items if item["id"] not in done]


def answer_question(
    video_qa: "VideoQA", item: Row, folder: str | os.PathLike[str], sampling: Sampling | None = None
) -> Row:
    """Return the row about a question of `read_questions`: its answer, or the "error" that prevented one.

    `folder` is what a relative path of the video is relative to.
    """
    try:
        result = video_qa.ask(Path(folder, item["video"]), item["question"], item.get("candidates"), sampling)
    except (ValueError, OSError) as error:
        return {"id": item["id"], "video": item["video"], "question": item["question"], "error": str(error)}
    eyes = result.sight.to_dict()
    read = {} if result.read is None else {"reader_looked_at": result.read.info.describe()}
    return {"id": item["id"], "video": item["video"], **result.answer.to_dict(), "eyes": eyes, **read}


def read_questions(path: str | os.PathLike[str]) -> list[Row]:
    """Return the questions of a JSONL file, each with an "id".

    A line is an object with "video" (a path, relative to the file's folder if not absolute), "question", and
    optionally "candidates" (a list) and "id" (by default the line's number).

    Raises:
        ValueError: a line is not such an object, two lines have the same id, or there is no line.
    """
    items: list[Row] = []
    seen: dict[str, int] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            item = _parse(line, f"{path}, line {number}")
            item["id"] = str(item.get("id", number))
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


def _parse(line: str, where: str) -> Row:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("video", "question")):
        raise ValueError(f'{where}: must be an object with the strings "video" and "question".')
    candidates = item.get("candidates")
    if candidates is not None and not (
        isinstance(candidates, list) and candidates and all(isinstance(c, str) for c in candidates)
    ):
        raise ValueError(f'{where}: "candidates" must be a non-empty list of strings.')
    return item


def _finished(path: Path) -> set[str]:
    """Return the ids that are already answered. Lines with an error are removed, so that they are asked again."""
    try:
        rows = read_json_lines(path)
        done = {str(row["id"]) for row in rows if "error" not in row}
        if len(done) < len(rows):
            with atomic_write(path) as temporary, append_json_lines(temporary) as append:
                for row in rows:
                    if "error" not in row:
                        append(row)
        return done
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'{path} exists and is not a JSONL of answers with an "id" each.') from None
