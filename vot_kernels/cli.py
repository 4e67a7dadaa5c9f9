"""The command line: `vot ask`, `vot encode`, `vot train`, `vot eval`, `vot info` and `vot demo`.

Heavy modules are imported by the command that needs them, and only after its files and outputs were checked, so that
`vot --help` and a bad file are answered at once. An error is one sentence on stderr and the exit code 2; a result that
is incomplete, 1; Ctrl-C, one sentence on what is kept, and 130.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

try:
    from vot_kernels.extras import imports_for, require
    from vot_kernels.files import atomic_write, check_output, check_output_folder
    from vot_kernels.train.encoder.settings import RANDOM_TEACHER, EncoderTraining
    from vot_kernels.train.linearize.settings import Linearization
    from vot_kernels.train.perception.settings import PerceptionTraining

    with imports_for("vot", "cli"):
        import typer
except ImportError as error:
    sys.exit(str(error))
except KeyboardInterrupt:  # before `main`, which handles it from then on
    print("Interrupted: nothing was written; run the same command again.", file=sys.stderr)
    sys.exit(130)

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer, VideoQA

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True,
    context_settings=_HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask questions about videos, encode them, and train and evaluate the models that do it.",
)
_GROUP: dict[str, Any] = {"no_args_is_help": True, "context_settings": _HELP}
train_app = typer.Typer(help="Train a stage; interrupted runs are resumed.", **_GROUP)
eval_app = typer.Typer(help="Measure accuracy on held-out videos.", **_GROUP)
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")

STEPS = ("task_definition", "tracking", "action_analysis", "ranking", "verification")

EVIDENCE_LINES = 3  # shown without --verbose


def _local_path(text: str | Path) -> Path:
    """Return a path; refuse a URL, in which Path would drop a slash."""
    if "://" in str(text):
        raise typer.BadParameter(
            f"'{text}' is a URL, but only local files are read and written: download it first."
        )
    return Path(text)


_PATH: dict[str, Any] = {"parser": _local_path, "metavar": "PATH"}

Fps = Annotated[
    float | None, typer.Option(help="Frames per second to look at (default: 8, at most 32 frames).")
]
NumFrames = Annotated[
    int | None, typer.Option(help="Look at this many frames, evenly spread, instead of --fps.")
]
Start = Annotated[float | None, typer.Option(help="Begin at this time, in seconds.")]
End = Annotated[float | None, typer.Option(help="End at this time, in seconds.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Folder of a perception checkpoint (default: the bundled DigitWorld one).", **_PATH),
]
Llm = Annotated[
    Path | None,
    typer.Option(help="Folder of any Hugging Face causal LM (default: SmolLM2-135M-Instruct).", **_PATH),
]
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, mps …")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the five steps and all the evidence.")]

Command = TypeVar("Command", bound=Callable[..., None])


def _when_interrupted(kept: Callable[[dict[str, Any]], str]) -> Callable[[Command], Command]:
    """Handle Ctrl-C in a command: print what is kept, by its arguments, and how to continue, and exit with 130."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            try:
                command(**given)
            except KeyboardInterrupt:
                print(f"Interrupted: {kept(given)}", file=sys.stderr)
                raise typer.Exit(130) from None

        return run  # type: ignore[return-value]

    return decorate


def _nothing(given: dict[str, Any]) -> str:
    return "nothing was written; run the same command again."


def _checkpoints(given: dict[str, Any]) -> str:
    return f"the steps so far are kept in {given['out']}; the same command goes on from there."


def _answers(given: dict[str, Any]) -> str:
    if given.get("batch") is None and "videos" not in given:
        return _nothing(given)
    rows = given["out"].with_suffix(".rows.jsonl") if "videos" in given else given["out"]
    return f"the answers so far are kept in {rows}; the same command goes on from there."


def _print_version(asked: bool) -> None:
    if asked:
        from vot_kernels import __version__

        print(f"vot-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_when_interrupted(_answers)
def ask(
    video: Annotated[Path | None, typer.Argument(help="A video, an image or a GIF.", **_PATH)] = None,
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
    device: Device = "cpu",
    skip: Annotated[
        list[str] | None, typer.Option(help=f"Step to skip: {', '.join(STEPS)}; repeatable.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Guess about a clip that the checkpoint does not know, too.")
    ] = False,
    verbose: Verbose = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write all steps, prompts and replies to this JSON file.", **_PATH)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the frames with their tracklets to this PNG.", **_PATH)
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Answer every line {"video", "question", "candidates"?, "id"?} of this JSONL file.', **_PATH
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --batch: JSONL of answers; what is answered in it is skipped, errors are tried again.",
            **_PATH,
        ),
    ] = None,
) -> None:
    """Answer a question about a video, with evidence (times in seconds, boxes as fractions of the frame)."""
    require("vot ask", "video", "llm")
    from vot_kernels.pipelines.batch import answer_batch, read_questions
    from vot_kernels.pipelines.progress import steps
    from vot_kernels.pipelines.sampling import Sampling, checkpoint_fps, sample_video
    from vot_kernels.reasoning.reasoning import check_candidates, check_question

    sampling = Sampling(fps, num_frames, start, end)
    if batch is not None:
        if out is None or video is not None:
            raise ValueError("--batch needs --out FILE and accepts no video and no question.")
        read_questions(batch)
        check_output(out)
        _check_models(checkpoint, llm, skip, device)
        with steps() as step:
            step("Loading the perception checkpoint")
            video_qa = _video_qa(checkpoint, llm, skip, device, anyway)
        answered, skipped, failed = answer_batch(video_qa, batch, out, sampling)
        print(f"{answered} answered, {skipped} already in {out}, {failed} failed.", file=sys.stderr)
        if failed:
            print("The same command tries the failed ones again.", file=sys.stderr)
            raise typer.Exit(1)
        return
    if video is None or question is None:
        raise ValueError('Give a video and a question: vot ask clip.mp4 "What happens?".')
    check_question(question)
    given = check_candidates(_split_candidates(candidates))
    for output, suffix in ((trace, ".json"), (picture, ".png")):
        if output is not None:
            check_output(output, suffix)
    on_terminal = sys.stderr.isatty()
    with steps(shown=not json_) as step:
        if on_terminal:  # elsewhere a bad file is one line, and decoding is short
            step(f"Reading {video.name}")
        clip = sample_video(video, sampling, checkpoint_fps(checkpoint))
        _check_models(checkpoint, llm, skip, device)
        step("Loading the perception checkpoint")
        video_qa = _video_qa(checkpoint, llm, skip, device, anyway)
        result = video_qa.ask(clip, question, given, report=step)
    failures: list[str] = []
    try:
        failures = _write_extras(result, trace, picture)
    finally:
        if json_:
            print(json.dumps(_as_json(result, trace, picture), ensure_ascii=False), flush=True)
        else:
            _print_answer(result, picture, verbose)
    if failures:
        print(" ".join(failures), file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@_when_interrupted(_nothing)
def encode(
    videos: Annotated[list[Path], typer.Argument(help="Videos, images or GIFs of any sizes.", **_PATH)],
    out: Annotated[
        Path, typer.Option(help="safetensors file to write: one pooled vector and all tokens each.", **_PATH)
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an encoder or a perception checkpoint (default: the bundled DigitWorld one).",
            **_PATH,
        ),
    ] = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    device: Device = "cpu",
) -> None:
    """Encode videos with the packed encoder and write their embeddings."""
    require("vot encode", "video", "llm")
    from vot_kernels.pipelines.encode import encode_videos
    from vot_kernels.pipelines.sampling import Sampling, check_device

    check_device(device)
    for line in encode_videos(videos, out, checkpoint, Sampling(fps, num_frames, start, end), device):
        print(line, file=sys.stderr)
    print(out)


@train_app.command("perception")
@_when_interrupted(_checkpoints)
def train_perception_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **_PATH),
    ],
    steps: Annotated[
        int, typer.Option(help="Optimiser steps of the whole model.")
    ] = PerceptionTraining.steps,
    dynamics_steps: Annotated[
        int, typer.Option(help="Further steps that train relations and events alone.")
    ] = PerceptionTraining.dynamics_steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = PerceptionTraining.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = PerceptionTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = PerceptionTraining.seed,
    attention: Annotated[
        Literal["hybrid", "softmax"],
        typer.Option(help="Attention of the encoder; softmax reaches all frames."),
    ] = PerceptionTraining.attention,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips per split in the final metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Train the nano encoder and the STSG head on DigitWorld."""
    require("vot train perception", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import check_device

    settings = PerceptionTraining(
        steps=steps,
        dynamics_steps=dynamics_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        attention=attention,
    )
    check_device(device)
    check_output_folder(out)
    from vot_kernels.train.perception.run import run

    print(run(out, settings, eval_clips, device))


@train_app.command("linearize")
@_when_interrupted(_checkpoints)
def train_linearize_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a perception checkpoint with softmax attention.", **_PATH)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **_PATH),
    ],
    window: Annotated[int, typer.Option(help="Frames on each side that stay exact.")] = 1,
    layer_steps: Annotated[
        int, typer.Option(help="Optimiser steps in which each layer learns alone.")
    ] = Linearization.layer_steps,
    steps: Annotated[
        int, typer.Option(help="Further steps in which all layers learn together.")
    ] = Linearization.steps,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Turn exact attention into hybrid attention by distillation, layer by layer and then end to end."""
    require("vot train linearize", "video", "llm", "train")
    from vot_kernels.models.checkpoint import PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    checkpoint_kind(checkpoint, PERCEPTION)
    check_output_folder(out)
    from vot_kernels.train.linearize.run import run

    settings = Linearization(layer_steps=layer_steps, steps=steps)
    print(run(out, checkpoint, settings, window, eval_clips, device))


@train_app.command("encoder")
@_when_interrupted(_checkpoints)
def train_encoder_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **_PATH),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of a checkpoint to distil from, or '{RANDOM_TEACHER}' for an untrained encoder.",
            show_default="the bundled perception checkpoint",
            **_PATH,
        ),
    ] = None,
    distillation: Annotated[
        float, typer.Option(help="Weight of distillation; 0 is off.")
    ] = EncoderTraining.distillation,
    contrastive: Annotated[
        float, typer.Option(help="Weight of contrast; 0 is off.")
    ] = EncoderTraining.contrastive,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = EncoderTraining.steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = EncoderTraining.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = EncoderTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = EncoderTraining.seed,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Pretrain the nano encoder on DigitWorld by distillation and by contrast with captions."""
    require("vot train encoder", "video", "llm", "train")
    from vot_kernels.models.checkpoint import ENCODER, PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import BUNDLED_CHECKPOINT, check_device

    settings = EncoderTraining(
        distillation=distillation,
        contrastive=contrastive,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_device(device)
    folder = None if teacher == Path(RANDOM_TEACHER) else teacher or BUNDLED_CHECKPOINT
    if folder is not None and settings.distillation:
        checkpoint_kind(folder, PERCEPTION, ENCODER)
    check_output_folder(out)
    from vot_kernels.train.encoder.run import run

    print(run(out, settings, folder, eval_clips, device))


@eval_app.command("digitworld")
@_when_interrupted(_answers)
def eval_digitworld(
    out: Annotated[
        Path, typer.Option(help="JSON file for the results; an unfinished run is resumed.", **_PATH)
    ],
    videos: Annotated[int, typer.Option(help="Held-out videos, one question each.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the videos.")] = 0,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
    device: Device = "cpu",
) -> None:
    """Accuracy per question type: model with and without VoT, rules on the STSG, blind baselines."""
    require("vot eval digitworld", "video", "llm", "train")
    check_output(out, ".json")
    _check_models(checkpoint, llm, None, device)
    from vot_kernels.pipelines.evaluation import evaluate_digitworld, format_table

    print(format_table(evaluate_digitworld(out, videos, seed, checkpoint, llm, device)))


@app.command()
@_when_interrupted(_nothing)
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
@_when_interrupted(lambda given: f"the pictures and traces that are done are in {given['out']}.")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and traces.", **_PATH)] = Path(
        "demo-output"
    ),
    device: Device = "cpu",
    verbose: Verbose = False,
) -> None:
    """Ask about a DigitWorld clip, which the checkpoint knows, and a natural clip, which it does not."""
    require("vot demo", "video", "llm")
    from vot_kernels.pipelines.demo import run_demo
    from vot_kernels.pipelines.progress import steps
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    check_output_folder(out)
    results = []
    try:
        with steps() as step:
            for item in run_demo(out, step, device):
                results.append(item)
    finally:
        for result, picture in results:
            print(f"{result.clip.info.path}: {result.answer.question}")
            _print_answer(result, picture, verbose)
            print()


def _check_models(checkpoint: Path | None, llm: Path | None, skip: list[str] | None, device: str) -> None:
    """Find whatever can be wrong with a model's options before the model is imported."""
    from vot_kernels.pipelines.sampling import check_device, checkpoint_folder
    from vot_kernels.reasoning.llm import check_model_folder

    unknown = sorted(set(skip or ()) - set(STEPS))
    if unknown:
        raise ValueError(f"--skip must be one of {', '.join(STEPS)}, got {unknown[0]!r}.")
    check_device(device)
    checkpoint_folder(checkpoint)
    if llm is not None:
        check_model_folder(llm)


def _video_qa(
    checkpoint: Path | None, llm: Path | None, skip: list[str] | None, device: str, anyway: bool
) -> "VideoQA":
    from vot_kernels.reasoning.types import Switches

    _check_models(checkpoint, llm, skip, device)
    switches = Switches(**{name: False for name in skip or ()})
    from vot_kernels.pipelines.video_qa import DeferredModel, VideoQA, load_language_model, load_perception

    model = DeferredModel(lambda: load_language_model(llm, device))
    return VideoQA(*load_perception(checkpoint, device), model, switches, anyway=anyway)


def _split_candidates(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [part.strip() for part in text.split("|")]


def _write_extras(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> list[str]:
    """Write the trace and the picture; return what went wrong, a sentence each."""
    failures = []
    try:
        if trace is not None:
            with atomic_write(trace) as temporary:
                temporary.write_text(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    except OSError as error:
        failures.append(f"The trace could not be written: {error}.")
    try:
        if picture is not None:
            result.save_picture(picture)
    except (OSError, ValueError) as error:
        failures.append(f"The picture could not be written: {error}.")
    return failures


def _as_json(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> dict[str, Any]:
    files = {"trace_file": trace, "picture_file": picture}
    return result.to_dict() | {
        name: str(path) for name, path in files.items() if path is not None and path.exists()
    }


def _print_answer(result: "VideoAnswer", picture: Path | None, verbose: bool) -> None:
    """Print the answer, then a few lines of evidence, or with `verbose` the steps and all evidence."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(result.answer.headline(), markup=False, style="bold")
    if result.answer.warning is None:
        limit = None if verbose else EVIDENCE_LINES
        for line in result.evidence_lines()[:limit]:
            console.print(f"  {line}", markup=False)
    elif result.answer.choice is None:
        console.print("  With --anyway, vot ask guesses all the same.", style="dim")
    if verbose:
        for line in (result.clip.info.describe(), *result.answer.summary().splitlines()[:-1]):
            console.print(line, markup=False, style="dim")
    else:
        for note in result.clip.info.warnings:
            console.print(f"Note: {note}", markup=False)
    if picture is not None and picture.exists():
        console.print(f"Picture: {picture}", markup=False)


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turn errors that a user can correct into one sentence on stderr; VOT_DEBUG=1 shows the traceback."""
    try:
        yield
    except (typer.Abort, KeyboardInterrupt):
        print(f"Interrupted: {_nothing({})}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, of click or of the click inside typer
            _fail(error.format_message())
        if not isinstance(error, (ValueError, OSError, ImportError)) or os.environ.get("VOT_DEBUG"):
            raise
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            _fail(f"{error.filename}: {error.strerror}.")  # not "[Errno 2] ..."
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
