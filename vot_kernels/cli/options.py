"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vot_kernels.extras import require

HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
GROUP: dict[str, Any] = {"no_args_is_help": True, "context_settings": HELP}

STEPS = ("task_definition", "tracking", "action_analysis", "ranking", "verification")


def examples(*lines: str) -> str:
    """Return the end of a help page, for `epilog`; typer keeps lines apart that a blank line separates."""
    return "\n\n".join(["Examples:", *lines])


def local_path(text: str | Path) -> Path:
    """Return a path; refuse a URL, in which Path would drop a slash."""
    if "://" in str(text):
        raise typer.BadParameter(
            f"'{text}' is a URL, but only local files are read and written: download it first."
        )
    return Path(text)


def checkpoint_path(text: str | Path) -> Path:
    """Return a path, or the folder of the checkpoint of that name in the package; refuse a URL."""
    from vot_kernels.models.checkpoint import find_checkpoint

    return find_checkpoint(local_path(text))


PATH: dict[str, Any] = {"parser": local_path, "metavar": "PATH"}
CHECKPOINT: dict[str, Any] = {"parser": checkpoint_path, "metavar": "PATH"}

Fps = Annotated[
    float | None,
    typer.Option(help="Frames per second to look at (default: 8; with --vlm 2 and with --detector 4)."),
]
NumFrames = Annotated[
    int | None, typer.Option(help="Look at this many frames, evenly spread, instead of --fps.")
]
Start = Annotated[float | None, typer.Option(help="Begin at this time, in seconds.")]
End = Annotated[float | None, typer.Option(help="End at this time, in seconds.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a perception checkpoint (default: digitworld-nano, which ships with the package).",
        **CHECKPOINT,
    ),
]
Llm = Annotated[
    Path | None,
    typer.Option(help="Folder of any Hugging Face causal LM (default: SmolLM2-135M-Instruct).", **CHECKPOINT),
]
Vlm = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a video-language model of transformers, which sees any video and writes the scene graph "
        "itself, instead of checkpoint and LLM; or one of `vot train sft`, or digitworld-reader or "
        "digitworld-smollm2, which read the checkpoint's graph.",
        **CHECKPOINT,
    ),
]
Detector = Annotated[
    Path | None,
    typer.Option(
        help="Folder of an object detector of transformers, which sees the scene graph instead.", **CHECKPOINT
    ),
]
Objects = Annotated[
    str | None,
    typer.Option(help="What the detector looks for, separated by '|'; a zero-shot detector needs it."),
]
Dtype = Annotated[
    str,
    typer.Option(help="Numbers of --vlm and --detector: auto (as in the files), float32, bfloat16, float16."),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="With --vlm: frames that the model sees at once (default: 32). It sees a longer video in windows of so "
        "many, and answers from as many around the moments that matter."
    ),
]
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, mps …")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the five steps and all the evidence.")]
ENGINES = ("local", "ray")
Engine = Annotated[
    str,
    typer.Option(
        help="'local' works in this process; 'ray' spreads the videos over the workers of a Ray cluster (the one that "
        "RAY_ADDRESS names, else this machine), which read the same paths.",
        metavar="ENGINE",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="With --engine ray: number of workers (default: one per GPU, or per four CPU cores)."),
]


def check_engine(engine: str, workers: int | None) -> None:
    """Refuse an unknown engine, and workers without one that has them."""
    if engine not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if workers is not None and engine == "local":
        raise ValueError(
            "--workers is the number of workers of an engine that has them; give --engine ray, too."
        )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}.")
    if engine == "ray":
        require("--engine ray", "ray")
