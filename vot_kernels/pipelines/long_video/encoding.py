"""Embeddings of videos of any length, from file to file in bounded memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vot_kernels.data.video import FrameStream
from vot_kernels.files import atomic_write, check_output
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION
from vot_kernels.pipelines.encode import load_encoder
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, checkpoint_fps, stream_samples

if TYPE_CHECKING:
    from vot_kernels.models.encoder import VotEncoder, VotImageProcessor

Frame = tuple[np.ndarray, float]
Report = Callable[[str], None]


def encode_long_videos(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    sampling: Sampling | None = None,
    device: str = "cpu",
    report: Report = lambda activity: None,
) -> list[str]:
    """Write what `encode_videos` writes, of all frames that `sampling` asks for, in memory that does not grow.

    Videos are encoded one after the other, in chunks of frames; see `vot_kernels.models.encoder.long`. Activations lie
    in a hidden folder beside `out` meanwhile.

    Args:
        paths, out, checkpoint, device: as for `encode_videos`.
        sampling: which frames; by default as many per second as the checkpoint was trained on, of the whole video.
        report: called with the current activity.

    Returns:
        One line per file with a description of the clip and its number of tokens.

    Raises:
        ValueError: as `LongEncoding`, or a file is no video.
    """
    check_output(out, ".safetensors", *paths)
    fps = checkpoint_fps(checkpoint, ENCODER, PERCEPTION)
    streams = [
        stream_samples(path, sampling or Sampling(), fps) for path in paths
    ]  # a bad file is found at once
    encoder, processor = load_encoder(checkpoint_folder(checkpoint, ENCODER, PERCEPTION), device)
    lines: list[str] = []
    target = Path(out).absolute()
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder,
        atomic_write(target) as temporary,
    ):
        entries: dict[str, _Entry] = {}
        for n, stream in enumerate(streams):
            place = Path(folder, str(n))
            place.mkdir()
            found, line = _encode(encoder, processor, stream, place, report)
            entries |= {f"{n}.{name}": entry for name, entry in found.items()}
            lines.append(line)
        write_safetensors(temporary, entries, {str(n): os.fspath(path) for n, path in enumerate(paths)})
    return lines


class _Entry(NamedTuple):
    """A tensor of a safetensors file: its dtype in that format, its shape, and the file of its bytes."""

    dtype: str
    shape: Sequence[int]
    file: Path


def _encode(
    encoder: "VotEncoder", processor: "VotImageProcessor", stream: FrameStream, folder: Path, report: Report
) -> tuple[dict[str, _Entry], str]:
    """Encode one video; return what is written of it, in files of `folder`, and its description."""
    from vot_kernels.models.encoder.long import CHUNK, LongEncoding
    from vot_kernels.models.perception.reading import sampled_fps
    from vot_kernels.pipelines.encode import refuse_nan

    name, times, encoding, grid = stream.path.name, [], None, [0, 0, 0]
    for frames, at in _chunks(stream, CHUNK):
        inputs = processor([frames])
        frames_, *grid_hw = inputs["image_grid_thw"][0].tolist()
        if encoding is None:
            encoding = LongEncoding(encoder, folder, tuple(grid_hw), CHUNK)
        encoding.add(inputs["pixel_values"].to(encoder.device))
        times += at
        grid = [grid[0] + frames_, *grid_hw]
        report(f"Reading {name}: {len(times)} frames")
    assert encoding is not None  # a stream has a frame
    seen = np.array(times, dtype=np.float64)
    clip = encoding.run(
        sampled_fps(seen), lambda done, total: report(f"Encoding {name}: {100 * done // total} %")
    )
    refuse_nan(clip.pooled)
    for file in folder.iterdir():
        if file != clip.file:
            file.unlink()
    kind = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float64": "F64"}[str(clip.pooled.dtype)]
    entries = {
        "pooled": _saved(folder / "pooled", kind, clip.pooled.cpu().view(-1)),
        "tokens": _Entry(kind, list(clip.tokens.shape), clip.file),
        "grid_thw": _saved(folder / "grid", "I64", np.array(grid)),
        "times_s": _saved(folder / "times", "F64", seen),
    }
    return entries, f"{stream.info.describe()} {len(clip.tokens)} tokens."


def _saved(file: Path, dtype: str, values: Any) -> _Entry:
    """Write the few numbers of a tensor to a file."""
    import torch

    tensor = torch.as_tensor(values).contiguous()
    file.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    return _Entry(dtype, list(tensor.shape), file)


def _chunks(frames: Iterable[Frame], size: int) -> Iterator[tuple[np.ndarray, list[float]]]:
    """Yield frames `[at most size, height, width, 3]` and their times."""
    rest = iter(frames)
    while some := list(islice(rest, size)):
        yield np.stack([frame for frame, _ in some]), [time for _, time in some]


def write_safetensors(path: Path, entries: dict[str, _Entry], metadata: dict[str, str]) -> None:
    """Write a safetensors file from files of bytes; the library's own writer takes a copy of all in memory.

    Source: the format, https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.file.stat().st_size
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with open(path, "wb") as whole:
        whole.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            with open(entry.file, "rb") as part:
                shutil.copyfileobj(part, whole)
