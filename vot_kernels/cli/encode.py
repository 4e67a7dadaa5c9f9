"""`vot encode`: embeddings of videos."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vot_kernels.cli.manners import nothing_is_kept, when_interrupted
from vot_kernels.cli.options import PATH, Device, End, NumFrames, Start
from vot_kernels.extras import require


@when_interrupted(nothing_is_kept)
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
            help="Folder of an encoder or a perception checkpoint (default: the bundled DigitWorld one).",
            **PATH,
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
) -> None:
    """Encode videos with the packed encoder and write their embeddings."""
    require("vot encode", "video", "llm")
    from vot_kernels.pipelines.encode import encode_videos
    from vot_kernels.pipelines.sampling import Sampling, check_device, find_clips

    check_device(device)
    for line in encode_videos(
        find_clips(videos), out, checkpoint, Sampling(fps, num_frames, start, end), device
    ):
        print(line, file=sys.stderr)
    print(out)
