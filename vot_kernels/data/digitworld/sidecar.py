"""Episodes as files: an mp4 with its truth and questions in a JSON beside it, and question sets as JSONL."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vot_kernels.data.digitworld.questions import Question
from vot_kernels.files import atomic_write
from vot_kernels.scene_graph.graph import STSG

if TYPE_CHECKING:
    from vot_kernels.data.digitworld.episode import Episode
    from vot_kernels.data.digitworld.question_sets import AskedEpisode

FORMAT = "digitworld-1"


@dataclass(frozen=True)
class Sidecar:
    """What the JSON beside a clip says. size (height, width) px; radius px; centers float64 [T, N, 2] px."""

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
    """Where the truth of "clip.mp4" lies: "clip.json" in the same folder."""
    return Path(video).with_suffix(".json")


def save_episode(episode: "Episode", path: str | os.PathLike[str], questions: Sequence[Question]) -> Path:
    """Write `path` (mp4, H.264) and the JSON beside it, each whole or not at all; returns the JSON's path."""
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
        "questions": [asdict(question) for question in questions],
    }
    target = sidecar_path(path)
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return target


def load_sidecar(path: str | os.PathLike[str]) -> Sidecar:
    """Read the JSON beside a clip; `path` is either of the two.

    Raises ValueError for a file that is no such JSON, FileNotFoundError where there is none.
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
    """The question that `dataclasses.asdict` turned into `fields`; KeyError where one is missing."""
    return Question(
        kind=str(fields["kind"]),
        text=str(fields["text"]),
        candidates=tuple(fields["candidates"]),
        answer=str(fields["answer"]),
        flip=bool(fields["flip"]),
        cell=str(fields["cell"]),
        objects=tuple(fields["objects"]),
    )


def save_question_set(path: str | os.PathLike[str], asked: Iterable["AskedEpisode"]) -> None:
    """Write one JSON line per question: which episode (split, index, seed), its clip's name, the question."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in asked:
            episode = item.episode
            where = {"split": episode.split, "index": episode.index, "seed": episode.seed}
            line = where | {"video": f"{episode.name}.mp4"} | asdict(item.question)
            file.write(json.dumps(line) + "\n")


def load_question_set(path: str | os.PathLike[str]) -> Iterator["AskedEpisode"]:
    """Read what `save_question_set` wrote, drawing each episode anew. ValueError names a broken line."""
    from vot_kernels.data.digitworld.episode import generate_episode
    from vot_kernels.data.digitworld.question_sets import AskedEpisode

    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                question = question_from_dict(fields)
                episode = generate_episode(fields["split"], fields["index"], fields["seed"])
            except (KeyError, TypeError, ValueError) as error:
                message = f"'{path}', line {number}, is not a DigitWorld question: {error}."
                raise ValueError(message) from error
            yield AskedEpisode(episode, question)
