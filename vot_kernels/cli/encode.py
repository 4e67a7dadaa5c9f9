"""`vot encode`: embeddings of videos."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vot_kernels.cli.manners import kept_in, nothing_is_kept, when_interrupted
from vot_kernels.cli.options import (
    CHECKPOINT,
    PATH,
    Device,
    End,
    Engine,
    NumFrames,
    Start,
    Workers,
    check_engine,
)
from vot_kernels.extras import require


def _kept(given: dict[str, Any]) -> str:
    if given["engine"] == "local":
        return nothing_is_kept(given)
    return kept_in("the videos so far", Path(f"{given['out']}.parts"))


@when_interrupted(_kept)
def encode(
    videos: Annotated[
        list[Path],
        typer.Argument(
            help="Videos, images or GIFs of any sizes, and folders of them.", **PATH | {"metavar": "VIDEO..."}
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="safetensors file to write: one pooled vector and all tokens each.", **PATH)
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an encoder or a perception checkpoint (default: digitworld-nano, which ships with the "
            "package).",
            **CHECKPOINT,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames per second to look at (default: that of the checkpoint, and no more than 32 frames)."
        ),
    ] = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    device: Device = "cpu",
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Encode all frames at the checkpoint's rate, or at --fps, however many, in memory that does not "
            "grow; activations lie on the disk beside OUT meanwhile.",
        ),
    ] = False,
    engine: Engine = "local",
    workers: Workers = None,
) -> None:
    """Encode videos with the packed encoder and write their embeddings."""
    require("vot encode", "video", "llm")
    from vot_kernels.pipelines.sampling import Sampling, check_device, find_clips

    check_device(device)
    check_engine(engine, workers)
    if long and engine != "local":
        raise ValueError(f"--long works in this process alone, so it cannot go with --engine {engine}.")
    sampling, failed = Sampling(fps, num_frames, start, end), list[str]()
    if engine == "ray":
        from vot_kernels.pipelines.on_ray import encode_videos_on_ray

        lines, failed = encode_videos_on_ray(
            find_clips(videos), out, checkpoint, sampling, workers=workers, device=device
        )
    elif long:
        from vot_kernels.pipelines.long_video.encoding import encode_long_videos
        from vot_kernels.pipelines.progress import steps

        with steps(shown=sys.stderr.isatty()) as step:
            lines = encode_long_videos(find_clips(videos), out, checkpoint, sampling, device, step)
    else:
        from vot_kernels.pipelines.encode import encode_videos

        lines = encode_videos(find_clips(videos), out, checkpoint, sampling, device)
    print(*lines, *failed, sep="\n", file=sys.stderr)
    print(out)
    if failed:
        print(f"{len(failed)} failed and are not in it; the same command tries them again.", file=sys.stderr)
        raise typer.Exit(1)
