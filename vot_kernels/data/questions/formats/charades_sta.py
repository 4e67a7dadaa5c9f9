"""Charades-STA (Gao et al. 2017): a text file with a sentence, and when it happens, in each line.

ABCDE 2.5 9.0##person opens the door.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.formats.given import Given

_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+)\s*##(.*)")


def records(path: Path) -> list[tuple[str, tuple[int, str]]]:
    """Return the lines of the file, with their numbers."""
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return [(f"line {n}", (n, line)) for n, line in enumerate(lines, 1) if line.strip()]


def questions(line: tuple[int, str], given: Given) -> Iterator[dict[str, Any]]:
    """Yield the question of a line."""
    number, said = line
    match = _LINE.fullmatch(said.strip())
    if match is None:
        raise ValueError("It must read VIDEO START END##SENTENCE.")
    sentence = match[4].strip().rstrip(".").strip()
    if not sentence:
        raise ValueError("It has no sentence after ##.")
    yield {
        "id": f"{match[1]}_{number}",
        "video": given.video(match[1]),
        "question": f'When does this happen: "{sentence}"?',
        "start": _seconds(match[2]),
        "end": _seconds(match[3]),
    }


def _seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"A time must be a number of seconds, got {word!r}.") from None
