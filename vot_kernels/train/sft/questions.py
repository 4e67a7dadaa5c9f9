"""Conversations about a user's own videos: batches to train on, and metrics of those that are held out."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vot_kernels.data.digitworld.traces import ask, read_reply
from vot_kernels.data.questions.file import QuestionFile
from vot_kernels.data.questions.question import KINDS, VideoQuestion
from vot_kernels.data.video import DEFAULT_NUM_FRAMES, VideoClip, VideoError, load_video
from vot_kernels.models.vot import VotProcessor
from vot_kernels.packing import PackedLayout
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.rewards.answers import accuracy
from vot_kernels.train.sft.replies import reply_to
from vot_kernels.train.vlm.answers import Asked, first_prompt, replies
from vot_kernels.train.vlm.conversations import Clip, Conversation, ConversationBatches, Speaker, Turn
from vot_kernels.train.vlm.stage import nats_per_token

_EVAL_BATCH = 8


class Posed(NamedTuple):
    """A question with what the model sees.

    Attributes:
        question: the question.
        clip: frames of its part of the video, at their times.
        graph: its scene graph; None if there is none, the model reads none, or it is the answer.
        seconds: times in the video from 0 to its end.
    """

    question: VideoQuestion
    clip: Clip
    graph: STSG | None
    seconds: tuple[float, ...]


def answer(posed: Posed, rng: np.random.Generator) -> Conversation:
    """Return a question and the reply to it as a conversation."""
    turn = Turn(first_prompt(posed.graph, asked_of(posed.question)), reply_to(posed.question))
    return Conversation([turn], posed.clip, posed.graph)


def asked_of(question: VideoQuestion) -> str:
    """Return what the user says; who asks for a graph has no question."""
    return question.question if question.kind == "graph" else ask(question.question, question.candidates)


class QuestionBatches(ConversationBatches):
    """The batches of questions of a file by step, shuffled anew each time that all have been asked.

    Args:
        questions: of the file.
        signature: what tells the file from others, for resuming.
        processor, speak, seed, batch_size, ranks: as in `ConversationBatches`; `speak` takes a `Posed`.
    """

    def __init__(
        self,
        questions: QuestionFile,
        signature: Mapping[str, Any],
        processor: VotProcessor,
        speak: Speaker,
        seed: int,
        batch_size: int,
        ranks: Ranks = ALONE,
    ):
        super().__init__(processor, speak, seed, batch_size, ranks=ranks)
        self.questions, self.signature = questions, signature

    def sizes(self, items: Sequence[int]) -> PackedLayout:
        """Return as segments that the items are equally large: of each video equally many frames are shown."""
        return PackedLayout.from_lengths([1] * len(items))

    def conversation(self, index: int) -> Conversation:
        """Return the conversation about question `index` of the shuffled ones."""
        return self.speak(self.posed(index), np.random.default_rng([self.seed, index]))

    def posed(self, index: int) -> Posed:
        """Return question `index` of the shuffled ones, with its frames.

        Raises:
            ValueError: its video cannot be read.
        """
        question = shuffled(self.questions, self.seed, index)
        frames = self.processor.num_frames or DEFAULT_NUM_FRAMES
        found = frames_of(self.questions, question, frames, self.processor.image_processor.max_pixels)
        reads = self.processor.tokens_per_track and question.kind != "graph"
        graph = question.stsg if reads else None
        return Posed(question, Clip(found.frames, found.times), graph, seconds_of(found))

    def loader(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Load batches `start` … `stop - 1`; what is wrong with one is said in a sentence."""
        step = start
        try:
            for batch in super().loader(start, stop):
                yield batch
                step += 1
        except ValueError:
            self[step]  # without the worker's traceback
            raise


def data_identity(path: Path, held_out: float) -> dict[str, Any]:
    """Return what tells the questions of a file, and those that are held out, from any others."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            total = zlib.crc32(part, total)
    return {"data": path.name, "data_checksum": f"{total:08x}", "held_out": held_out}


def shuffled(questions: QuestionFile, seed: int, index: int) -> VideoQuestion:
    """Return a question of a file that is shuffled, and shuffled anew each time that all have been asked."""
    turn, place = divmod(index, len(questions))
    return questions[int(_order(seed, turn, len(questions))[place])]


def frames_of(questions: QuestionFile, question: VideoQuestion, frames: int, max_pixels: int) -> VideoClip:
    """Return frames, evenly spread, of the part of the video that a question is about.

    Raises:
        ValueError: the video cannot be read.
    """
    part = question.part
    start, end = (None, None) if part is None else (part.start_s, part.end_s)
    try:
        return load_video(
            questions.video(question), num_frames=frames, max_pixels=max_pixels, start=start, end=end
        )
    except VideoError as error:
        raise ValueError(f"{questions.path}, question {question.id!r}: {error}") from error


def seconds_of(clip: VideoClip) -> tuple[float, ...]:
    """Return times of a video from 0 to its end, those of the clip among them."""
    return tuple(np.unique([0.0, *clip.times, clip.info.duration_s]).tolist())


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def question_metrics(
    model: Any, processor: VotProcessor, clips: int, *, questions: QuestionFile, seed: int = 0
) -> dict[str, float]:
    """Measure on at most `clips` held-out questions.

    Returns:
        nats: per token of the true replies; format: share of replies that are a thought and an answer as a whole;
        accuracy: share of the answers that are right, for a time its temporal IoU; and accuracy by kind of question.
        Replies that are scene graphs count for nats alone.
    """
    count = min(clips, len(questions))
    batches = QuestionBatches(questions, {}, processor, answer, seed, _EVAL_BATCH)
    found = {"nats": nats_per_token(model, batches, count)}
    posed = [p for p in map(batches.posed, range(count)) if p.question.kind != "graph"]
    if not posed:
        return found
    asked = [Asked(p.clip, p.graph, p.question.question, p.question.candidates) for p in posed]
    said = list(replies(model, processor, asked))
    return found | scores([p.question for p in posed], [p.seconds for p in posed], said)


def scores(
    questions: Sequence[VideoQuestion], seconds: Sequence[Sequence[float]], said: Sequence[str]
) -> dict[str, float]:
    """Return the share of replies with the right form, and of right answers, as `question_metrics` does."""
    right = np.array(
        accuracy(said, [q.answer for q in questions], [ends_of(q) for q in questions], seconds), np.float64
    )
    kinds = np.array([q.kind for q in questions])
    return {
        "format": float(np.mean([read_reply(text) is not None for text in said])),
        "accuracy": float(right.mean()),
        **{kind: float(right[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()},
    }


def ends_of(question: VideoQuestion) -> tuple[float, float] | None:
    """Return the interval that is the answer."""
    if question.kind != "when" or question.interval is None:
        return None
    return question.interval.start_s, question.interval.end_s
