"""Decoding on inputs that broke other packages; each mark names the report."""

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from vot_kernels.data.video import load_video, save_mp4  # noqa: E402

report = pytest.mark.tested_on


def numbered_frames(count: int, size: int = 64) -> np.ndarray:
    """Frames whose brightness tells their number."""
    values = (np.arange(count) * 37 % 200 + 20).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, 3)).copy()


def write_hevc(path, frames: np.ndarray, keyframe_every: int = 3):
    if "libx265" not in av.codecs_available:
        pytest.skip("this build of FFmpeg writes no HEVC")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {
            "x265-params": f"keyint={keyframe_every}:min-keyint={keyframe_every}:log-level=none:pools=1"
        }
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(frames: np.ndarray) -> np.ndarray:
    return frames.reshape(len(frames), -1).mean(1)


@report("Qwen3-VL#2117", "VeOmni#1165")
def test_times_are_those_of_the_file(tmp_path):
    path = save_mp4(tmp_path / "a.mp4", numbered_frames(380), fps=30)
    chosen = [0, 7, 100, 101, 250, 300, 355, 379]
    for frame in chosen:
        clip = load_video(path, num_frames=1, start=frame / 30, end=(frame + 1) / 30)
        assert clip.times.tolist() == pytest.approx([frame / 30], abs=1e-3)
    assert load_video(path, num_frames=1, start=300 / 30, end=301 / 30).times[0] == pytest.approx(
        10.0, abs=1e-3
    )
    assert load_video(path, fps=30).times[300] == pytest.approx(10.0, abs=1e-3)


@report("transformers#43519")
def test_times_at_two_frames_a_second_do_not_depend_on_patches(tmp_path):
    path = save_mp4(tmp_path / "a.mp4", numbered_frames(8), fps=2)
    assert load_video(path, num_frames=8).times.tolist() == pytest.approx([i / 2 for i in range(8)])


@report("vllm#35909", "lmms-eval#874")
@pytest.mark.parametrize(("frames", "wanted"), [(20, 32), (9, 16), (1, 16)])
def test_more_frames_are_wanted_than_there_are(frames, wanted, tmp_path):
    path = save_mp4(tmp_path / "a.mp4", numbered_frames(frames), fps=10)
    clip = load_video(path, num_frames=wanted)
    assert len(clip.frames) == frames == len(clip.times)
    assert any(str(frames) in warning for warning in clip.info.warnings)


@report("torchcodec#1339")
def test_seeking_back_in_hevc_gives_the_right_frame(tmp_path):
    path = write_hevc(tmp_path / "a.mp4", numbered_frames(161))
    everything = load_video(path, fps=30)
    assert len(everything.frames) == 161
    for frame in (159, 35, 36, 34, 160, 0):
        time = everything.times[frame]
        one = load_video(path, num_frames=1, start=time, end=time + 1 / 30)
        assert np.array_equal(one.frames[0], everything.frames[frame]), frame


@report("PyAV#1117")
def test_the_first_frame_of_many_clips_takes_no_memory(tmp_path):
    path = save_mp4(tmp_path / "a.mp4", numbered_frames(40, 128), fps=10)
    load_video(path, num_frames=1)

    def grown(clips: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(clips):
            load_video(path, num_frames=1, start=0, end=0.1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    grown(20)
    assert grown(180) < 40_000  # KiB; a leaked decoder holds some 2 MiB


@report("musubi-tuner#1129", "PyAV#1962")
def test_hevc_clips_in_many_threads_do_not_deadlock(tmp_path):
    write_hevc(tmp_path / "a.mp4", numbered_frames(30))
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from vot_kernels.data.video import load_video\n"
        "with ThreadPoolExecutor(16) as pool:\n"
        "    clips = list(pool.map(lambda _: load_video(sys.argv[1], num_frames=8), range(16)))\n"
        "print(sum(len(clip.frames) for clip in clips))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(16 * 8), done.stderr


def test_frames_tell_their_number(tmp_path):
    """The tests above can fail: another frame looks different."""
    frames = numbered_frames(161)
    with ThreadPoolExecutor(1) as pool:
        path = pool.submit(save_mp4, tmp_path / "a.mp4", frames, 30).result()
    seen = brightness(load_video(path, fps=30).frames)
    assert np.abs(seen - brightness(frames)).max() < 4 and (np.abs(np.diff(seen)) > 10).all()
