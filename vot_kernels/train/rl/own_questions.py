"""Questions about a user's own videos as rows for GRPO: the columns of `questions.Rows`, from a file."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vot_kernels.data.questions.file import QuestionFile, split_questions
from vot_kernels.data.questions.question import VideoQuestion
from vot_kernels.train.rl.questions import shown
from vot_kernels.train.sft.questions import asked_of, ends_of, frames_of, seconds_of, shuffled
from vot_kernels.train.sft.replies import evidence_of
from vot_kernels.train.vlm.answers import first_prompt


@dataclass(frozen=True)
class QuestionRows:
    """Rows by index; the frames of a row are read from its video when it is taken.

    Attributes:
        questions: of a file, none of which asks for a scene graph.
        count: number of rows; the questions are shuffled, and shuffled anew when all have been asked.
        seed: of their order.
        frames: so many frames of the part of the video are shown.
        max_pixels: of a frame; larger ones are made smaller.
        summary: whether the model also reads the tracklets and events of the question's graph, where it has one.
        tokens: whether it reads the tokens of that graph, too.
    """

    questions: QuestionFile
    count: int
    seed: int
    frames: int
    max_pixels: int
    summary: bool
    tokens: bool = False

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> dict[str, Any]:
        """Return `prompt`, a message with frames and text, `asked`, its text, and the columns that rewards take."""
        question = shuffled(self.questions, self.seed, index)
        clip = frames_of(self.questions, question, max(1, self.frames), self.max_pixels)
        graph = question.stsg if self.summary else None
        asked = first_prompt(graph, asked_of(question))
        parts = shown(clip.frames, clip.times) if self.frames else []
        if self.tokens and graph is not None:
            parts.append({"type": "graph", "graph": graph})
        times = seconds_of(clip) if question.stsg is None else question.stsg.frame_times_s
        return {
            "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": asked}]}],
            "asked": asked,
            "question": question.question,
            "candidates": list(question.candidates) or None,
            "answer": question.answer,
            "interval": ends_of(question),
            "truth": _truth(question),
            "frame_times_s": list(times),
        }

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return the rows from `start` to `stop` - 1, or to the last."""
        return [self.row(index) for index in range(start, min(stop, self.count))]


def _truth(question: VideoQuestion) -> str | None:
    """Return the part of the graph that decides the question as text, None where there is none."""
    found = evidence_of(question)
    return None if found is None else found.graph.to_text(every=1)


@lru_cache(maxsize=2)
def split_for_replies(data: Path, held_out: float) -> tuple[QuestionFile, QuestionFile]:
    """Return the questions of `split_questions` whose replies are a thought and an answer.

    Raises:
        ValueError: as there, or all of one of them ask for scene graphs.
    """
    kept = tuple(part.where(_has_an_answer) for part in split_questions(data, held_out))
    for part, what in zip(kept, ("to train on", "held out to measure with"), strict=True):
        if not part:
            raise ValueError(
                f"{data} has no question {what} but those for scene graphs, which have no answer."
            )
    return kept  # type: ignore[return-value]


def _has_an_answer(question: VideoQuestion) -> bool:
    return question.kind != "graph"


RowsOf = Callable[[str, int, int], Any]
"""`rows(split, count, seed)` returns rows of the split "train" or "val"."""


def rows_of_file(
    data: Path, held_out: float, frames: int, max_pixels: int, summary: bool, tokens: bool = False
) -> RowsOf:
    """Return what makes rows of the questions of a file; of "val", each is asked once at most."""
    train, held = split_for_replies(data, held_out)

    def rows(split: str, count: int, seed: int) -> QuestionRows:
        questions = train if split == "train" else held
        count = count if split == "train" else min(count, len(held))
        return QuestionRows(questions, count, seed, frames, max_pixels, summary, tokens)

    return rows
