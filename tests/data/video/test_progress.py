"""The progress bar."""

import numpy as np

from tests.data.video.media import write
from vot_kernels.data.video import load_video, progress


def test_progress_bar_appears_only_when_decoding_is_long(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.mp4", 40)
    load_video(path, progress=True)
    assert "decoding" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    clock = iter(np.arange(0, 1000, 0.3))
    monkeypatch.setattr(progress, "_now", lambda: float(next(clock)))
    load_video(path, progress=True)
    captured = capsys.readouterr()
    assert "decoding a.mp4" in captured.err and captured.out == ""
