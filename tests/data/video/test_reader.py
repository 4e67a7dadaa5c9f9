"""Seeking, damage, and files whose headers say little."""

import numpy as np
import pytest

from tests.data.video.media import FASTSTART, LEVELS, cut, noisy, numbers, write
from vot_kernels.data.video import VideoError, load_video, reader


def test_sparse_sampling_of_a_long_clip_seeks_and_is_exact(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 1200, size=(16, 16))  # 120 s, a key frame every second
    decoded = []
    real = reader.Reader._time
    monkeypatch.setattr(reader.Reader, "_time", lambda self, *a: decoded.append(1) or real(self, *a))
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
    path = write(tmp_path / "a.mkv", 400, sound=40.0)
    whole = load_video(path, num_frames=8, end=1.0)
    read, packets = [0], reader._packets

    def counted(*args):
        for packet in packets(*args):
            read[0] += 1
            yield packet

    monkeypatch.setattr(reader, "_packets", counted)
    load_video(path, num_frames=8, end=1.0)
    assert read[0] > 400
    read[0] = 0
    monkeypatch.setattr(reader, "_SCAN_BYTES", 0)
    assert numbers(load_video(path, num_frames=8, end=1.0)) == numbers(whole)
    assert read[0] < 150


@pytest.fixture
def opened(monkeypatch):
    """How often a container has been opened, as a list of one entry each."""
    names, real = [], reader.av.open
    monkeypatch.setattr(reader.av, "open", lambda name, *a, **k: names.append(name) or real(name, *a, **k))
    return names


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "avi", "flv"])
def test_a_file_is_opened_once(tmp_path, monkeypatch, opened, suffix, scan):
    path = write(tmp_path / f"a.{suffix}", 120)
    del opened[:]
    if not scan:
        monkeypatch.setattr(reader, "_SCAN_BYTES", 0)
    clip = load_video(path, fps=1)
    np.testing.assert_allclose(clip.times, range(12), atol=1e-3)
    assert clip.info.complete and len(opened) == 1


def test_a_format_that_cannot_seek_is_opened_twice(tmp_path, opened):
    path = write(tmp_path / "a.h264", 25, fps=25)
    del opened[:]
    assert numbers(load_video(path, num_frames=25)) == list(range(25)) and len(opened) == 2


def test_a_rewind_that_misses_the_first_packet_is_noticed(tmp_path, monkeypatch, opened):
    path = write(tmp_path / "a.mp4", 30)
    del opened[:]
    real = reader._identity
    seen = []
    monkeypatch.setattr(reader, "_identity", lambda packet: seen.append(1) or (*real(packet), len(seen)))
    assert numbers(load_video(path, num_frames=30)) == list(range(30)) and len(opened) == 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv"])
@pytest.mark.parametrize("scan", [True, False])
def test_truncated_video_gives_what_can_be_decoded_and_says_how_much(tmp_path, monkeypatch, suffix, scan):
    if not scan:
        monkeypatch.setattr(reader, "_SCAN_BYTES", 0)
    path = write(tmp_path / f"a.{suffix}", 40, options=FASTSTART if suffix == "mp4" else None, frame=noisy)
    assert load_video(path, num_frames=20).info.complete
    clip = load_video(cut(path, 0.6), num_frames=20)
    info = clip.info
    assert not info.complete and 9 <= len(clip.times) <= 13
    assert info.decoded_until_s == pytest.approx(2.4, abs=0.35)
    assert f"{info.decoded_until_s:.2f} s of {info.duration_s:.2f} s" in " ".join(info.warnings)
    assert info.duration_s == pytest.approx(4.0, abs=0.15)
    assert info.warnings[0] in info.describe()
    whole = load_video(path, fps=10, end=1.0)  # what is before the cut is not affected
    assert whole.info.complete and len(whole.times) == 10


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


def test_bare_stream_without_time_stamps(tmp_path):
    clip = load_video(write(tmp_path / "a.h264", 25, fps=25), num_frames=5)
    assert numbers(clip) == [2, 7, 12, 17, 22]
    assert "no time stamps" in " ".join(clip.info.warnings)


def test_sound_longer_than_the_picture_is_no_damage(tmp_path):
    for suffix in ("mp4", "mkv"):
        clip = load_video(write(tmp_path / f"a.{suffix}", 20, sound=6.0), num_frames=20)
        assert clip.info.complete and numbers(clip) == list(range(20)), suffix
