"""Decoding of a video stream in order of time, skipping whatever is damaged."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from vot_kernels.data.video.request import VideoError

# Files up to this size are read through once, without decoding, for their exact duration, because headers can be wrong.
_SCAN_BYTES = 256 << 20
_MAX_READ_ERRORS = 32
_FIRST_PACKETS = 32
# These are text art and playlists: libav would open them, but the first is not video and the others name more files.
_REFUSED_FORMATS = {"tty", "hls", "concat", "dash", "imf", "lavfi", "vapoursynth", "avisynth"}


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
    """Where the packets of a complete file end, in seconds from the first frame.

    Attributes:
        end: end of the last packet of the video stream.
        other_end: end of the last packet of the other streams.
    """

    end: float
    other_end: float


class Reader:
    """Decodes one video stream of a local file, in order of time, skipping whatever is damaged.

    The file is opened once: its first packets, or all of them, are read without decoding, and then it is rewound.
    Only a format that cannot seek is opened a second time.

    Attributes:
        stream: the libav stream that is decoded.
        end: seconds at which the last decoded frame ends.
        damage: what went wrong so far.
        gap: the longest interval (start, end) without frames that the frames' durations do not explain.
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
        self._origin: float | None = None
        self._span: _Span | None = None
        self._first: tuple[object, ...] | None = None
        self._open()
        try:
            self._seekable = self._declared() is not None
            self._survey(whole=not self._seekable or path.stat().st_size <= _SCAN_BYTES)
            self._rewind()
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> "Reader":
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

    def _survey(self, whole: bool) -> None:
        """Read packets without decoding them, for the first timestamp and, if `whole`, for the length.

        The first frame's timestamp is the lowest of the first packets, because frames may be stored out of order and
        headers may be wrong by a few.
        """
        count, end, other_end, first_stamp = 0, -math.inf, -math.inf, None
        for packet in _packets(self.container, lambda: None):
            if not packet.size:
                continue
            if self._first is None:
                self._first = _identity(packet)
            if packet.stream is not self.stream:
                other_end = max(other_end, _packet_end(packet))
                continue
            count += 1
            if packet.pts is not None:
                at = float(packet.pts * packet.time_base)
                end = max(end, at + self._length(packet))
                first_stamp = at if first_stamp is None else first_stamp
                if count <= _FIRST_PACKETS and not packet.is_discard:
                    self._origin = at if self._origin is None else min(self._origin, at)
            if count == _FIRST_PACKETS and not whole:
                return
        if first_stamp is None:  # no timestamps at all, as in a bare H.264 stream
            self._span = _Span(count / self.rate, other_end)
        else:
            origin = first_stamp if self._origin is None else self._origin
            self._span = _Span(end - origin, other_end - (self._origin or 0.0))

    def _rewind(self) -> None:
        """Go back to the first packet: by seeking if that works, else by opening the file again."""
        first = None
        try:
            self.container.seek(0)
            first = next(self.container.demux())
        except (av.FFmpegError, StopIteration):
            pass
        if first is not None and _identity(first) == self._first:
            head = [first]
        else:
            self.container.close()
            self._open()
            head = []
        self._frames = self._decode(itertools.chain(head, self._packets()))

    @property
    def rate(self) -> float:
        """Average frames per second; libav's own guess of 25 if nothing is known."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(rate) if rate else 25.0

    @property
    def pixel_aspect(self) -> float:
        """Width of a stored pixel divided by its height."""
        ratio = self.stream.sample_aspect_ratio
        return float(ratio) if ratio and 0.1 <= ratio <= 10 else 1.0

    @property
    def tolerance(self) -> float:
        """Seconds by which the container's clock may have rounded a timestamp."""
        tick = float(self.stream.time_base) if self.stream.time_base else 0.0
        return min(tick / 2, 5e-4) + 1e-9

    def _declared(self) -> float | None:
        """Seconds of video that the headers declare, or None."""
        stream = self.stream
        if self.container.format.name == "avi" and stream.frames:
            return (
                stream.frames / self.rate
            )  # libav shortens the duration of a truncated file, but not the count
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        tag = _seconds(stream.metadata.get("DURATION"))
        offset = max(self._origin or 0.0, 0.0)  # tag and container count from timestamp 0
        if tag is not None:
            return tag - offset
        if self.container.duration is not None:
            return self.container.duration / av.time_base - offset
        return None

    @property
    def _whole_file(self) -> bool:
        """Whether the declared duration is that of the whole file, in which the sound may be longer than the video."""
        return self.stream.duration is None and "DURATION" not in self.stream.metadata

    @property
    def slack(self) -> float:
        """Seconds by which a declared duration may differ from the end of the last frame."""
        return (3.0 if self._whole_file else 1.5) / self.rate + 0.01

    def duration(self) -> tuple[float, float | None]:
        """Return the seconds of video, and how many of these have packets in the file (None: not checked)."""
        declared, span = self._declared(), self._span
        if span is None:
            assert declared is not None
            return declared, None
        if declared is None or (self._whole_file and span.other_end >= declared - self.slack):
            return span.end, span.end
        return max(declared, span.end), span.end

    def _length(self, item: Any) -> float:
        """Return the seconds for which a packet or frame is shown."""
        if item.duration and item.time_base:
            return float(item.duration * item.time_base)
        return 1.0 / self.rate

    def read(self) -> tuple[float, Any] | None:
        """Return the next frame and its time; times increase. None at the end of what can be decoded."""
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
        """Continue from the last key frame before `at` seconds, if that is ahead and the file allows it."""
        if not self._seekable or self._origin is None:
            return
        try:
            self.container.seek(int((at + self._origin) / self.stream.time_base), stream=self.stream)
        except av.FFmpegError:
            self._restart()
            return
        self._settling_until = at
        frames = self._decode(self._packets())
        first = next(frames, None)
        # With an unreliable index, a seek ends too late, or between key frames, where pictures are garbage.
        if first is None or not first[1].key_frame or first[0] > at:
            self._restart()
            return
        self._frames = itertools.chain([first], frames)
        if first[0] <= self._position:
            self._seekable = False  # key frames are too far apart for seeking to save anything
        else:
            self._sparse = True

    def _restart(self) -> None:
        """Decode from the start, and do not seek from here on."""
        self._seekable = False
        self._settling_until = -math.inf
        self._rewind()

    def _decode(self, packets: Iterable[Any]) -> Iterator[tuple[float, Any]]:
        count = 0
        for packet in packets:
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

    def _packets(self) -> Iterator[Any]:
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
        """Seconds up to which the file goes, by the streams to which its declared duration applies."""
        return max(self.end, self._other_end) if self._whole_file else self.end


def _identity(packet: Any) -> tuple[object, ...]:
    """Return what distinguishes a packet from every other one of its file."""
    return packet.stream_index, packet.pts, packet.dts, packet.pos, packet.size


def _packet_end(packet: Any) -> float:
    if packet.pts is None or not packet.time_base:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _open_container(path: Path) -> Any:
    try:
        # Prefix and whitelist keep a name such as "concat:a|b", or a playlist, from opening anything else.
        options = {"protocol_whitelist": "file"}
        # A title may be in any encoding; it is not used.
        container = av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace")
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
        raise VideoError(f"'{path}' has a video stream of unknown format: the file is damaged or cut off.")
    if container.streams.audio:
        codec = container.streams.audio[0].codec_context
        name = codec.name if codec is not None else "unknown codec"
        cover = ", with a cover picture" if container.streams.video else ""
        raise VideoError(f"'{path}' has only sound ({name}{cover}), but a video or image is needed.")
    raise VideoError(f"'{path}' has no video stream.")


def _packets(container: Any, on_error: Callable[[], None]) -> Iterator[Any]:
    """Yield packets of all streams; continue after errors, unless there are too many in a row."""
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


def _seconds(clock: str | None) -> float | None:
    """Return the seconds in "hh:mm:ss.fraction", or None for anything else."""
    try:
        hours, minutes, seconds = (clock or "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
