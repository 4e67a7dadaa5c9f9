"""The requests that are allowed."""

import pytest

from tests.data.video.media import write
from vot_kernels.data.video import VideoError, load_video
from vot_kernels.data.video.request import Request


@pytest.mark.parametrize("source", [(640, 272), (1, 5000), (5000, 1), (33, 17), (3, 3)])
@pytest.mark.parametrize("most", [1, 2, 10, 100, 1001])
def test_scaled_area_never_exceeds_max_pixels(source, most):
    width, height = Request(None, None, None, None, most).size(*source)
    assert width >= 1 and height >= 1 and width * height <= most
    assert all(side == 1 or side % 2 == 0 for side in (width, height)) or (width, height) == source


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
        ({"fps": 1, "max_frames": 0}, "max_frames must be a whole number"),
        ({"max_frames": 4}, "max_frames must come with fps"),
        ({"num_frames": 4, "max_frames": 4}, "max_frames must come with fps"),
        ({"max_pixels": 10.0}, "max_pixels must be"),
    ],
)
def test_senseless_requests_are_refused(tmp_path_factory, request_, words):
    path = tmp_path_factory.getbasetemp() / "whole.mp4"
    if not path.exists():
        write(path, 40)
    with pytest.raises(VideoError, match=words):
        load_video(path, **request_)
