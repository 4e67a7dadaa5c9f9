"""The command line: `vot ask`, `vot encode`, `vot train`, `vot eval`, `vot info` and `vot demo`.

Heavy modules are imported by the command that needs them, and only after its files were read, so that
`vot --help` and a bad file get their answer at once. An error is one sentence on stderr and the exit code 2;
Ctrl-C ends with 130.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vot_kernels.extras import imports_for, require
from vot_kernels.files import atomic_write

try:
    with imports_for("vot", "cli"):
        import typer
except ImportError as error:
    sys.exit(str(error))

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer, VideoQA

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask questions about videos, encode them, and train and evaluate the models that do it.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a stage; interrupted runs are resumed.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure accuracy on held-out videos.")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")

STEPS = ("task_definition", "tracking", "action_analysis", "ranking", "verification")

Fps = Annotated[
    float | None, typer.Option(help="Frames per second to look at (default: 8, at most 32 frames).")
]
NumFrames = Annotated[
    int | None, typer.Option(help="Look at this many frames, evenly spread, instead of --fps.")
]
Start = Annotated[float | None, typer.Option(help="Begin at this time, in seconds.")]
End = Annotated[float | None, typer.Option(help="End at this time, in seconds.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder of a perception checkpoint (default: the bundled DigitWorld one).")
]
Llm = Annotated[
    Path | None, typer.Option(help="Folder of any Hugging Face causal LM (default: SmolLM2-135M-Instruct).")
]


@app.command()
def ask(
    video: Annotated[Path | None, typer.Argument(help="A video, an image or a GIF.")] = None,
    question: Annotated[str | None, typer.Argument(help="A question about it.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Answers to choose from, separated by '|' (default: proposed).")
    ] = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
    skip: Annotated[
        list[str] | None, typer.Option(help=f"Step to skip: {', '.join(STEPS)}; repeatable.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write all steps, prompts and replies to this JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the frames with their tracklets to this PNG.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Answer every line {"video", "question", "candidates"?, "id"?} of this JSONL file.'
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --batch: JSONL of answers; questions already answered in it are skipped."),
    ] = None,
) -> None:
    """Answer a question about a video, with evidence (times in seconds, boxes as fractions of the frame)."""
    require("vot ask", "video", "llm")
    from vot_kernels.pipelines.batch import answer_batch, read_questions
    from vot_kernels.pipelines.sampling import Sampling, checkpoint_fps, sample_video

    sampling = Sampling(fps, num_frames, start, end)
    if batch is not None:
        if out is None or video is not None:
            raise ValueError("--batch needs --out FILE and accepts no video and no question.")
        read_questions(batch)
        done, skipped = answer_batch(_video_qa(checkpoint, llm, skip), batch, out, sampling)
        print(f"{done} answered, {skipped} already in {out}.", file=sys.stderr)
        return
    if video is None or question is None:
        raise ValueError('Give a video and a question: vot ask clip.mp4 "What happens?".')
    clip = sample_video(video, sampling, checkpoint_fps(checkpoint), progress=not json_)
    result = _video_qa(checkpoint, llm, skip).ask(clip, question, _split_candidates(candidates))
    _write_extras(result, trace, picture)
    if json_:
        print(json.dumps(_as_json(result, trace, picture), ensure_ascii=False))
    else:
        _print_answer(result, picture)


@app.command()
def encode(
    videos: Annotated[list[Path], typer.Argument(help="Videos, images or GIFs of any sizes.")],
    out: Annotated[
        Path, typer.Option(help="safetensors file to write: one pooled vector and all tokens each.")
    ],
    checkpoint: Checkpoint = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
) -> None:
    """Encode videos with the packed encoder and write their embeddings."""
    require("vot encode", "video", "llm")
    from vot_kernels.pipelines.encode import encode_videos
    from vot_kernels.pipelines.sampling import Sampling

    for line in encode_videos(videos, out, checkpoint, Sampling(fps, num_frames, start, end)):
        print(line, file=sys.stderr)
    print(out)


@train_app.command("perception")
def train_perception_command(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.")
    ],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the whole model.")] = None,
    dynamics_steps: Annotated[
        int | None, typer.Option(help="Further steps that train relations and events alone.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips per split in the final metrics.")] = 200,
) -> None:
    """Train the nano encoder and the STSG head on DigitWorld."""
    require("vot train perception", "video", "llm", "train")
    from vot_kernels.train.perception.run import run
    from vot_kernels.train.perception.stage import PerceptionTraining

    given = {
        "steps": steps,
        "dynamics_steps": dynamics_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = PerceptionTraining(**chosen)
    print(run(out, settings, eval_clips))


@train_app.command("encoder")
def train_encoder_command(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint to distil from, or 'random' for an untrained encoder.",
            show_default="the bundled perception checkpoint",
        ),
    ] = None,
    distillation: Annotated[float | None, typer.Option(help="Weight of distillation; 0 is off.")] = None,
    contrastive: Annotated[float | None, typer.Option(help="Weight of contrast; 0 is off.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data.")] = None,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 200,
) -> None:
    """Pretrain the nano encoder on DigitWorld by distillation and by contrast with captions."""
    require("vot train encoder", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import BUNDLED_CHECKPOINT
    from vot_kernels.train.encoder.run import RANDOM_TEACHER, run
    from vot_kernels.train.encoder.stage import EncoderTraining

    given = {
        "distillation": distillation,
        "contrastive": contrastive,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = EncoderTraining(**chosen)
    folder = None if teacher == RANDOM_TEACHER else Path(teacher or BUNDLED_CHECKPOINT)
    print(run(out, settings, folder, eval_clips))


@eval_app.command("digitworld")
def eval_digitworld(
    out: Annotated[Path, typer.Option(help="JSON file for the results; an unfinished run is resumed.")],
    videos: Annotated[int, typer.Option(help="Held-out videos, one question each.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the videos.")] = 0,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
) -> None:
    """Accuracy per question type: model with and without VoT, rules on the STSG, blind baselines."""
    require("vot eval digitworld", "video", "llm", "train")
    from vot_kernels.pipelines.evaluation import evaluate_digitworld, format_table

    print(format_table(evaluate_digitworld(out, videos, seed, checkpoint, llm)))


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Also print parameters and FLOPs of a preset: nano, small, base or large."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Versions, GPUs, and the backend each op would use; with --model the size of an encoder preset."""
    from vot_kernels.info import collect, format_report

    report = collect()
    if model is not None:
        require("vot info --model", "llm")
        from vot_kernels.models.encoder.cost import describe_preset

        report["model"] = describe_preset(model)
    if json_:
        print(json.dumps(report, indent=2))
        return
    if model is None:
        print(format_report(report))
    else:
        print(report["model"]["text"])


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and traces.")] = Path("demo-output"),
) -> None:
    """Ask about a DigitWorld clip, which the checkpoint knows, and a natural clip, which it does not."""
    require("vot demo", "video", "llm")
    from vot_kernels.pipelines.demo import run_demo

    for result, picture in run_demo(out):
        _print_answer(result, picture)
        print()


def _video_qa(checkpoint: Path | None, llm: Path | None, skip: list[str] | None) -> "VideoQA":
    from vot_kernels.pipelines.sampling import checkpoint_folder
    from vot_kernels.reasoning.llm import check_model_folder
    from vot_kernels.reasoning.types import Switches

    unknown = sorted(set(skip or ()) - set(STEPS))
    if unknown:
        raise ValueError(f"--skip must be one of {', '.join(STEPS)}, got {unknown[0]!r}.")
    switches = Switches(**{name: False for name in skip or ()})
    checkpoint_folder(checkpoint)
    if llm is not None:
        check_model_folder(llm)
    from vot_kernels.pipelines.video_qa import VideoQA, load_language_model, load_perception

    return VideoQA(*load_perception(checkpoint), load_language_model(llm), switches)


def _split_candidates(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [part.strip() for part in text.split("|")]


def _write_extras(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> None:
    if trace is not None:
        with atomic_write(trace) as temporary:
            temporary.write_text(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    if picture is not None:
        result.save_picture(picture)


def _as_json(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> dict[str, Any]:
    files = {"trace_file": trace, "picture_file": picture}
    return result.to_dict() | {name: str(path) for name, path in files.items() if path is not None}


def _print_answer(result: "VideoAnswer", picture: Path | None) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(str(result.clip.info.path), markup=False, style="bold")
    console.print(result.clip.info.describe(), markup=False, style="dim")
    console.print(result.answer.summary(), markup=False)
    if result.answer.warning is not None:
        console.print("  No evidence is shown for a clip that the checkpoint does not know.", style="dim")
    else:
        for line in result.evidence_lines(limit=8):
            console.print(f"  {line}", markup=False)
    if picture is not None:
        console.print(f"Picture: {picture}", markup=False)


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turn errors that a user can correct into one sentence on stderr; VOT_DEBUG=1 shows the traceback."""
    try:
        yield
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, of click or of the click inside typer
            _fail(error.format_message())
        if not isinstance(error, (ValueError, OSError, ImportError)) or os.environ.get("VOT_DEBUG"):
            raise
        _fail(str(error) or type(error).__name__)


def _fail(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Entry point of the `vot` command."""
    with _one_sentence_errors():
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
