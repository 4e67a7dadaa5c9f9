"""NExT-QA (Xiao et al. 2021): a CSV with a question in each row.

    video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4        multiple choice: answer is 0 to 4
    video,frame_count,width,height,question,answer,qid,type,additional_ref_answer      open: answer is a text

Videos have the numbers of VidOR; its folders are in the map that comes with the data set: `--names`.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Given, text

_CHOICES = ("a0", "a1", "a2", "a3", "a4")
_NEEDED = ("video", "question", "answer", "qid")


def records(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of the file; ValueError if it has other columns."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in _NEEDED if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path} must be a CSV of NExT-QA, but it has no column {missing[0]!r}.")
        try:
            return [(f"line {rows.line_num}", row) for row in rows]
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: the row cannot be read: {error}.") from None


def questions(row: dict[str, str], given: Given) -> Iterator[dict[str, Any]]:
    """Yield the question of a row."""
    if None in row:
        raise ValueError("The row has more cells than the file has columns.")
    video, answer = text(row, "video"), text(row, "answer")
    found: dict[str, Any] = {
        "id": f"{video}_{text(row, 'qid')}",
        "video": given.video(video),
        "question": text(row, "question"),
        "answer": answer,
    }
    if _CHOICES[0] in row:
        choices = [text(row, name) for name in _CHOICES]
        if not (answer.isdecimal() and answer.isascii() and int(answer) < len(choices)):
            raise ValueError(f'"answer" must be the number of a choice, 0 to 4, got {answer!r}.')
        found |= {"answer": choices[int(answer)], "candidates": choices}
    yield found
