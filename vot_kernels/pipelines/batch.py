"""Answering many questions from a JSONL file, resumable."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from vot_kernels.pipelines.video_qa import Sampling, VideoQA


def answer_batch(
    video_qa: VideoQA,
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sampling: Sampling | None = None,
) -> tuple[int, int]:
    """Answer every line of `questions` and append one line each to `out`.

    A line is an object with "video" (a path, relative to the file's folder if not absolute), "question", and
    optionally "candidates" (a list) and "id" (by default the line's number). A question whose id already
    stands in `out` is skipped, so an interrupted run goes on; a half-written last line is dropped first.
    A video that cannot be read gets a line with "error" instead of an answer.

    Returns:
        (answered now, skipped).

    Raises:
        ValueError: a line that is not such an object, or two lines with one id; nothing is answered then.
    """
    source, target = Path(questions), Path(out)
    items = list(_read_questions(source))
    done = _finished(target)
    todo = [item for item in items if item["id"] not in done]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as lines:
        for item in track(todo, description=source.name, disable=not todo):
            lines.write(
                json.dumps(_answer(video_qa, item, source.parent, sampling), ensure_ascii=False) + "\n"
            )
            lines.flush()
            os.fsync(lines.fileno())
    return len(todo), len(items) - len(todo)


def _answer(
    video_qa: VideoQA, item: dict[str, Any], folder: Path, sampling: Sampling | None
) -> dict[str, Any]:
    try:
        result = video_qa.ask(folder / item["video"], item["question"], item.get("candidates"), sampling)
    except (ValueError, OSError) as error:
        return {"id": item["id"], "video": item["video"], "question": item["question"], "error": str(error)}
    return {"id": item["id"], "video": item["video"], **result.answer.to_dict()}


def _read_questions(path: Path) -> Iterator[dict[str, Any]]:
    seen: dict[str, int] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            item = _parse(line, f"{path}, line {number}")
            item["id"] = str(item.get("id", number))
            if item["id"] in seen:
                raise ValueError(
                    f'{path}: the id "{item["id"]}" stands in the lines {seen[item["id"]]} and {number}.'
                )
            seen[item["id"]] = number
            yield item


def _parse(line: str, where: str) -> dict[str, Any]:
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
    """Ids already answered; a last line that a killed run left half-written is cut off."""
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        return {str(json.loads(line)["id"]) for line in whole.splitlines() if line.strip()}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'{path} exists and is not a JSONL of answers with an "id" each.') from None
