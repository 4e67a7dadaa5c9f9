"""Episodes as files: an mp4 and a JSON file beside it with ground truth and questions."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.episode import Episode
from vot_kernels.data.digitworld.questions import Question
from vot_kernels.files import atomic_write
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval

FORMAT = "digitworld-1"


@dataclass(frozen=True)
class Sidecar:
    """The contents of the JSON file beside a clip.

    Attributes:
        split, index, seed: those of the episode.
        size: (height, width), px.
        fps: frames per second.
        radius: half the side of a sprite's box, px.
        centers: float64 `[T, N, 2]`, px.
        stsg: the exact scene graph.
        questions: questions about the clip, with their answers.
    """

    split: str
    index: int
    seed: int
    size: tuple[int, int]
    fps: float
    radius: float
    centers: np.ndarray
    stsg: STSG
    questions: tuple[Question, ...]


def sidecar_path(video: str | os.PathLike[str]) -> Path:
    """Return the path of the truth of "clip.mp4": "clip.json" in the same folder."""
    return Path(video).with_suffix(".json")


def save_episode(
    episode: Episode, path: str | os.PathLike[str], questions: Sequence[Question] | None = None
) -> Path:
    """Write `path` (mp4, H.264) and the JSON beside it, each completely or not at all; return the JSON's path.

    `questions` replaces the episode's own.
    """
    from vot_kernels.data.video import save_mp4

    save_mp4(path, episode.frames(), episode.scene.fps)
    content = {
        "format": FORMAT,
        "split": episode.split,
        "index": episode.index,
        "seed": episode.seed,
        "size": list(episode.scene.size),
        "fps": episode.scene.fps,
        "radius": episode.radius,
        "centers": np.round(episode.centers.astype(float), 3).tolist(),
        "stsg": episode.stsg.to_dict(),
        "questions": [
            asdict(question) for question in (episode.questions if questions is None else questions)
        ],
    }
    target = sidecar_path(path)
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return target


def load_sidecar(path: str | os.PathLike[str]) -> Sidecar:
    """Read the JSON beside a clip; `path` is either of the two files.

    Raises:
        ValueError: the file is not a sidecar.
        FileNotFoundError: there is no such file.
    """
    file = sidecar_path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        return Sidecar(
            split=str(content["split"]),
            index=int(content["index"]),
            seed=int(content["seed"]),
            size=(int(content["size"][0]), int(content["size"][1])),
            fps=float(content["fps"]),
            radius=float(content["radius"]),
            centers=np.array(content["centers"], dtype=np.float64),
            stsg=STSG.from_dict(content["stsg"]),
            questions=tuple(question_from_dict(question) for question in content["questions"]),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"'{file}' is not a DigitWorld sidecar of format {FORMAT}: {error}.") from error


def question_from_dict(fields: dict[str, Any]) -> Question:
    """Return the question that `dataclasses.asdict` turned into `fields`; KeyError if one is missing."""
    interval = fields.get("interval")  # files of an older version lack it
    return Question(
        kind=str(fields["kind"]),
        text=str(fields["text"]),
        candidates=tuple(fields["candidates"]),
        answer=str(fields["answer"]),
        flip=bool(fields["flip"]),
        cell=str(fields["cell"]),
        objects=tuple(fields["objects"]),
        interval=None if interval is None else Interval(**interval),
    )
