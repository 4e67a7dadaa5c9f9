"""Video input: sample frames of a local video, image or animation, with their real presentation times.

Memory is bounded by the frames that are sampled, never by the length of the file: frames are decoded one
after another, and only those asked for are converted, scaled and kept.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import monotonic as _now
from typing import Any, Literal, NamedTuple

import numpy as np

from vot_kernels.files import atomic_write

try:
    import av
    from av.sidedata.sidedata import Type as SideDataType
    from PIL import Image
except ImportError as error:
    raise ImportError("Reading video needs PyAV and Pillow: pip install 'vot-kernels[video]'.") from error

DEFAULT_NUM_FRAMES = 16
MAX_FPS = 1000.0
MAX_NUM_FRAMES = 1_000_000

# A wanted time this much further on is reached by seeking; nearer ones are quicker reached by decoding on.
_SEEK_GAP_S = 3.0
# Files up to this size are read through once, undecoded, for their exact time span: headers can be wrong.
_SCAN_BYTES = 256 << 20
_MAX_READ_ERRORS = 32
_FIRST_PACKETS = 32
# Text art and playlists: libav would open these, but the first is no video and the others name further files.
_REFUSED_FORMATS = {"tty", "hls", "concat", "dash", "imf", "lavfi", "vapoursynth", "avisynth"}
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ANIMATED_FORMATS = {"GIF", "WEBP", "PNG"}
_DEFAULT_ANIMATION_DELAY_S = 0.1  # what browsers show for a frame without a duration


class VideoError(ValueError):
    """The input cannot be used, or the request makes no sense for it; the message is one sentence."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file is, what was asked of it and what came out. Times are seconds from its first frame.

    Attributes:
        path: the file.
        kind: "video", "image" or "animation" (a GIF, APNG or WebP with several frames).
        container, codec: names of the container format and of the codec.
        source_width, source_height: size in pixels as stored, before rotation and scaling.
        width, height: size in pixels of the frames that came out.
        rotation: degrees clockwise by which the frames were turned, as the file's metadata asks.
        mirrored: whether the metadata also asked to mirror the frames left to right, before turning.
        average_fps: frames per second on average, None for an image.
        duration_s: length as the file declares it or, if longer, as its time stamps show; 0 for an image.
        frames_sampled: number of frames that came out.
        sampled_times_s: their presentation times.
        fps, num_frames, start, end, max_pixels: the request, with None where nothing was asked.
        complete: the asked-for range is all there and nothing in what was decoded was damaged.
        decoded_until_s: end of the last frame that was decoded.
        warnings: one sentence each, for whatever a user should know.
    """

    path: str
    kind: Literal["video", "image", "animation"]
    container: str
    codec: str
    source_width: int
    source_height: int
    width: int
    height: int
    rotation: int
    mirrored: bool
    average_fps: float | None
    duration_s: float
    frames_sampled: int
    sampled_times_s: tuple[float, ...]
    fps: float | None
    num_frames: int | None
    start: float | None
    end: float | None
    max_pixels: int | None
    complete: bool
    decoded_until_s: float
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """One paragraph: what the file is, what was sampled and when, and every warning."""
        size = f"{self.source_width}×{self.source_height}"
        what = f"{Path(self.path).name}: {self.kind} ({self.codec} in {self.container}), {size}"
        if self.rotation or self.mirrored:
            turn = ["mirrored"] * self.mirrored + [f"turned {self.rotation}° clockwise"] * bool(self.rotation)
            what += f", {' and '.join(turn)}"
        if self.kind != "image":
            rate = f" at {self.average_fps:.4g} fps" if self.average_fps else ""
            what += f", {self.duration_s:.2f} s{rate}"
        asked = [
            f"{name} {value:g}"
            for name, value in (
                ("fps", self.fps),
                ("num_frames", self.num_frames),
                ("start", self.start),
                ("end", self.end),
                ("max_pixels", self.max_pixels),
            )
            if value is not None
        ]
        request = ", ".join(asked) or f"the default, {DEFAULT_NUM_FRAMES} frames over the whole length"
        plural = "s" if self.frames_sampled != 1 else ""
        sampled = (
            f"Sampled {self.frames_sampled} frame{plural} of {self.width}×{self.height} (asked: {request})"
        )
        if self.kind != "image":
            sampled += f" at {_list_times(self.sampled_times_s)} s"
        return " ".join([f"{what}.", f"{sampled}.", *self.warnings])


def _list_times(times: tuple[float, ...]) -> str:
    shown = [f"{at:.2f}" for at in times]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:12], "…", *shown[-3:]])


@dataclass(frozen=True)
class VideoClip:
    """Sampled frames: uint8 RGB `[frames, height, width, 3]`, and their times, float64 `[frames]`, s."""

    frames: np.ndarray
    times: np.ndarray
    info: VideoInfo


def load_video(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int | None = None,
    progress: bool = False,
) -> VideoClip:
    """Sample frames of a local video, image or animation.

    For each wanted time the frame on show is taken: the last one whose presentation time is not later. Its
    own time is what `VideoClip.times` holds, so a clip of variable frame rate keeps its real times, and the
    first time may lie a little before `start`. No frame comes out twice: fewer frames than asked for come
    out where the file has fewer, with a warning in `VideoClip.info.warnings`.

    A file that is cut off or damaged gives what can be decoded; `info.complete` is then False and a warning
    says how much that was. An image is a clip of one frame at time 0.

    Args:
        path: a local file.
        fps: wanted times are start, start + 1/fps, … before `end`. Not together with `num_frames`.
        num_frames: wanted times are the centres of this many equal parts of the range. Default 16.
        start, end: the range in seconds from the first frame; the default is the whole file.
        max_pixels: frames with a larger area are scaled down to at most this many pixels, aspect kept, sides
            even. Without it frames keep their size.
        progress: show a progress bar on stderr when decoding takes more than a second (needs `rich`).

    Raises:
        VideoError: the request makes no sense, or the file is missing, empty, no media, or has no picture.
    """
    request = _Request(fps, num_frames, start, end, max_pixels)
    file = _local_file(path)
    image = _open_image(file)
    if image is None:
        return _load_video(file, request, progress)
    with image:
        return (
            _load_animation(file, image, request)
            if _is_animated(image)
            else _load_image(file, image, request)
        )


# --- the request -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """A checked request for frames."""

    fps: float | None
    num_frames: int | None
    start: float | None
    end: float | None
    max_pixels: int | None

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise VideoError(
                f"Give fps or num_frames, not both (got fps={self.fps}, num_frames={self.num_frames})."
            )
        _check_number("fps", self.fps, lambda x: 0 < x <= MAX_FPS, f"above 0 and at most {MAX_FPS:g}")
        _check_whole("num_frames", self.num_frames, MAX_NUM_FRAMES)
        _check_whole("max_pixels", self.max_pixels, None)
        _check_number("start", self.start, lambda x: x >= 0, "seconds from 0 on")
        _check_number("end", self.end, lambda x: x > 0, "seconds above 0")
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise VideoError(
                f"start must be before end, but start is {self.start or 0:g} s and end is {self.end:g} s."
            )

    def span(self, duration: float, name: str) -> tuple[float, float]:
        """The range to sample, in seconds, of something `duration` seconds long."""
        start = self.start or 0.0
        if start > 0 and start >= duration:
            raise VideoError(f"start is {start:g} s, but {name} ends at {duration:.3f} s.")
        return start, duration if self.end is None else min(self.end, duration)

    def times(self, start: float, end: float) -> np.ndarray:
        """Wanted times, increasing, in seconds."""
        if self.fps is not None:
            # The margin keeps rounding of the duration from adding a time at the very end.
            count = max(1, math.ceil((end - start) * self.fps - 1e-3))
            return start + np.arange(count) / self.fps
        count = self.num_frames or DEFAULT_NUM_FRAMES
        return start + (np.arange(count) + 0.5) * ((end - start) / count)

    def size(self, width: float, height: float) -> tuple[int, int]:
        """Width and height in pixels after scaling to `max_pixels`."""
        if self.max_pixels is None or width * height <= self.max_pixels:
            return max(1, round(width)), max(1, round(height))
        scale = math.sqrt(self.max_pixels / (width * height))
        columns, rows = _even(width * scale), _even(height * scale)
        # A side that cannot shrink below one pixel leaves the area to the other.
        return min(columns, _even(self.max_pixels / rows)), min(rows, _even(self.max_pixels / columns))


def _check_number(name: str, value: float | None, allowed: Callable[[float], bool], words: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction | np.integer | np.floating):
        raise VideoError(f"{name} must be a number ({words}), got {value!r}.")
    if not math.isfinite(value) or not allowed(float(value)):
        raise VideoError(f"{name} must be {words}, got {value}.")


def _check_whole(name: str, value: int | None, most: int | None) -> None:
    if value is None:
        return
    words = "a whole number from 1 on" if most is None else f"a whole number from 1 to {most}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise VideoError(f"{name} must be {words}, got {value!r}.")
    if value < 1 or (most is not None and value > most):
        raise VideoError(f"{name} must be {words}, got {value}.")


def _even(side: float) -> int:
    """The largest even whole number not above `side`, or 1 where there is none."""
    return max(1, int(side) // 2 * 2)


# --- the file ----------------------------------------------------------------------------------------------


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


# --- picking frames ----------------------------------------------------------------------------------------


class _Picker:
    """Takes frames in order of time and keeps, converted, those on show at the wanted times.

    Only one frame that is not kept is held: the latest, whose end is not known until the next one comes.
    """

    def __init__(self, wanted: np.ndarray, tolerance: float, convert: Callable[[Any], np.ndarray]) -> None:
        self.wanted = wanted
        self.tolerance = tolerance  # seconds by which rounding may have moved a time stamp
        self.convert = convert
        self.index = 0
        self.frames: list[np.ndarray] = []
        self.times: list[float] = []
        self._held: tuple[float, Any] | None = None

    @property
    def done(self) -> bool:
        return self.index >= len(self.wanted)

    @property
    def next_wanted(self) -> float:
        return float(self.wanted[self.index])

    def offer(self, start: float, frame: Any) -> None:
        """The next frame, on show from `start` seconds; it ends the one before."""
        self.close(start - self.tolerance)
        self._held = (start, frame)

    def close(self, end: float) -> None:
        """The held frame is on show until `end` seconds; keep it if a wanted time lies before that."""
        if self._held is None or self.done or self.next_wanted >= end:
            return
        start, frame = self._held
        self.frames.append(self.convert(frame))
        self.times.append(start)
        self.index = int(np.searchsorted(self.wanted, end, side="left"))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames `[frames, height, width, 3]` and times `[frames]`; gives up its own frames."""
        stacked = np.empty((len(self.frames), *self.frames[0].shape), dtype=np.uint8)
        for i in range(len(self.frames)):
            stacked[i] = self.frames[i]
            self.frames[i] = stacked[:0]  # frees the frame, so that no second copy of the clip stands beside
        return stacked, np.array(self.times, dtype=np.float64)


class _Orientation(NamedTuple):
    """How stored pixels become the shown picture: first transposed, then flipped."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_rows ^ self.flip_columns

    @property
    def rotation(self) -> int:
        """Degrees clockwise, after mirroring left to right where `mirrored`."""
        if self.transpose:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_rows else 0

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Turn `[height, width, 3]`."""
        if self.transpose:
            pixels = pixels.transpose(1, 0, 2)
        if self.flip_rows:
            pixels = pixels[::-1]
        if self.flip_columns:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)


def _sampling_warnings(picker: _Picker, complete: bool) -> list[str]:
    wanted, found = len(picker.wanted), len(picker.times)
    if complete and found < wanted:
        return [f"{wanted} times were asked for, but the file shows only {found} different frames at them."]
    return []


# --- video -------------------------------------------------------------------------------------------------


@dataclass
class _Damage:
    """Packets and frames that could not be decoded cleanly."""

    count: int = 0
    first: float = 0.0
    last: float = 0.0

    def add(self, at: float) -> None:
        self.first = at if self.count == 0 else self.first
        self.last = at
        self.count += 1


@dataclass
class _Span:
    """Time span of the packets of one file, in seconds from its first frame."""

    end: float = 0.0  # of the video stream
    other_end: float = 0.0  # of the other streams
    packets: int = 0


class _Reader:
    """Decodes one video stream of a local file, in order of time, past whatever is damaged.

    Attributes:
        stream: the libav stream that is decoded.
        end: seconds at which the last decoded frame ends.
        damage: what went wrong so far.
        gap: the longest stretch without frames that the frames' durations do not explain (start, end).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage = _Damage()
        self.end = 0.0
        self.gap: tuple[float, float] | None = None
        self.timed = True
        self._other_end = 0.0
        self._position = -math.inf
        self._settling_until = -math.inf
        self._sparse = False
        self._open()
        self._origin = self._first_stamp()
        self._seekable = self._declared() is not None
        self._frames = self._decode()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _open(self) -> None:
        self.container = _open_container(self.path)
        try:
            self.stream = _video_stream(self.container, self.path)
        except VideoError:
            self.container.close()
            raise
        self.stream.thread_type = "AUTO"

    def _first_stamp(self) -> float | None:
        """The file's own time stamp, in seconds, of its first frame; None where frames have no stamps.

        Looked up in the first packets, as frames may be stored out of order and headers may be off by a few.
        """
        with _open_container(self.path) as container:
            stream = container.streams[self.stream.index]
            packets = (p for p in _packets(container, lambda: None) if p.stream is stream and p.size)
            stamps = [
                float(packet.pts * packet.time_base)
                for packet in itertools.islice(packets, _FIRST_PACKETS)
                if packet.pts is not None and not packet.is_discard
            ]
        return min(stamps, default=None)

    @property
    def rate(self) -> float:
        """Average frames per second; libav's own guess of 25 where nothing is known."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(rate) if rate else 25.0

    @property
    def pixel_aspect(self) -> float:
        """Width of a stored pixel by its height."""
        ratio = self.stream.sample_aspect_ratio
        return float(ratio) if ratio and 0.1 <= ratio <= 10 else 1.0

    @property
    def tolerance(self) -> float:
        """Seconds by which the container's clock may have rounded a time stamp."""
        tick = float(self.stream.time_base) if self.stream.time_base else 0.0
        return min(tick / 2, 5e-4) + 1e-9

    def _declared(self) -> float | None:
        """Seconds of video as the headers declare them, None where they do not."""
        stream = self.stream
        if self.container.format.name == "avi" and stream.frames:
            return (
                stream.frames / self.rate
            )  # libav shortens the duration of a truncated file; the count stays
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        tag = _seconds(stream.metadata.get("DURATION"))
        offset = max(self._origin or 0.0, 0.0)  # both that follow count from time stamp 0
        if tag is not None:
            return tag - offset
        if self.container.duration is not None:
            return self.container.duration / av.time_base - offset
        return None

    @property
    def _whole_file(self) -> bool:
        """Whether the declared duration is that of the whole file, in which sound may outlast the picture."""
        return self.stream.duration is None and "DURATION" not in self.stream.metadata

    @property
    def slack(self) -> float:
        """Seconds by which a declared duration may miss the end of the last frame."""
        return (3.0 if self._whole_file else 1.5) / self.rate + 0.01

    def duration(self) -> tuple[float, float | None]:
        """Seconds of video, and of these how many have packets in the file (None: not looked for)."""
        declared = self._declared()
        if declared is not None and self.path.stat().st_size > _SCAN_BYTES:
            return declared, None
        span = self._scan()
        if declared is None or (self._whole_file and span.other_end >= declared - self.slack):
            return span.end, span.end
        return max(declared, span.end), span.end

    def _scan(self) -> _Span:
        """Read every packet, decoding none."""
        span, origin = _Span(), self._origin
        with _open_container(self.path) as container:
            stream = container.streams[self.stream.index]
            for packet in _packets(container, lambda: None):
                if not packet.size:
                    continue
                if packet.stream is not stream:
                    span.other_end = max(span.other_end, _packet_end(packet) - (origin or 0.0))
                    continue
                span.packets += 1
                if packet.pts is None:
                    continue
                at = float(packet.pts * packet.time_base)
                origin = at if origin is None else origin
                span.end = max(span.end, at - origin + self._length(packet))
        if span.end == 0.0:  # no time stamps at all, as in a bare H.264 stream
            span.end = span.packets / self.rate
        return span

    def _length(self, item: Any) -> float:
        """Seconds for which a packet or frame is shown."""
        if item.duration and item.time_base:
            return float(item.duration * item.time_base)
        return 1.0 / self.rate

    def read(self) -> tuple[float, Any] | None:
        """The next frame and its time; times increase. None at the end of what can be decoded."""
        for at, frame in self._frames:
            if at <= self._position:
                continue
            if at >= self._settling_until - self.tolerance and frame.is_corrupt:
                self.damage.add(at)
            self._note_gap(at)
            self._position = at
            self.end = at + self._length(frame)
            return at, frame
        return None

    def _note_gap(self, at: float) -> None:
        if self._sparse:
            self._sparse = False
        elif at - self.end > 4 / self.rate and at - self.end > (
            self.gap[1] - self.gap[0] if self.gap else 0.0
        ):
            self.gap = (self.end, at)

    def seek(self, at: float) -> None:
        """Go on from the last key frame before `at` seconds, if that is ahead and the file allows it."""
        if not self._seekable or self._origin is None:
            return
        try:
            self.container.seek(int((at + self._origin) / self.stream.time_base), stream=self.stream)
        except av.FFmpegError:
            self._restart()
            return
        self._settling_until = at
        frames = self._decode()
        first = next(frames, None)
        # An unreliable index lands late, or between key frames, where pictures are garbage.
        if first is None or not first[1].key_frame or first[0] > at:
            self._restart()
            return
        self._frames = itertools.chain([first], frames)
        if first[0] <= self._position:
            self._seekable = False  # key frames are too far apart for seeking to save anything
        else:
            self._sparse = True

    def _restart(self) -> None:
        """Decode from the start, without seeking from here on."""
        self._seekable = False
        self._settling_until = -math.inf
        self.container.close()
        self._open()
        self._frames = self._decode()

    def _decode(self) -> Iterator[tuple[float, Any]]:
        count = 0
        for packet in self._all_packets():
            if packet.stream is not self.stream:
                self._other_end = max(self._other_end, _packet_end(packet) - (self._origin or 0.0))
                continue
            if packet.is_corrupt and packet.size:
                self._note_damage()
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if not packet.is_corrupt:
                    self._note_damage()
                continue
            for frame in frames:
                yield self._time(frame, count), frame
                count += 1

    def _all_packets(self) -> Iterator[Any]:
        return _packets(self.container, self._note_damage)

    def _time(self, frame: Any, count: int) -> float:
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None:
            self.timed = False
            return count / self.rate
        at = float(stamp * frame.time_base)
        if self._origin is None:
            self._origin = at
        return at - self._origin

    def _note_damage(self) -> None:
        if self._position >= self._settling_until - 2 / self.rate:
            self.damage.add(self.end)

    def reached(self) -> float:
        """Seconds up to which the file goes, judged by the streams whose length its duration speaks of."""
        return max(self.end, self._other_end) if self._whole_file else self.end


def _packet_end(packet: Any) -> float:
    if packet.pts is None or not packet.time_base:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _open_container(path: Path) -> Any:
    try:
        # Prefix and whitelist keep a name such as "concat:a|b", or a playlist, from opening anything else.
        container = av.open(f"file:{path.absolute()}", options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise VideoError(_not_media(path, error)) from None
    if container.format.name in _REFUSED_FORMATS:
        name = container.format.name
        container.close()
        what = "a text file" if name == "tty" else f"a playlist ({name})"
        raise VideoError(f"'{path}' is {what}, not a video or image.")
    return container


def _not_media(path: Path, error: Exception) -> str:
    if isinstance(error, av.InvalidDataError):
        return (
            f"'{path}' cannot be read as a video or image: it is not a media file,"
            " or it is damaged at its start, or cut off before its index."
        )
    return f"'{path}' cannot be read as a video or image: {getattr(error, 'strerror', None) or error}."


def _video_stream(container: Any, path: Path) -> Any:
    attached = av.stream.Disposition.attached_pic
    videos = [stream for stream in container.streams.video if not stream.disposition & attached]
    for stream in videos:
        if stream.codec_context is not None and stream.codec_context.width and stream.codec_context.height:
            return stream
    if videos:
        raise VideoError(
            f"'{path}' has a video stream, but its format is not told: it is damaged or cut off."
        )
    if container.streams.audio:
        codec = container.streams.audio[0].codec_context
        name = codec.name if codec is not None else "unknown codec"
        cover = ", with a cover picture" if container.streams.video else ""
        raise VideoError(f"'{path}' has only sound ({name}{cover}), but a video or image is needed.")
    raise VideoError(f"'{path}' has no video stream.")


def _packets(container: Any, on_error: Callable[[], None]) -> Iterator[Any]:
    """Packets of all streams; reads on after errors, as long as they do not pile up."""
    packets, errors = container.demux(), 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            on_error()
            errors += 1
            if errors >= _MAX_READ_ERRORS:
                return
            packets = container.demux()
            continue
        errors = 0
        yield packet


def _load_video(path: Path, request: _Request, progress: bool) -> VideoClip:
    with _Reader(path) as reader:
        duration, present = reader.duration()
        start, end = request.span(duration, f"'{path}'")
        converter = _Converter(request, reader.pixel_aspect)
        picker = _Picker(request.times(start, end), reader.tolerance, converter)
        with _progress_bar(path.name, start, end, shown=progress) as report:
            _pick(reader, picker, report)
        cut = _cut_off(reader, picker, end, present)
        picker.close(reader.end if cut else math.inf)
        if not picker.times:
            raise VideoError(_nothing_decoded(path, reader, start, duration))
        complete = not cut and not reader.damage.count
        warnings = _video_warnings(reader, picker, converter, duration, cut)
        warnings += _sampling_warnings(picker, complete)
        source = reader.stream.codec_context
        kind: Literal["video", "image"] = "video"
        if reader.container.format.name == "image2" or reader.container.format.name.endswith("_pipe"):
            kind = "image"
        return _clip(
            path, request, picker, kind=kind, container=reader.container.format.name, codec=source.name,
            source_width=converter.source[0], source_height=converter.source[1],
            orientation=converter.orientation, average_fps=None if kind == "image" else reader.rate,
            duration_s=duration, complete=complete, decoded_until_s=reader.end, warnings=tuple(warnings),
        )  # fmt: skip


def _pick(reader: _Reader, picker: _Picker, report: Callable[[float], None]) -> None:
    """Feed frames to the picker until it has all it wants or nothing more can be decoded."""
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


def _cut_off(reader: _Reader, picker: _Picker, end: float, present: float | None) -> bool:
    """Whether the file stops before `end` seconds."""
    if present is not None and end - present > reader.slack:
        return True
    return not picker.done and end - (reader.reached() if present is None else reader.end) > reader.slack


def _nothing_decoded(path: Path, reader: _Reader, start: float, duration: float) -> str:
    if reader.end > 0:
        return (
            f"'{path}' has nothing to decode from {start:g} s on: it can be decoded up to {reader.end:.2f} s"
            f" of {duration:.2f} s."
        )
    return f"'{path}' has a video stream, but no frame of it can be decoded: it is damaged or cut off."


def _video_warnings(
    reader: _Reader, picker: _Picker, converter: "_Converter", duration: float, cut: bool
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
    """Turns decoded frames into RGB arrays of one size, turned upright and scaled on the way.

    Size and orientation are those of the first frame; a stream that changes its size midway is scaled to it.
    """

    def __init__(self, request: _Request, pixel_aspect: float = 1.0) -> None:
        self.request = request
        self.pixel_aspect = pixel_aspect  # width of a stored pixel by its height, as in anamorphic video
        self.source = (0, 0)
        self.orientation = _Orientation()
        self.warnings: list[str] = []
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> np.ndarray:
        """Pixels uint8 `[height, width, 3]` of a libav frame."""
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


def _orientation(frame: Any) -> tuple[_Orientation, bool]:
    """Orientation asked for by the frame's display matrix, and whether it could be represented."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return _Orientation(), True
    # Row vectors: x' = a·x + c·y, y' = b·x + d·y, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5] / 65536.0
    if min(abs(a), abs(d)) > 1e-3 and max(abs(b), abs(c)) < 1e-3:
        return _Orientation(False, bool(d < 0), bool(a < 0)), True
    if min(abs(b), abs(c)) > 1e-3 and max(abs(a), abs(d)) < 1e-3:
        return _Orientation(True, bool(b < 0), bool(c < 0)), True
    return _Orientation(), False


def _seconds(clock: str | None) -> float | None:
    """Seconds of "hh:mm:ss.fraction", None for anything else."""
    try:
        hours, minutes, seconds = (clock or "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _clip(
    path: Path,
    request: _Request,
    picker: _Picker,
    *,
    orientation: _Orientation,
    **facts: Any,
) -> VideoClip:
    frames, times = picker.result()
    info = VideoInfo(
        path=str(path),
        width=frames.shape[2],
        height=frames.shape[1],
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        frames_sampled=len(times),
        sampled_times_s=tuple(times.tolist()),
        fps=None if request.fps is None else float(request.fps),
        num_frames=None if request.num_frames is None else int(request.num_frames),
        start=None if request.start is None else float(request.start),
        end=None if request.end is None else float(request.end),
        max_pixels=None if request.max_pixels is None else int(request.max_pixels),
        **facts,
    )
    return VideoClip(frames, times, info)


# --- images and animations ---------------------------------------------------------------------------------

_EXIF_ORIENTATION = 0x0112
_EXIF = {
    2: _Orientation(False, False, True),
    3: _Orientation(False, True, True),
    4: _Orientation(False, True, False),
    5: _Orientation(True, False, False),
    6: _Orientation(True, False, True),
    7: _Orientation(True, True, True),
    8: _Orientation(True, True, False),
}


def _open_image(path: Path) -> Any | None:
    """The opened image, or None where the file is none."""
    try:
        return Image.open(path, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise VideoError(f"'{path}' is too large an image: {error}.") from None
    except (OSError, SyntaxError, ValueError):
        return None


def _is_animated(image: Any) -> bool:
    return image.format in _ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))


def _load_pixels(image: Any) -> bool:
    """Decode the current frame; False if it is cut off, with whatever could be decoded left in `image`."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError):
        image.tile = []  # what Pillow has decoded so far is the picture
        return False
    return True


def _rgb(image: Any, request: _Request) -> np.ndarray:
    """Pixels uint8 `[height, width, 3]`, upright, scaled, transparency on black."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("RGB")
    size = request.size(*image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    return np.array(image, dtype=np.uint8)


def _load_image(path: Path, image: Any, request: _Request) -> VideoClip:
    if request.start:
        raise VideoError(
            f"start is {request.start:g} s, but '{path}' is a single image, which has only time 0."
        )
    width, height = image.size
    if request.max_pixels is not None:
        image.draft(
            "RGB", request.size(width, height)
        )  # lets the JPEG decoder skip detail that is not needed
    complete = _load_pixels(image)
    # Asked for only now, because looking for EXIF data makes Pillow read a PNG to its end.
    orientation = _EXIF.get(image.getexif().get(_EXIF_ORIENTATION, 1), _Orientation())
    picker = _Picker(np.zeros(1), 0.0, lambda frame: orientation.apply(_rgb(frame, request)))
    picker.offer(0.0, image)
    picker.close(math.inf)
    warnings = () if complete else ("The image is cut off or damaged: part of it could not be decoded.",)
    return _clip(
        path, request, picker, kind="image", container=image.format.lower(), codec=image.format.lower(),
        source_width=width, source_height=height, orientation=orientation, average_fps=None, duration_s=0.0,
        complete=complete, decoded_until_s=0.0, warnings=warnings,
    )  # fmt: skip


def _load_animation(path: Path, image: Any, request: _Request) -> VideoClip:
    lengths, complete = _animation_lengths(image, path)
    if not lengths:
        raise VideoError(f"'{path}' is damaged: no frame of it can be decoded.")
    starts = np.concatenate([[0.0], np.cumsum(lengths)])
    duration = float(starts[-1])
    start, end = request.span(duration, f"'{path}'")
    picker = _Picker(request.times(start, end), 1e-6, lambda frame: _rgb(frame, request))
    for i in range(len(lengths)):
        if picker.done:
            break
        _show(image, i)
        _load_pixels(image)
        picker.offer(float(starts[i]), image.copy())
    picker.close(math.inf)
    warnings = _sampling_warnings(picker, complete)
    if not complete:
        warnings.insert(
            0, f"The file is cut off or damaged: {len(lengths)} frames, {duration:.2f} s, could be decoded."
        )
    return _clip(
        path, request, picker, kind="animation", container=image.format.lower(), codec=image.format.lower(),
        source_width=image.size[0], source_height=image.size[1], orientation=_Orientation(),
        average_fps=len(lengths) / duration, duration_s=duration, complete=complete,
        decoded_until_s=duration, warnings=tuple(warnings),
    )  # fmt: skip


def _show(image: Any, i: int) -> None:
    image.seek(i + bool(image.info.get("default_image", False)))


def _animation_lengths(image: Any, path: Path) -> tuple[list[float], bool]:
    """Seconds for which each frame that can be decoded is shown, and whether the file is whole."""
    lengths: list[float] = []
    while True:
        try:
            _show(image, len(lengths))
        except EOFError:
            return lengths, image.format != "GIF" or _ends_like_gif(path)
        except (OSError, SyntaxError, ValueError):
            return lengths, False
        whole = _load_pixels(image)
        lengths.append((image.info.get("duration") or 0) / 1000 or _DEFAULT_ANIMATION_DELAY_S)
        if not whole:
            return lengths, False


def _ends_like_gif(path: Path) -> bool:
    """Whether the file has the closing mark of a GIF; without it more frames may have followed."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read().rstrip(b"\0\r\n").endswith(b";")


# --- progress ----------------------------------------------------------------------------------------------


@contextmanager
def _progress_bar(name: str, start: float, end: float, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function to report the position in seconds to; a bar appears if it takes over a second."""
    began, bar, task = _now(), None, None

    def report(position: float) -> None:
        nonlocal bar, task
        if not shown or (bar is None and _now() - began < 1.0):
            return
        if bar is None:
            bar = _rich_progress()
            bar.start()
            task = bar.add_task(f"decoding {name}", total=max(end - start, 1e-9))
        bar.update(task, completed=min(max(position - start, 0.0), end - start))

    if shown:
        _rich_progress()  # a missing package should be reported before the work, not in the middle of it
    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _rich_progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise ImportError("A progress bar needs rich: pip install 'vot-kernels[cli]'.") from None
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


# --- writing -----------------------------------------------------------------------------------------------


def save_mp4(
    path: str | os.PathLike[str],
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float | Fraction,
    *,
    crf: int = 18,
    deterministic: bool = True,
) -> Path:
    """Write frames as H.264 (yuv420p, BT.601) in mp4, index in front; the file appears only when it is whole.

    Args:
        path: the file to write; its name must end in ".mp4".
        frames: uint8 RGB `[frames, height, width, 3]`, or an iterable of `[height, width, 3]`. Width and
            height must be even, as 4:2:0 colour needs; they are not padded, so that boxes given as fractions
            of the frame stay right.
        fps: frames per second.
        crf: constant rate factor, 0 (nearly lossless) to 51 (worst).
        deterministic: encode in one thread, so that equal frames give equal bytes with the same libx264.

    Returns:
        The path written.
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise VideoError(f"An mp4 file name must end in '.mp4', got '{target}'.")
    _check_number("fps", fps, lambda x: 0 < x <= MAX_FPS, f"above 0 and at most {MAX_FPS:g}")  # type: ignore[arg-type]
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
        raise VideoError(f"crf must be a whole number from 0 to 51, got {crf!r}.")
    images = iter(frames)
    first = next(images, None)
    if first is None:
        raise VideoError("At least one frame is needed to write a video, got none.")
    shape = _check_frame(first)
    rate = Fraction(fps).limit_denominator(100_000)
    with (
        atomic_write(target) as temporary,
        av.open(str(temporary), "w", format="mp4", options=_MP4) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = shape[1], shape[0], "yuv420p"
        stream.codec_context.color_range = 1  # limited
        stream.codec_context.colorspace = 6  # SMPTE 170M, the matrix that libav converts RGB with
        if deterministic:
            stream.codec_context.thread_count = 1
        for image in itertools.chain([first], images):
            if _check_frame(image) != shape:
                raise VideoError(f"All frames must have one shape, got {shape} and {image.shape}.")
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
            )
        container.mux(stream.encode())
    return target


_MP4 = {"movflags": "+faststart", "fflags": "+bitexact"}


def _check_frame(frame: np.ndarray) -> tuple[int, int, int]:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise VideoError(f"A frame must be a uint8 array [height, width, 3], got {given}.")
    height, width = frame.shape[:2]
    if height % 2 or width % 2 or not height or not width:
        raise VideoError(f"H.264 with 4:2:0 colour needs an even width and height, got {width}×{height}.")
    return height, width, 3
