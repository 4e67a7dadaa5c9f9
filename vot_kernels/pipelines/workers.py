"""What a worker process does with a batch of rows: for Ray Data, Daft, Spark, or any engine that maps a class.

A worker loads its models when it is made, in the process where it works. Rows are names of files, questions and
answers; frames and tensors never travel.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vot_kernels.files import atomic_write
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION
from vot_kernels.pipelines.batch import Row, answer_question
from vot_kernels.pipelines.encode import described, encode_clips, load_encoder
from vot_kernels.pipelines.errors import CORRECTABLE, sentence
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, checkpoint_fps, sample_video

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoQA

Columns = Mapping[str, Iterable[Any]]
"""A batch of rows as columns of equal length: a dict of lists or arrays, or a data frame."""


class AnswerQuestions:
    """Answers questions about videos. Questions about the same video should follow each other: it is seen once then.

    Args:
        load: returns what answers; it is pickled, for example `functools.partial(load_video_qa, llm=folder)`.
        folder: what relative paths of videos are relative to; None is the worker's own folder.
        sampling: which frames to look at.
    """

    def __init__(
        self,
        load: "Callable[[], VideoQA]",
        folder: str | os.PathLike[str] | None = None,
        sampling: Sampling | None = None,
    ):
        self._video_qa = load()
        self._folder, self._sampling = Path(folder or ""), sampling

    def __call__(self, rows: Columns) -> dict[str, list[str]]:
        """Return the columns "id" and "answer", the latter in JSON: what `answer_batch` writes of the question.

        Args:
            rows: columns "id", "video" (a path), "question", and "candidates" (a list; empty or None to have them
                proposed). A column "part" (a list of two numbers; empty or None for the whole video) need not be there.
        """
        ids = [str(id_) for id_ in rows["id"]]
        parts = rows["part"] if "part" in rows else [None] * len(ids)
        answers = []
        for id_, video, question, given, part in zip(
            ids, rows["video"], rows["question"], rows["candidates"], parts, strict=True
        ):
            candidates = [] if given is None else [str(one) for one in given]
            seconds = [] if part is None else [float(one) for one in part]
            item: Row = {"id": id_, "video": str(video), "question": str(question)}
            item |= {"candidates": candidates} if candidates else {}
            item |= {"part": seconds} if seconds else {}
            answers.append(self._answer(item))
        return {"id": ids, "answer": [json.dumps(answer, ensure_ascii=False) for answer in answers]}

    def _answer(self, item: Row) -> Row:
        try:
            return answer_question(self._video_qa, item, self._folder, self._sampling)
        except Exception as error:  # of whatever kind, it is about this video and not about the others
            return {key: item[key] for key in ("id", "video", "question")} | {"error": _in_words(error)}


class EncodeVideos:
    """Encodes videos, each into a safetensors file of its own.

    Args:
        checkpoint, sampling, device: as for `encode_videos`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        sampling: Sampling | None = None,
        device: str = "cpu",
    ):
        self._fps = checkpoint_fps(checkpoint, ENCODER, PERCEPTION)
        self._encoder, self._processor = load_encoder(
            checkpoint_folder(checkpoint, ENCODER, PERCEPTION), device
        )
        self._sampling = sampling or Sampling()

    def __call__(self, rows: Columns) -> dict[str, list[str]]:
        """Return the columns "video" and "error", the latter empty where nothing failed.

        Args:
            rows: columns "video" (a path) and "file", which is written: "pooled", "tokens", "grid_thw" and "times_s"
                as in `encode_videos`, and "description" in the metadata.
        """
        videos = [str(video) for video in rows["video"]]
        errors = [self._encode(video, str(file)) for video, file in zip(videos, rows["file"], strict=True)]
        return {"video": videos, "error": errors}

    def _encode(self, video: str, file: str) -> str:
        from safetensors.torch import save_file

        try:
            clip = sample_video(video, self._sampling, self._fps)
            (encoded,) = encode_clips(self._encoder, self._processor, [clip])
            with atomic_write(file) as temporary:
                description = described(clip, len(encoded["tokens"]))
                save_file(encoded, temporary, metadata={"description": description})
        except Exception as error:  # as above
            return _in_words(error)
        return ""


def _in_words(error: Exception) -> str:
    known = isinstance(error, CORRECTABLE)
    return sentence(error) if known else f"{type(error).__name__}: {sentence(error)}"
