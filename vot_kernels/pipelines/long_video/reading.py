"""From a stream of frames to one scene graph, window by window."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.data.video import FrameStream, VideoClip
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import Detection, detect
from vot_kernels.models.perception.streaming import TokenStream, can_stream
from vot_kernels.pipelines.long_video.frames import Frame, Showcase, Window, windows
from vot_kernels.pipelines.long_video.joining import EVERY, MAX_BOXES, GraphJoiner
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.summary import at_frames
from vot_kernels.watching.perception import explained
from vot_kernels.watching.protocols import WINDOW, Eyes, Sight

OVERLAP = 8  # frames that a window shares with the one before
REPORTED = 8  # windows from one report of the progress to the next
PATIENCE = 8  # windows: if none of so many is in the checkpoint's domain, the rest is not read


@dataclass(frozen=True)
class Seen:
    """What was seen in a stream.

    Attributes:
        detection: the scene graph of all frames; the distance from the domain is the median over the windows.
        frames, times: at most `WINDOW` of the frames, evenly spread, to be shown: uint8 `[frames, height, width, 3]`,
            and float64 `[frames]`, seconds.
        complete: False if the stream was given up as outside of the domain.
    """

    detection: Detection
    frames: np.ndarray
    times: np.ndarray
    complete: bool


def see_stream(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    frames: Iterable[Frame],
    source: str = "",
    *,
    size: int = WINDOW,
    overlap: int = OVERLAP,
    give_up: bool = True,
    report: Callable[[str], None] | None = None,
) -> Seen:
    """Read the scene graph of frames of any number, in memory that does not grow with it.

    At most `size` frames are read together. An encoder that is causal from frame to frame computes the tokens of
    each frame once and carries its state through the whole stream; any other sees a window at a time, and windows
    share `overlap` frames, over which `GraphJoiner` recognises the tracklets. A stream of one window gives just what
    `detect` gives.

    Args:
        frames: pairs of a frame, uint8 `[height, width, 3]`, and its time in seconds.
        give_up: stop when the first `PATIENCE` windows are all outside of the checkpoint's domain.
        report: called with the progress in words, at the second window and at every 8th from there on.

    Raises:
        ValueError: there is no frame, or not 0 < overlap < size.
    """
    showcase, joiner = Showcase(size), GraphJoiner()
    stream = TokenStream(model, size) if can_stream(model) else None
    distances: list[float] = []
    only: Detection | None = None
    complete = True
    for window in windows(showcase.watch(frames), size, overlap):
        if report is not None and len(distances) % REPORTED == 1:
            report(_progress(window))
        read = None if stream is None else stream.reader(window.new)
        found = detect(model, processor, [window.frames], [window.times], source, read)
        (only,) = explained(model, found)
        joiner.add(only.stsg, window.start)
        distances.append(only.domain_distance)
        if give_up and len(distances) == PATIENCE and min(distances) > only.domain_threshold:
            complete = False
            break
    if only is None:
        raise ValueError("A stream must have at least one frame, got none.")
    if len(distances) > 1:
        distance = statistics.median(distances)
        only = Detection(joiner.graph(source), (), distance, only.domain_threshold)
    pixels, times = zip(*showcase.kept, strict=True)
    return Seen(only, np.stack(pixels), np.array(times), complete)


def see_windows(
    eyes: Eyes, frames: FrameStream, size: int = WINDOW, report: Callable[[str], None] | None = None
) -> tuple[VideoClip, Sight]:
    """Have any eyes see a stream window by window, and join what they see, in memory that does not grow.

    Args:
        eyes: what sees each window as a clip.
        frames: the stream.
        size: frames of a window, which shares a quarter of them with the one before.
        report: called with the progress in words, at each window but the first.

    Returns:
        At most `size` of the frames, evenly spread, to be shown, and the sight of all of them. It has a warning if
        every window has one.

    Raises:
        ValueError: `size` is below 4.
    """
    showcase, joiner = Showcase(size), GraphJoiner()
    sights: list[Sight] = []
    for window in windows(showcase.watch(frames), size, size // 4):
        if report is not None and sights:
            report(_progress(window))
        times = tuple(window.times.tolist())
        info = replace(frames.begun, frames_sampled=len(times), sampled_times_s=times)
        seen = eyes.see(VideoClip(window.frames, window.times, info))
        joiner.add(seen.stsg, window.start)
        sights.append(replace(seen, stsg=STSG(())))
    pixels, shown = zip(*showcase.kept, strict=True)
    return VideoClip(np.stack(pixels), np.array(shown), frames.info), _joined(sights, joiner, frames)


def _joined(sights: list[Sight], joiner: GraphJoiner, frames: FrameStream) -> Sight:
    warned = all(sight.warning is not None for sight in sights)
    return replace(
        sights[0],
        stsg=joiner.graph(f"{frames.path.name} seen by {sights[0].eyes}"),
        warning=sights[0].warning if warned else None,
        issues=tuple(issue for sight in sights for issue in sight.issues),
        calls=tuple(call for sight in sights for call in sight.calls),
    )


def _progress(window: Window) -> str:
    return f"Looking at the frames: {window.start + len(window.times):,}, {window.times[-1]:.0f} s"


def shown_part(stsg: STSG, times: np.ndarray) -> STSG:
    """Return the part of a graph about the frames at `times` alone, as `Seen.frames` are."""
    if stsg.num_frames == len(times):
        return stsg
    number = {time: k for k, time in enumerate(stsg.frame_times_s)}
    return at_frames(stsg, [number[time] for time in times.tolist()], spacing(stsg, len(times)))


def spacing(stsg: STSG, shown: int) -> int:
    """Return how many frames may lie from one box to the next of what is seen all the time.

    Args:
        shown: number of `Seen.frames`; a graph about more frames than these is a summary, without most boxes.
    """
    return 1 if stsg.num_frames == shown else 2 * stsg.num_frames // MAX_BOXES + EVERY
