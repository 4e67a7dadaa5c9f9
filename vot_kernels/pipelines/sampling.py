"""Decoding of what a model looks at. No model is imported here, so that a bad file is reported at once."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vot_kernels.data.video import FrameStream, VideoClip, count_frames, load_video, stream_video
from vot_kernels.models.checkpoint import (
    BUNDLED_CHECKPOINT,
    PERCEPTION,
    checkpoint_kind,
    is_own_model,
    read_config,
)
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.watching.protocols import DETECTOR_FPS, VIDEO_LANGUAGE_FPS

MAX_FRAMES = 32
MIN_WINDOW = 4  # frames, of which a quarter is shared with the window before
CLIP_SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
    *(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
}
DEFAULT_FPS = 8.0  # for a checkpoint whose config.json names none


@dataclass(frozen=True)
class Sampling:
    """Which frames to look at: by default as many per second as the checkpoint was trained on.

    Attributes:
        fps: frames per second.
        num_frames: this many frames, spread evenly, instead of `fps`.
        start, end: the range, in seconds.
    """

    fps: float | None = None
    num_frames: int | None = None
    start: float | None = None
    end: float | None = None

    def of_part(self, part: Interval | None) -> "Sampling":
        """Return the same frames of a part of the video alone; None is the whole of it.

        Raises:
            ValueError: there is a range already.
        """
        if part is None:
            return self
        if self.start is not None or self.end is not None:
            raise ValueError('"part" says which seconds are shown, so start and end cannot be given, too.')
        return replace(self, start=part.start_s, end=part.end_s)


def sample_video(
    path: str | os.PathLike[str], sampling: Sampling, fps: float = DEFAULT_FPS, progress: bool = False
) -> VideoClip:
    """Decode the frames that `sampling` asks for; by default `fps` per second, at most `MAX_FRAMES`."""
    rate, limit = sampling.fps, None
    if rate is None and sampling.num_frames is None:
        rate, limit = fps, MAX_FRAMES
    return load_video(
        path,
        fps=rate,
        max_frames=limit,
        num_frames=sampling.num_frames,
        start=sampling.start,
        end=sampling.end,
        progress=progress,
    )


def find_clips(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return files as they are, and in place of each folder its videos and images, in the order of their names.

    A file of a folder counts if its name ends like that of a video or image and does not begin with a dot. Folders
    within folders are left alone.

    Raises:
        ValueError: a folder has no such file.
        OSError: it cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in CLIP_SUFFIXES and p.is_file())
        inside = [p for p in inside if not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"The folder '{path}' has no video and no image.")
        found += inside
    return found


def stream_samples(
    path: str | os.PathLike[str], sampling: Sampling, fps: float = DEFAULT_FPS, progress: bool = False
) -> FrameStream:
    """Decode the frames that `sampling` asks for one by one; by default `fps` per second, however long the video."""
    rate = fps if sampling.fps is None and sampling.num_frames is None else sampling.fps
    return stream_video(
        path,
        fps=rate,
        num_frames=sampling.num_frames,
        start=sampling.start,
        end=sampling.end,
        progress=progress,
    )


def open_samples(
    path: str | os.PathLike[str],
    sampling: Sampling,
    fps: float = DEFAULT_FPS,
    window: int = MAX_FRAMES,
    progress: bool = False,
) -> VideoClip | FrameStream:
    """Return what `sampling` asks for as a clip if it is at most a window of frames, else as a stream."""
    stream = stream_samples(path, sampling, fps, progress)
    return stream if stream.is_longer(window) else stream.clip()


def count_samples(path: str | os.PathLike[str], sampling: Sampling, fps: float = DEFAULT_FPS) -> int:
    """Return how many frames `stream_samples` yields at most, as the header of the file says."""
    rate = fps if sampling.fps is None and sampling.num_frames is None else sampling.fps
    return count_frames(
        path, fps=rate, num_frames=sampling.num_frames, start=sampling.start, end=sampling.end
    )


def check_window(frames: int | None) -> None:
    """Refuse a number of frames that windows cannot have.

    Raises:
        ValueError: there are fewer than `MIN_WINDOW`.
    """
    if frames is not None and frames < MIN_WINDOW:
        raise ValueError(f"A window must have at least {MIN_WINDOW} frames, got {frames}.")


def check_device(name: str) -> None:
    """Refuse, without importing torch, a string that cannot be the name of a device.

    Raises:
        ValueError: `name` is not such a name.
    """
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise ValueError(f"A device must be cpu, cuda, cuda:1, mps or the like, got {name!r}.")


def checkpoint_folder(path: str | os.PathLike[str] | None = None, *kinds: str) -> Path:
    """Return the folder of a checkpoint of one of `kinds` (by default a perception checkpoint); None is the bundled
    one.

    Raises:
        FileNotFoundError: the folder does not hold a checkpoint.
        ValueError: it has a checkpoint of another kind.
    """
    folder = Path(path) if path is not None else BUNDLED_CHECKPOINT
    checkpoint_kind(folder, *(kinds or (PERCEPTION,)))
    if not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: it has no preprocessor_config.json.")
    return folder


def wanted_fps(
    checkpoint: str | os.PathLike[str] | None = None,
    vlm: str | os.PathLike[str] | None = None,
    detector: str | os.PathLike[str] | None = None,
) -> float:
    """Return the frames per second that the eyes want which `load_video_qa` makes of these folders."""
    if detector is not None:
        return DETECTOR_FPS
    sees_itself = vlm is not None and checkpoint is None and not is_own_model(vlm)
    return VIDEO_LANGUAGE_FPS if sees_itself else checkpoint_fps(checkpoint)


def checkpoint_fps(path: str | os.PathLike[str] | None = None, *kinds: str) -> float:
    """Return the frames per second on which a checkpoint was trained. Arguments as in `checkpoint_folder`."""
    return float(read_config(checkpoint_folder(path, *kinds)).get("fps", DEFAULT_FPS))
