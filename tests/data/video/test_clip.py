"""The report on what was sampled."""

import pytest

from tests.data.video.media import write
from vot_kernels.data.video import load_video


def test_info_describes_what_was_sampled(tmp_path):
    info = load_video(write(tmp_path / "a.mp4", 40), fps=2, start=1, end=3, max_pixels=800).info
    text = info.describe()
    for words in ("a.mp4: video (h264 in mov,mp4", "64×48", "4.00 s at 10 fps", "Sampled 4 frames of 32×24",
                  "fps 2, start 1, end 3, max_pixels 800", "1.00, 1.50, 2.00, 2.50 s"):  # fmt: skip
        assert words in text
    assert "\n" not in text
    assert info.sampled_times_s == pytest.approx((1.0, 1.5, 2.0, 2.5)) and info.frames_sampled == 4
