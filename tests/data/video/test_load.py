"""The frames, times and sizes of loaded clips, and the files that are refused."""

import os
import struct
import tracemalloc
import wave
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from tests.data.video.media import bright_corner, corner, numbers, write  # noqa: E402
from vot_kernels.data.video import VideoError, load, load_video, reader, save_mp4  # noqa: E402

ONE = 1 << 16


def test_default_samples_sixteen_frames_over_the_whole_clip(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 32))
    assert clip.frames.shape == (16, 48, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.times.dtype == np.float64
    # centres of 16 parts of 3.2 s are 0.1, 0.3, ..., the exact times of the odd frames
    np.testing.assert_allclose(clip.times, np.arange(1, 32, 2) / 10)
    assert numbers(clip) == list(range(1, 32, 2))
    assert clip.info.complete and clip.info.warnings == ()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "mov"])
def test_num_frames_equal_to_the_length_gives_every_frame_once(tmp_path, suffix):
    clip = load_video(write(tmp_path / f"a.{suffix}", 30, fps=30), num_frames=30)
    assert numbers(clip) == list(range(30))
    np.testing.assert_allclose(clip.times, np.arange(30) / 30, atol=6e-4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_fps_equal_to_the_source_survives_rounded_time_stamps(tmp_path, suffix):
    assert numbers(load_video(write(tmp_path / f"a.{suffix}", 30, fps=30), fps=30)) == list(range(30))


def test_fps_within_a_range(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 40), fps=5, start=1.0, end=2.0)
    assert numbers(clip) == [10, 12, 14, 16, 18]
    np.testing.assert_allclose(clip.times, [1.0, 1.2, 1.4, 1.6, 1.8])
    assert (clip.info.fps, clip.info.start, clip.info.end, clip.info.num_frames) == (5.0, 1.0, 2.0, None)


def test_max_frames_spreads_what_would_be_too_many(tmp_path):
    path = write(tmp_path / "a.mp4", 40)
    assert numbers(load_video(path, fps=5, max_frames=20)) == list(range(0, 40, 2))
    few = load_video(path, fps=5, max_frames=4)
    assert numbers(few) == numbers(load_video(path, num_frames=4)) == [5, 15, 25, 35]
    assert (few.info.fps, few.info.max_frames) == (5.0, 4) and "max_frames 4" in few.info.describe()
    assert numbers(load_video(path, fps=5, max_frames=10, start=1, end=3)) == list(range(10, 30, 2))


def test_frame_on_show_at_start_may_begin_before_it(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 40), fps=1, start=1.05, end=1.5)
    assert clip.times.tolist() == pytest.approx([1.0]) and numbers(clip) == [10]


def test_no_frame_comes_out_twice(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 10), fps=40)
    assert numbers(clip) == list(range(10))
    assert "only 10 different frames" in " ".join(clip.info.warnings) and clip.info.complete


def test_one_frame_clip(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 1), num_frames=4)
    assert clip.times.tolist() == [0.0] and numbers(clip) == [0] and clip.info.complete


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_keeps_real_times(tmp_path, suffix):
    stamps = [0, 100, 500, 600, 2000, 2040, 3000]
    path = write(tmp_path / f"a.{suffix}", len(stamps), stamps=stamps)
    clip = load_video(path, fps=25)
    np.testing.assert_allclose(clip.times, np.array(stamps) / 1000, atol=1e-3)
    assert numbers(clip) == list(range(7))
    shown = load_video(path, fps=1)  # at 0, 1, 2 and 3 s
    assert numbers(shown) == [0, 3, 4, 6]
    np.testing.assert_allclose(shown.times, [0.0, 0.6, 2.0, 3.0], atol=1e-3)


def test_times_count_from_the_first_frame(tmp_path):
    stamps = [5000 + 100 * k for k in range(10)]
    clip = load_video(write(tmp_path / "a.mkv", 10, stamps=stamps), num_frames=10)
    np.testing.assert_allclose(clip.times, np.arange(10) / 10, atol=1e-3)


def test_max_pixels_keeps_aspect_and_even_sides(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 4, size=(160, 90)), max_pixels=1600, num_frames=2)
    assert clip.frames.shape[1:3] == (30, 52)
    assert (clip.info.source_width, clip.info.source_height) == (160, 90)
    assert (clip.info.width, clip.info.height, clip.info.max_pixels) == (52, 30, 1600)
    assert numbers(clip) == [1, 3]


def test_odd_sizes_are_kept(tmp_path):
    def frame(k, size):
        return np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)

    path = write(tmp_path / "a.mkv", 3, size=(33, 17), codec="ffv1", pixels="bgr0", frame=frame)
    clip = load_video(path, num_frames=3)
    np.testing.assert_array_equal(clip.frames, [frame(k, (33, 17)) for k in range(3)])


def test_anamorphic_pixels_are_stretched(tmp_path):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    clip = load_video(write(tmp_path / "a.mkv", 3, setup=setup), num_frames=1)
    assert clip.frames.shape[1:3] == (48, 128)


def test_colours_survive(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 32, 3))
    clip = load_video(save_mp4(tmp_path / "a.mp4", frames, 8), num_frames=4)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 6


@pytest.mark.parametrize(
    ("matrix", "where", "turned", "mirrored"),
    [
        ((ONE, 0, 0, ONE), "top left", 0, False),
        ((0, ONE, -ONE, 0), "top right", 90, False),
        ((-ONE, 0, 0, -ONE), "bottom right", 180, False),
        ((0, -ONE, ONE, 0), "bottom left", 270, False),
        ((-ONE, 0, 0, ONE), "top right", 0, True),
        ((ONE, 0, 0, -ONE), "bottom left", 180, True),
    ],
)
def test_rotation_metadata_is_applied(tmp_path, matrix, where, turned, mirrored):
    path = write(tmp_path / "a.mp4", 3, size=(64, 32), frame=corner)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of times, ids and volume
    a, b, c, d = matrix
    assert data[at : at + 36] == struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clip = load_video(path, num_frames=1, max_pixels=1000)
    assert bright_corner(clip.frames[0]) == where
    assert (clip.info.rotation, clip.info.mirrored) == (turned, mirrored)
    assert (clip.info.source_width, clip.info.source_height) == (64, 32)
    tall = turned in (90, 270)
    assert (clip.info.height > clip.info.width) == tall
    assert ("clockwise" in clip.info.describe()) == bool(turned)


def test_sound_only(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    with pytest.raises(VideoError, match="has only sound"):
        load_video(tmp_path / "a.wav")


def test_sound_only_in_a_video_container(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        tone = container.add_stream("aac", rate=8000, layout="mono")
        chunk = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        chunk.sample_rate = 8000
        container.mux(tone.encode(chunk))
        container.mux(tone.encode())
    with pytest.raises(VideoError, match=r"has only sound \(aac\)"):
        load_video(tmp_path / "a.m4a")


def test_file_system_errors_are_one_sentence(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "notes.txt").write_text("no video\n" * 100)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        tmp_path / "missing.mp4": "There is no file",
        tmp_path: "is a directory",
        tmp_path / "empty.mp4": "is empty",
        tmp_path / "noise.mp4": "not a media file",
        tmp_path / "notes.txt": "text file",
        tmp_path / "list.m3u8": "playlist|cannot be read",
        tmp_path / "pipe": "not a regular file",
        "https://example.org/a.mp4": "is a URL",
        "": "not a file name",
        7: "must be a str",
    }.items():
        with pytest.raises(VideoError, match=words) as raised:
            load_video(path)
        assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "a.mp4", 2)
    path.chmod(0)
    with pytest.raises(VideoError, match="permission denied"):
        load_video(path)


def test_names_are_never_protocols_or_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", 4)
    (tmp_path / "a.mp4").rename(tmp_path / "concat:a|b %03d.mp4")
    assert len(load_video("concat:a|b %03d.mp4", num_frames=4).times) == 4


def test_memory_is_bounded_by_the_sampled_frames(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 2000, fps=100, gop=5000, size=(64, 64))
    converted = []
    real = load._Converter.__call__
    monkeypatch.setattr(load._Converter, "__call__", lambda self, f: converted.append(1) or real(self, f))
    monkeypatch.setattr(load, "_SEEK_GAP_S", 1e9)  # every frame is decoded
    frame_bytes = 64 * 64 * 3
    load_video(path, num_frames=1)
    tracemalloc.start()
    clip = load_video(path, num_frames=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clip.times) == 4 and len(converted) == 5
    # numpy reports its arrays to tracemalloc: the sampled frames, their stack, and a few in flight
    assert peak < 12 * frame_bytes + 300_000 < 2000 * frame_bytes / 40


def test_decoder_frames_are_released(tmp_path, monkeypatch):
    alive, most = set(), [0]

    class Tracked:
        """Stands for a decoded frame and counts itself while it is alive."""

        def __init__(self, frame):
            self.frame = frame
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.discard(id(self))

    read, convert = reader.Reader.read, load._Converter.__call__

    def tracked_read(self):
        item = read(self)
        return item and (item[0], Tracked(item[1]))

    monkeypatch.setattr(reader.Reader, "read", tracked_read)
    monkeypatch.setattr(load._Converter, "__call__", lambda self, tracked: convert(self, tracked.frame))
    clip = load_video(write(tmp_path / "a.mp4", 300, size=(16, 16)), num_frames=50)
    assert len(clip.times) == 50 and most[0] <= 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_title_in_another_encoding_is_no_obstacle(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = np.full((4, 16, 16, 3), 128, np.uint8)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Grüße"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert "Grüße".encode() in content
    path.write_bytes(content.replace("Grüße".encode(), b"Gr\xfc\xdfe\xfc\xdf"))
    assert len(load_video(path, num_frames=4).frames) == 4
