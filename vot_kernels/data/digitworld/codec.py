"""H.264 encoding and decoding of clips in memory, so that training sees what real files look like."""

import io
from fractions import Fraction

import numpy as np

from vot_kernels.extras import imports_for


def h264_roundtrip(frames: np.ndarray, crf: int = 23, fps: float = 8.0) -> np.ndarray:
    """Encode uint8 [T, H, W, 3] as `h264_bytes` does and decode it again. The same input gives the same output."""
    file = io.BytesIO(h264_bytes(frames, crf, fps))
    import av

    with av.open(file, "r") as reader:
        reader.streams.video[0].thread_type = "NONE"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)])


def h264_bytes(frames: np.ndarray, crf: int = 23, fps: float = 8.0) -> bytes:
    """Return the Matroska file of uint8 [T, H, W, 3] in H.264 (yuv420p, ultrafast, one thread).

    crf: 0 (best) to 51. Height and width must be even. The same input gives the same output.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}.")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"Width and height must be even for H.264, got {frames.shape[2]} × {frames.shape[1]}."
        )
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be from 0 to 51, got {crf}.")
    with imports_for("H.264", "video"):
        import av

    rate = Fraction(fps).limit_denominator(1000)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as writer:
        options = {"crf": str(crf), "preset": "ultrafast", "threads": "1"}
        stream = writer.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        writer.mux(stream.encode())
    return file.getvalue()
