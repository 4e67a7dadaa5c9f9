"""Media with known content, made for the tests: frame k is grey, and its brightness encodes k."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

LEVELS = 40  # frame k is grey of brightness 20 + 5 * (k % LEVELS), far enough apart to survive H.264
FASTSTART = {"movflags": "faststart"}


def grey(k, size=(64, 48)):
    return np.full((size[1], size[0], 3), 20 + 5 * (k % LEVELS), np.uint8)


def noisy(k, size):
    """Numbered frames that cost about as many bytes each."""
    pixels = grey(k, size)
    pixels[:, ::2] = np.random.default_rng(k).integers(0, 256, pixels[:, ::2].shape, dtype=np.uint8)
    return pixels


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
