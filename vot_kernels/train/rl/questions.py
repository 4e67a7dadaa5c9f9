"""Questions about DigitWorld clips as rows for GRPO: what the model reads, and the columns that rewards take."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.question_sets import AskedEpisode, draw_question
from vot_kernels.data.digitworld.traces import ask, evidence, evidence_text
from vot_kernels.extras import imports_for
from vot_kernels.train.vlm.answers import first_prompt
from vot_kernels.train.vlm.conversations import render

_FIRST_TRAINED = 1_000
"""The first question about clips of "train", each of which has 500 to choose from; the supervised stages take those
before."""


@dataclass(frozen=True)
class Rows:
    """Rows by index; the clip of a row is drawn and rendered when it is taken, so that none waits in memory or a file.

    Attributes:
        split: of DigitWorld.
        count: number of rows.
        seed: of the clips.
        frames: so many frames of each clip are shown.
        summary: whether the model also reads the tracklets and events of the true graph.
        tokens: whether it reads the tokens of that graph, too.
    """

    split: str
    count: int
    seed: int
    frames: int
    summary: bool
    tokens: bool = False

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> dict[str, Any]:
        """Return `prompt`, a message with frames and text, `asked`, its text, and the columns that rewards take."""
        item = asked_about(self.split, index, self.seed)
        question, stsg = item.question, item.episode.stsg
        text = ask(question.text, question.candidates)
        asked = first_prompt(stsg, text) if self.summary else text
        parts = shown_frames(item, self.frames)
        if self.tokens:
            parts.append({"type": "graph", "graph": stsg})
        return {
            "prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": asked}]}],
            "asked": asked,
            "question": question.text,
            "candidates": list(question.candidates),
            "answer": question.answer,
            "truth": evidence_text(evidence(question, stsg), question),
            "frame_times_s": list(stsg.frame_times_s),
        }

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return the rows from `start` to `stop` - 1, or to the last."""
        return [self.row(index) for index in range(start, min(stop, self.count))]


def asked_about(split: str, index: int, seed: int) -> AskedEpisode:
    """Return the question and clip of a row; every kind of question takes its turn."""
    return draw_question(split, index + (_FIRST_TRAINED if split == "train" else 0), seed)


def as_dataset(rows: Any) -> Any:
    """Return the rows as a dataset of the package datasets, which computes a row when it is taken."""
    with imports_for("GRPO", "rl"):
        from datasets import Dataset

    def take(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rendered = {index: rows.row(index) for index in set(batch["index"])}
        taken = [rendered[index] for index in batch["index"]]
        return {name: [row[name] for row in taken] for name in taken[0]}

    return Dataset.from_dict({"index": list(range(len(rows)))}).with_transform(take)


def shown_frames(item: AskedEpisode, frames: int) -> list[dict[str, Any]]:
    """Return parts of a message: frames taken evenly from the clip, each after its time."""
    clip = render(item.episode)
    taken = np.linspace(0, len(clip.frames) - 1, min(frames, len(clip.frames))).round().astype(int)
    return shown(clip.frames[taken], clip.times[taken])


def shown(frames: np.ndarray, times: np.ndarray) -> list[dict[str, Any]]:
    """Return parts of a message: each frame after its time.

    So the processor writes a video; here images stand in the place of its frames, because TRL hands on images alone.
    """
    with imports_for("GRPO", "video"):
        from PIL import Image
    return [
        part
        for frame, time in zip(frames, times, strict=True)
        for part in (
            {"type": "text", "text": f"{time:.1f}s"},
            {"type": "image", "image": Image.fromarray(frame)},
        )
    ]
