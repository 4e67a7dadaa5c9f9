"""Questions of a file for training: those of some videos are held out, and each is read when it is needed."""

import os
import posixpath
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from vot_kernels.data.questions.lines import Line, read_line, read_lines
from vot_kernels.data.questions.question import VideoQuestion

_TRAIN, _UNUSED = "train", "test"


class QuestionFile(Sequence[VideoQuestion]):
    """Some of the questions of a file. Only their places are in memory, 16 bytes each.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._numbers, self._starts = array("Q"), array("Q")

    def add(self, line: Line) -> None:
        """Add the question of a line of the file."""
        self._numbers.append(line.number)
        self._starts.append(line.start)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> VideoQuestion:  # type: ignore[override]
        """Read a question.

        Raises:
            ValueError: the file has changed since its places were found.
        """
        line = read_line(self.path, self._numbers[index], self._starts[index])
        if line.question is None:
            raise ValueError(f"{self.path} has changed: line {line.number} is no longer a question.")
        return line.question

    def where(self, wanted: Callable[[VideoQuestion], bool]) -> "QuestionFile":
        """Return those of the questions that are wanted; each is read once to see."""
        kept = QuestionFile(self.path)
        for index, question in enumerate(self):
            if wanted(question):
                kept._numbers.append(self._numbers[index])
                kept._starts.append(self._starts[index])
        return kept

    def video(self, question: VideoQuestion) -> Path:
        """Return the path of the video of a question of this file."""
        return self.path.parent / question.video


def split_questions(path: str | os.PathLike[str], held_out: float = 0.1) -> tuple[QuestionFile, QuestionFile]:
    """Return the questions to train on, and those that are held out.

    A question whose split is "train" is of the first, one of the split "test" of neither, and one of any other split is
    held out. Where there is no split, the path of the video decides, so that a video is of one of them alone.

    Args:
        path: the JSONL file.
        held_out: share of the videos without a split that is held out, in [0, 1].

    Raises:
        ValueError: a line is no question, or one of the two would have none.
        OSError: the file cannot be read.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"The share of held-out videos must be from 0 to 1, got {held_out:g}.")
    train, held = QuestionFile(path), QuestionFile(path)
    for line in read_lines(path):
        if line.question is None:
            raise ValueError(
                f"{path}, line {line.number}: {line.problem} All bad lines: vot data check {path}"
            )
        split = line.question.split or (_TRAIN if _place(line.question.video) >= held_out else "held out")
        if split != _UNUSED:
            (train if split == _TRAIN else held).add(line)
    for part, what in ((train, "to train on"), (held, "held out to measure with")):
        if not part:
            raise ValueError(
                f"{path} has {len(train) + len(held):,} questions, but none {what}: that takes another split, more "
                f"videos or another share of held-out videos than {held_out:g}."
            )
    return train, held


def _place(video: str) -> float:
    """Return a number in [0, 1) that the path of a video determines."""
    return zlib.crc32(posixpath.normpath(video).encode()) / 2**32
