"""`python -m benchmarks.long_encoding OUT.json`: memory and time of `vot encode --long` over the length of the video.

Each video is a file of H.264 and has a process of its own, whose largest resident set is measured from the file to the
embeddings. Two encoders of the same size: the bundled one, which has a layer of exact attention, and one with random
weights whose layers all have a window. The same command goes on after an interruption.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vot_kernels.files import append_json_lines, atomic_write, check_output, read_json_lines

LENGTHS = {"windows": (250, 1000, 4000, 10_000), "bundled": (250, 1000)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if a length failed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.long_encoding", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="JSON file for the result")
    parser.add_argument("--most", type=int, default=10_000, help="longest video, in frames")
    parser.add_argument("--video", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--encoder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.video is not None:
        print(json.dumps(encode(options.video, options.encoder, options.out)))
        return 0
    check_output(options.out, ".json")
    rows_file = options.out.with_suffix(".rows.jsonl")
    done = {(row["encoder"], row["frames"]) for row in read_json_lines(rows_file)}
    wanted = [(name, n) for name, lengths in LENGTHS.items() for n in lengths if n <= options.most]
    with append_json_lines(rows_file) as append:
        for name, frames in wanted:
            if (name, frames) not in done:
                print(f"{name}, {frames} frames …", file=sys.stderr, flush=True)
                append({"encoder": name, "frames": frames, **measure(name, frames)})
    result = {
        "command": f"python -m benchmarks.long_encoding OUT.json --most {options.most}",
        "rows": [row for row in read_json_lines(rows_file) if (row["encoder"], row["frames"]) in wanted],
    }
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(name: str, frames: int) -> dict[str, Any]:
    """Encode a video of so many frames in another process; return what that prints."""
    from vot_kernels.data.digitworld import long_clip
    from vot_kernels.data.video import save_mp4

    with tempfile.TemporaryDirectory() as folder:
        episode = long_clip("test", 0, frames, 0)
        video = save_mp4(Path(folder, "clip.mp4"), episode.frames(), episode.scene.fps, crf=23)
        own = [f"--video={video}", f"--encoder={_encoder(name, Path(folder))}"]
        command = [
            sys.executable,
            "-m",
            "benchmarks.long_encoding",
            str(Path(folder, "out.safetensors")),
            *own,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def encode(video: Path, encoder: Path, out: Path) -> dict[str, Any]:
    """Encode a video in this process; return seconds, tokens and megabytes."""
    import torch

    from vot_kernels.pipelines.encode import load_encoder
    from vot_kernels.pipelines.long_video.encoding import encode_long_videos

    load_encoder(encoder)
    loaded, start = _peak_mb(), time.perf_counter()
    (line,) = encode_long_videos([video], out, encoder)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": _peak_mb(),
        "loaded_mb": loaded,
        "tokens": int(line.split()[-2]),
        "out_mb": out.stat().st_size / 1e6,
        "threads": torch.get_num_threads(),
    }


def _encoder(name: str, folder: Path) -> Path:
    """Return the folder of an encoder."""
    from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT

    if name == "bundled":
        return BUNDLED_CHECKPOINT
    from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
    from vot_kernels.models.perception import VotPerceptionConfig
    from vot_kernels.pipelines.encode import load_encoder

    _, processor = load_encoder(BUNDLED_CHECKPOINT)
    bundled = VotPerceptionConfig.from_pretrained(BUNDLED_CHECKPOINT, local_files_only=True).encoder
    config = VotEncoderConfig(**{**_plain(bundled), "full_attention_every": 0})
    target = folder / "encoder"
    VotEncoder(config).save_pretrained(target)
    processor.save_pretrained(target)
    return target


def _plain(config: Any) -> dict[str, Any]:
    """Return the arguments of a configuration, without what follows from them."""
    return {name: value for name, value in config.to_dict().items() if name != "layer_windows"}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
