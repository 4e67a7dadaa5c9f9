"""Sampling frames of a local video, image or animation."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from vot_kernels.data.video.clip import Orientation, VideoClip, VideoInfo, make_info
from vot_kernels.data.video.images import is_animated, load_animation, load_image, open_image
from vot_kernels.data.video.picker import Picker, sampling_warnings, stacked
from vot_kernels.data.video.progress import progress_bar
from vot_kernels.data.video.reader import Reader
from vot_kernels.data.video.request import Request, VideoError

# The reader seeks to a wanted time that is at least this far ahead; for a nearer one decoding is faster.
_SEEK_GAP_S = 3.0


def load_video(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int | None = None,
    progress: bool = False,
) -> VideoClip:
    """Sample frames of a local video, image or animation.

    For each wanted time, the result has the frame that is shown then: the last one whose presentation time is not
    later. `VideoClip.times` has the presentation times themselves, so that a clip of variable frame rate
    keeps its real times, and the first time may lie a little before `start`. No frame is returned twice: if
    the file has fewer frames than wanted, the clip has fewer, with a warning in `VideoClip.info.warnings`.

    From a file that is cut off or damaged, the result has what can be decoded; `info.complete` is then False and a
    warning says how much that was. An image is a clip of one frame at time 0.

    Args:
        path: a local file.
        fps: wanted times are start, start + 1/fps, … before `end`. Not together with `num_frames`.
        max_frames: only with `fps`: if `fps` asks for more frames than this, this many are spread evenly over the
            range, as with `num_frames`.
        num_frames: wanted times are the centres of this many equal parts of the range. Default 16.
        start, end: the range in seconds from the first frame; the default is the whole file.
        max_pixels: frames with a larger area are scaled down to at most this many pixels, aspect kept, sides
            even. Without it frames keep their size.
        progress: show a progress bar on stderr when decoding takes more than a second (needs `rich`).

    Raises:
        VideoError: the request is invalid, or the file is missing, empty, not a media file, or has no picture.
    """
    request = Request(fps, num_frames, start, end, max_pixels, max_frames)
    return _open(_local_file(path), request, progress).clip()


def stream_video(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int | None = None,
    progress: bool = False,
) -> "FrameStream":
    """Sample frames as `load_video` does, but hand them over one by one, so that a file may be of any length.

    Memory is that of a few frames; only an image or an animation is read as a whole. The first frame is decoded at
    once, so that a file that cannot be read is reported here.

    Raises:
        VideoError: as in `load_video`.
    """
    request = Request(fps, num_frames, start, end, max_pixels, None)
    return _open(_local_file(path), request, progress)


def _open(file: Path, request: Request, progress: bool) -> "FrameStream":
    image = open_image(file)
    if image is None:
        return _VideoStream(file, request, progress)
    with image:
        load = load_animation if is_animated(image) else load_image
        return FrameStream.of(load(file, image, request))


def count_frames(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> int:
    """Return how many frames `stream_video` yields at most. The header says it, so that nothing is decoded.

    Raises:
        VideoError: as in `load_video`, but for what decoding alone finds.
    """
    request, file = Request(fps, num_frames, start, end, None, None), _local_file(path)
    image = open_image(file)
    if image is None:
        with Reader(file) as reader:
            return len(request.times(*request.span(reader.duration()[0], f"'{file}'")))
    with image:
        frames = getattr(image, "n_frames", 1) if is_animated(image) else 1
        return min(frames, request.num_frames or frames)


class FrameStream:
    """Sampled frames in order of time, once: pairs of a frame, uint8 `[height, width, 3]`, and its time in seconds.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, frames: Iterator[tuple[np.ndarray, float]], info: VideoInfo | None = None):
        self.path = path
        self._info = self._begun = info
        self._rest = frames
        self._ahead = deque(islice(frames, 1))  # frames that were decoded before anybody asked for them

    @classmethod
    def of(cls, clip: VideoClip) -> "FrameStream":
        """Stream the frames of a clip that is already in memory."""
        pairs = zip(clip.frames, clip.times.tolist(), strict=True)
        return FrameStream(Path(clip.info.path), iter(pairs), clip.info)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        while self._ahead:
            yield self._ahead.popleft()
        yield from self._rest

    @property
    def begun(self) -> VideoInfo:
        """What the file is, as its header and its first frame say; of what was sampled it says nothing."""
        assert self._begun is not None  # the first frame is read
        return self._begun

    @property
    def info(self) -> VideoInfo:
        """What the file is, and what was sampled.

        Raises:
            VideoError: some frames have not been read yet.
        """
        if self._info is None:
            raise VideoError(f"'{self.path}' must be read to its end before its description is known.")
        return self._info

    def is_longer(self, frames: int) -> bool:
        """Whether more than `frames` are left. So many are decoded now, and yielded all the same."""
        self._ahead.extend(islice(self._rest, max(0, frames + 1 - len(self._ahead))))
        return len(self._ahead) > frames

    def clip(self) -> VideoClip:
        """Return all frames as one clip."""
        frames, times = [], []
        for frame, time in self:
            frames.append(frame)
            times.append(time)
        return VideoClip(stacked(frames), np.array(times, dtype=np.float64), self.info)

    def stop(self) -> VideoInfo:
        """Close the file before its end, and return the report about the frames that were read."""
        return self.info


def _local_file(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise VideoError(f"A path must be a str or os.PathLike, got {type(path).__name__}.")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise VideoError("A path must be text, got bytes.")
    if "://" in text:
        raise VideoError(f"'{text}' is a URL, but only local files are read: download it first.")
    if not text or "\0" in text:
        raise VideoError(f"{text!r} is not a file name.")
    file = Path(text)
    if not file.exists():
        raise VideoError(f"There is no file '{text}'.")
    if file.is_dir():
        raise VideoError(f"'{text}' is a directory, but a video or image file is needed.")
    if not file.is_file():
        raise VideoError(f"'{text}' is not a regular file.")
    if not os.access(file, os.R_OK):
        raise VideoError(f"'{text}' may not be read: permission denied.")
    if file.stat().st_size == 0:
        raise VideoError(f"'{text}' is empty (0 bytes).")
    return file


class _VideoStream(FrameStream):
    """The frames of a video file, decoded when they are asked for."""

    def __init__(self, path: Path, request: Request, progress: bool):
        self._size = 0, 0
        super().__init__(path, self._decode(path, request, progress))

    def _decode(self, path: Path, request: Request, progress: bool) -> Iterator[tuple[np.ndarray, float]]:
        with Reader(path) as reader:
            duration, present = reader.duration()
            start, end = request.span(duration, f"'{path}'")
            converter = _Converter(request, reader.pixel_aspect)
            picker = Picker(request.times(start, end), reader.tolerance, converter)

            def told(times: list[float], complete: bool = False, warnings: Sequence[str] = ()) -> VideoInfo:
                source, container = reader.stream.codec_context, reader.container.format.name
                still = container == "image2" or container.endswith("_pipe")
                return make_info(
                    path, request, times, self._size, kind="image" if still else "video", container=container,
                    codec=source.name, source_width=converter.source[0], source_height=converter.source[1],
                    orientation=converter.orientation, average_fps=None if still else reader.rate,
                    duration_s=duration, complete=complete, decoded_until_s=reader.end, warnings=tuple(warnings),
                )  # fmt: skip

            cut = stopped = False
            try:
                with progress_bar(path.name, start, end, shown=progress) as report:
                    for _ in _pick(reader, picker, report):
                        yield from self._new(picker, told)
                cut = _cut_off(reader, picker, end, present)
                picker.close(reader.end if cut else math.inf)
                yield from self._new(picker, told)
            except GeneratorExit:
                stopped = True
            if not picker.times:
                raise VideoError(_nothing_decoded(path, reader, start, duration))
            complete = not cut and not stopped and not reader.damage.count
            warnings = _video_warnings(reader, picker, converter, duration, cut)
            warnings += sampling_warnings(picker, complete)
            self._info = told(picker.times, complete, warnings)

    def _new(
        self, picker: Picker, told: Callable[[list[float]], VideoInfo]
    ) -> Iterator[tuple[np.ndarray, float]]:
        """Yield what the picker has kept since the last call."""
        frames = picker.take()
        for frame, time in zip(frames, picker.times[len(picker.times) - len(frames) :], strict=True):
            self._size = frame.shape[1], frame.shape[0]
            self._begun = self._begun or told([])
            yield frame, time

    def stop(self) -> VideoInfo:
        self._rest.close()  # type: ignore[attr-defined]
        return self.info


def _pick(reader: Reader, picker: Picker, report: Callable[[float], None]) -> Iterator[None]:
    """Feed frames to the picker until it has all it needs or nothing more can be decoded; yield after each."""
    position = 0.0
    while not picker.done:
        if picker.next_wanted - position > _SEEK_GAP_S:
            reader.seek(picker.next_wanted)
        item = reader.read()
        if item is None:
            return
        position = item[0]
        picker.offer(*item)
        report(position)
        yield


def _cut_off(reader: Reader, picker: Picker, end: float, present: float | None) -> bool:
    """Whether the file stops before `end` seconds."""
    if present is not None and end - present > reader.slack:
        return True
    return not picker.done and end - (reader.reached() if present is None else reader.end) > reader.slack


def _nothing_decoded(path: Path, reader: Reader, start: float, duration: float) -> str:
    if reader.end > 0:
        return (
            f"'{path}' has nothing to decode from {start:g} s on: it can be decoded up to {reader.end:.2f} s"
            f" of {duration:.2f} s."
        )
    return f"'{path}' has a video stream, but no frame of it can be decoded: it is damaged or cut off."


def _video_warnings(
    reader: Reader, picker: Picker, converter: "_Converter", duration: float, cut: bool
) -> list[str]:
    warnings = []
    if cut:
        warnings.append(
            f"The file is cut off or damaged: {reader.end:.2f} s of {duration:.2f} s could be decoded, so"
            f" {picker.index} of {len(picker.wanted)} wanted times could be sampled."
        )
    damage = reader.damage
    if damage.count:
        where = f"at {damage.first:.2f} s" if damage.count == 1 else f"{damage.first:.2f}–{damage.last:.2f} s"
        plural = "s" if damage.count != 1 else ""
        warnings.append(
            f"Damaged data: {damage.count} packet{plural} or frame{plural} did not decode ({where})."
        )
    if reader.gap is not None:
        warnings.append(f"There are no frames between {reader.gap[0]:.2f} s and {reader.gap[1]:.2f} s.")
    if not reader.timed:
        warnings.append(f"The file has no time stamps: times assume {reader.rate:g} frames per second.")
    return warnings + converter.warnings


class _Converter:
    """Converts decoded frames to RGB arrays of one size, turned upright and scaled.

    Size and orientation are those of the first frame; if a stream changes its size, later frames are scaled to it.
    """

    def __init__(self, request: Request, pixel_aspect: float = 1.0) -> None:
        self.request = request
        self.pixel_aspect = pixel_aspect  # width of a stored pixel by its height, as in anamorphic video
        self.source = (0, 0)
        self.orientation = Orientation()
        self.warnings: list[str] = []
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        """Return the pixels of a libav frame, uint8 `[height, width, 3]`."""
        if self._size is None:
            self._prepare(frame)
        assert self._size is not None
        width, height = self._size
        picture = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
        return self.orientation.apply(picture.to_ndarray())

    def _prepare(self, frame: Any) -> None:
        self.source = (frame.width, frame.height)
        self.orientation, right_angle = _orientation(frame)
        if not right_angle:
            self.warnings.append(
                "The file asks for a rotation that is not a right angle; it was not applied."
            )
        self._size = self.request.size(frame.width * self.pixel_aspect, frame.height)


def _orientation(frame: Any) -> tuple[Orientation, bool]:
    """Return the orientation in the frame's display matrix, and whether it could be represented."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return Orientation(), True
    # Row vectors: x' = a·x + c·y, y' = b·x + d·y, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5] / 65536.0
    if min(abs(a), abs(d)) > 1e-3 and max(abs(b), abs(c)) < 1e-3:
        return Orientation(False, bool(d < 0), bool(a < 0)), True
    if min(abs(b), abs(c)) > 1e-3 and max(abs(a), abs(d)) < 1e-3:
        return Orientation(True, bool(b < 0), bool(c < 0)), True
    return Orientation(), False
