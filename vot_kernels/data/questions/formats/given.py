"""What the readers of all formats share: JSON and its fields, and the paths and facts of videos."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vot_kernels.scene_graph.serialization import described

_WORDS = {str: "a string", list: "a list", dict: "an object", int: "a whole number"}


class LeftOut(NamedTuple):
    """A part of a record that was left out, and why."""

    reason: str


class Facts(NamedTuple):
    """Frames per second of a video, and its size in pixels; None where they are not known."""

    fps: float | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Given:
    """What a user says about a data set besides its file.

    Attributes:
        source: the annotation file.
        out: the folder of the JSONL, to which paths are relative.
        videos: the folder of the videos.
        suffix: of the names of videos that have none.
        names: for ids of videos that are called otherwise, their names.
        fps: frames per second of the videos, if they are not at hand.
    """

    source: Path
    out: Path
    videos: Path
    suffix: str = ".mp4"
    names: Mapping[str, str] = field(default_factory=dict)
    fps: float | None = None

    def video(self, id: str, name: str | None = None) -> str:
        """Return the path of a video, relative to the JSONL; `name` is what it is called if `names` says nothing."""
        called = self.names.get(id, name or id)
        if not called.endswith(self.suffix):
            called += self.suffix
        return Path(os.path.relpath(self.videos / called, self.out)).as_posix()

    def facts(self, video: str) -> Facts:
        """Return what the video at a path tells, or where it is not there, the frames per second given."""
        found = _facts(self.out / video)
        return found if found is not None else Facts(self.fps, None, None)


@lru_cache(maxsize=1024)
def _facts(path: Path) -> Facts | None:
    if not path.is_file():
        return None
    from vot_kernels.data.video import VideoError, load_video

    try:
        info = load_video(path, num_frames=1, max_pixels=4096).info
    except (VideoError, OSError):
        return None
    turned = info.rotation in (90, 270)
    width, height = info.source_width, info.source_height
    return Facts(info.average_fps, *((height, width) if turned else (width, height)))


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose content is a list or an object.

    Raises:
        ValueError: it is not JSON, or of another kind, in one sentence.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}.") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold {_WORDS[kind]}, got {described(content)}.")
    return content


def value(record: Any, key: str, *kinds: type) -> Any:
    """Return a field of a record.

    Raises:
        ValueError: the record is no object, lacks the field, or has it in another kind than `kinds`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"It must be an object, got {described(record)}.")
    if record.get(key) is None:
        raise ValueError(f'"{key}" is missing.')
    found = record[key]
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise ValueError(
            f'"{key}" must be {" or ".join(_WORDS[kind] for kind in kinds)}, got {described(found)}.'
        )
    return found


def text(record: Any, key: str) -> str:
    """Return a field that is a string or a whole number, as a string."""
    return str(value(record, key, str, int)).strip()
