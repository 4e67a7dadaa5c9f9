"""What a run will take, before it begins: one clip is measured, and the frames of all videos are counted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.data.video import FrameStream, VideoClip, load_video
from vot_kernels.pipelines.sampling import Sampling, count_samples
from vot_kernels.watching.cost import Run
from vot_kernels.watching.written import WrittenGraph

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import Video, VideoQA
    from vot_kernels.watching.cost import Estimate


def estimate_run(video_qa: VideoQA, jobs: Sequence[tuple[Video, int, Sampling]]) -> Estimate | None:
    """Return what a run takes; None if its reader does not look at videos, or if none of them can be read.

    The memory and the work for a clip are those of the first video; of the others the headers are read.

    Args:
        video_qa: what answers.
        jobs: each video, with the number of questions that are asked about it in a row, and which frames are looked at.
    """
    if not video_qa.max_frames or not hasattr(video_qa.reader, "estimate"):
        return None
    runs, first = [], None
    for video, questions, sampling in jobs:
        try:
            frames = _count(video, sampling, video_qa.eyes.fps)
            clip = first or _sample(video, min(frames, video_qa.max_frames), sampling)
        except (ValueError, OSError):
            continue  # it will be a line with an error
        first = first or clip
        runs.append(_run(video_qa, frames, questions))
    if first is None:
        return None
    total = Run(*map(sum, zip(*runs, strict=True)))
    return replace(video_qa.reader.estimate(first), run=total)


def _run(video_qa: VideoQA, frames: int, questions: int) -> Run:
    """Return what is asked of the model about one video."""
    windows, graphs = 1, 0
    if isinstance(video_qa.eyes, WrittenGraph):
        size = video_qa.window
        windows = graphs = 1 + -(-max(0, frames - size) // (size - size // 4))
    short = frames <= min(video_qa.window, video_qa.max_frames)  # the clip is read once, for all
    return Run(1, questions, 1 if short else (windows if graphs else 0) + questions, graphs)


def _count(video: Video, sampling: Sampling, fps: float) -> int:
    if isinstance(video, VideoClip):
        return len(video.times)
    return count_samples(_file(video), sampling, fps)


def _sample(video: Video, frames: int, sampling: Sampling) -> VideoClip:
    """Return a clip of so many frames."""
    if isinstance(video, VideoClip):
        whole = len(video.times) == frames
        return video if whole else VideoClip(video.frames[:frames], video.times[:frames], video.info)
    return load_video(_file(video), num_frames=frames, start=sampling.start, end=sampling.end)


def _file(video: str | os.PathLike[str] | FrameStream) -> Path:
    return video.path if isinstance(video, FrameStream) else Path(video)
