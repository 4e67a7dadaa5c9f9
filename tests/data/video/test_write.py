"""Writing mp4 files."""

from fractions import Fraction

import numpy as np
import pytest

from tests.data.video.media import grey, noisy, numbers
from vot_kernels.data.video import VideoError, load_video, save_mp4


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
