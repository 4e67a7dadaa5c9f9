"""A closer look at a long video: frames around the moments that matter, at whatever rate their number allows."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vot_kernels.data.video import VideoClip, load_video
from vot_kernels.scene_graph.interval import Interval

AROUND = 1.0  # seconds that are shown before a moment, and after it
PER_MOMENT = 4  # frames; the fewer the moments, the more frames there are of each


def look_at(
    video: str | os.PathLike[str] | VideoClip, moments: Sequence[Interval], frames: int, within: Interval
) -> VideoClip:
    """Return the frames of a video around some moments as one clip.

    Each moment is shown from a second before it to a second after it, and moments that meet are shown as one.

    Args:
        video: a file, which is decoded anew, or a clip, of whose frames some are chosen.
        moments: what to look at, at least one.
        frames: how many there are at most, shared out among the moments.
        within: the time that may be shown.

    Raises:
        VideoError: the file cannot be read.
    """
    spans, counts = zip(*_spans(moments, within), strict=True)
    ends = np.round(np.cumsum(counts) * frames / sum(counts)).astype(int)
    shares = np.diff(ends, prepend=0).tolist()
    parts = [_part(video, span, share) for span, share in zip(spans, shares, strict=True) if share]
    return _joined(parts, spans)


def _spans(moments: Sequence[Interval], within: Interval) -> list[tuple[Interval, int]]:
    """Return what is shown, by time and without overlap, and how many moments are in each of it."""
    wide = [Interval(m.start_s - AROUND, m.end_s + AROUND).shared(within) for m in moments]
    spans: list[tuple[Interval, int]] = []
    for span in sorted((span for span in wide if span is not None), key=lambda span: span.start_s):
        last, count = spans[-1] if spans else (None, 0)
        if last is not None and span.start_s <= last.end_s:
            spans[-1] = Interval(last.start_s, max(span.end_s, last.end_s)), count + 1
        else:
            spans.append((span, 1))
    return spans or [(within, 1)]


def _part(video: str | os.PathLike[str] | VideoClip, span: Interval, frames: int) -> VideoClip:
    """Return `frames` frames of a video, evenly spread over a span."""
    if not isinstance(video, VideoClip):
        return load_video(video, num_frames=frames, start=max(0.0, span.start_s), end=span.end_s)
    wanted = span.start_s + (np.arange(frames) + 0.5) * (span.length_s / frames)
    shown = np.unique(np.searchsorted(video.times, wanted, side="right") - 1).clip(0)
    return VideoClip(video.frames[shown], video.times[shown], video.info)


def _joined(parts: Sequence[VideoClip], spans: Sequence[Interval]) -> VideoClip:
    """Return clips in order of time as one; a frame that two of them show is in it once."""
    times = np.concatenate([part.times for part in parts])
    pixels = np.concatenate([part.frames for part in parts])
    new = np.diff(times, prepend=-np.inf) > 0
    times, info = times[new], parts[0].info
    warnings = tuple(dict.fromkeys(warning for part in parts for warning in part.info.warnings))
    info = replace(
        info, fps=None, num_frames=len(times), start=spans[0].start_s, end=spans[-1].end_s, warnings=warnings,
        frames_sampled=len(times), sampled_times_s=tuple(times.tolist()),
    )  # fmt: skip
    return VideoClip(pixels[new], times, info)
