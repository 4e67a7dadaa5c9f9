"""Decoding a clip and packing its patches: this package's path, and other decoders with a patch loop."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.core import Provider, needs
from benchmarks.problems.video import DecodeAndPack


def _ours(problem: DecodeAndPack, prepared: None, mean: Tensor, std: Tensor) -> Tensor:
    """As `vot ask` reads a video: only the sampled frames are converted, and all are packed at once."""
    from vot_kernels.data.video import load_video
    from vot_kernels.models.encoder import VotImageProcessor

    clip = load_video(problem.path(), num_frames=problem.frames)
    processor = VotImageProcessor(
        patch_size=problem.patch_size, image_mean=mean.tolist(), image_std=std.tolist()
    )
    return processor([clip.frames])["pixel_values"]


def _peer(
    decode: Callable[[str, list[int]], list[Tensor]],
    problem: DecodeAndPack,
    prepared: None,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Process the frames of `decode` one by one: normalised, cut by a reshape, concatenated at the end."""
    p = problem.patch_size
    packed = []
    for pixels in decode(str(problem.path()), problem.indices):
        frame = (pixels.to(mean.dtype) / 255 - mean) / std  # [height, width, 3]
        height, width, _ = frame.shape
        grid = frame.reshape(height // p, p, width // p, p, 3)
        packed.append(grid.permute(0, 2, 4, 1, 3).reshape(-1, 3 * p * p))
    return torch.cat(packed)


def _pyav(threads: str, path: str, indices: list[int]) -> list[Tensor]:
    """Convert every frame to RGB, and keep the wanted ones."""
    import av

    with av.open(path) as container:
        container.streams.video[0].thread_type = threads
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [torch.from_numpy(frames[i]) for i in indices]


def _opencv(path: str, indices: list[int]) -> list[Tensor]:
    import cv2

    capture = cv2.VideoCapture(path)
    wanted, frames = set(indices), []
    for i in range(indices[-1] + 1):
        read, frame = capture.read()
        if read and i in wanted:
            frames.append(torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    capture.release()
    return frames


def _torchcodec(path: str, indices: list[int]) -> list[Tensor]:
    from torchcodec.decoders import VideoDecoder

    return list(VideoDecoder(path, dimension_order="NHWC").get_frames_at(indices).data)


def _decord(path: str, indices: list[int]) -> list[Tensor]:
    from decord import VideoReader

    return list(torch.from_numpy(VideoReader(path).get_batch(indices).asnumpy()))


def _refuses(problem: DecodeAndPack, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    """Return why the clip cannot be decoded here: the file and PyAV, the oracle of the others, must be installed."""
    reason = needs("av")()
    if reason:
        return f"{reason}, by which every decoder is checked"
    try:
        problem.path()
    except (FileNotFoundError, ImportError) as error:
        return str(error)
    return None


def _provider(name: str, decode: Callable[[str, list[int]], list[Tensor]], module: str) -> Provider:
    return Provider(name, ("video",), partial(_peer, decode), missing=needs(module), refuses=_refuses)


PROVIDERS = (
    Provider(
        "vot-kernels",
        ("video",),
        _ours,
        missing=needs("av", "PIL", "transformers"),
        refuses=_refuses,
        ours=True,
    ),
    _provider("PyAV loop", partial(_pyav, "SLICE"), "av"),
    _provider("PyAV loop all threads", partial(_pyav, "AUTO"), "av"),
    _provider("OpenCV", _opencv, "cv2"),
    _provider("torchcodec", _torchcodec, "torchcodec"),
    _provider("decord", _decord, "decord"),
)
