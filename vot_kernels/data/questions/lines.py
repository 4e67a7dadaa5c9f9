"""The lines of a JSONL file, one after another: each is a question, or has one sentence on what is wrong."""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from vot_kernels.data.questions.question import KEYS, VideoQuestion, question_from_dict
from vot_kernels.files import parse_json_line

MAX_LINE = 64 * 2**20
"""Bytes of a line. A longer one is skipped without being read into memory."""
_MARK = b"\xef\xbb\xbf"  # what some editors put before the first line


class Line(NamedTuple):
    """A line that is not empty.

    Attributes:
        number: of the line, from 1.
        start, end: its first byte in the file, and that of the next line.
        question: what it says; None if that is no question.
        problem: why it is none.
        unread: keys that mean nothing here.
    """

    number: int
    start: int
    end: int
    question: VideoQuestion | None
    problem: str | None = None
    unread: tuple[str, ...] = ()


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """Yield the lines of a file in memory that does not grow with it; empty lines are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        number = start = 0
        while text := file.readline(MAX_LINE):
            number += 1
            whole = len(text) < MAX_LINE or text.endswith(b"\n")
            end = start + len(text) if whole else _skip_line(file)
            if not whole:
                problem = f"The line has {end - start:,} bytes; at most {MAX_LINE:,} are allowed."
                yield Line(number, start, end, None, problem)
            elif text.strip():
                yield _line(text, number, start, end)
            start = end


def read_line(path: str | os.PathLike[str], number: int, start: int) -> Line:
    """Read one line, whose number and first byte are known, again."""
    with open(path, "rb") as file:
        file.seek(start)
        text = file.readline(MAX_LINE)
    return _line(text, number, start, start + len(text))


def _line(text: bytes, number: int, start: int, end: int) -> Line:
    fields = None
    try:
        fields = parse_line(text, number)
        question = question_from_dict(fields, id=str(number))
    except ValueError as error:
        return Line(number, start, end, None, str(error))
    return Line(number, start, end, question, unread=tuple(key for key in fields if key not in KEYS))


def parse_line(text: bytes, number: int) -> Any:
    """Return what a line says, whose number in its file is known.

    Raises:
        ValueError: it is not UTF-8 or not JSON, in one sentence.
    """
    return parse_json_line(text.removeprefix(_MARK) if number == 1 else text)


def _skip_line(file: BinaryIO) -> int:
    """Read up to the end of the line, and return where that is."""
    while (text := file.readline(2**20)) and not text.endswith(b"\n"):
        pass
    return file.tell()
