"""`vot ask`: a question about videos, or a file of questions."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vot_kernels.cli.answers import print_answer
from vot_kernels.cli.manners import answers_are_kept, when_interrupted
from vot_kernels.cli.models import Models
from vot_kernels.cli.options import (
    PATH,
    STEPS,
    Checkpoint,
    Detector,
    Device,
    Dtype,
    End,
    Engine,
    Fps,
    Llm,
    NumFrames,
    Objects,
    Start,
    Verbose,
    Vlm,
    Window,
    Workers,
    check_engine,
)
from vot_kernels.extras import require
from vot_kernels.files import atomic_write, check_output
from vot_kernels.pipelines.errors import CORRECTABLE, sentence

if TYPE_CHECKING:
    from vot_kernels.data.video import FrameStream, VideoClip
    from vot_kernels.pipelines.batch import BatchCounts
    from vot_kernels.pipelines.sampling import Sampling
    from vot_kernels.pipelines.video_qa import Video, VideoAnswer, VideoQA


@when_interrupted(answers_are_kept)
def ask(
    video: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Videos, images or GIFs, and folders of them: one answer each, in order.",
            **PATH | {"metavar": "VIDEO..."},
        ),
    ] = None,
    question: Annotated[str | None, typer.Argument(help="A question about each.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Answers to choose from, separated by '|' (default: proposed).")
    ] = None,
    fps: Fps = None,
    num_frames: NumFrames = None,
    start: Start = None,
    end: End = None,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
    vlm: Vlm = None,
    detector: Detector = None,
    objects: Objects = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    window: Window = None,
    skip: Annotated[
        list[str] | None, typer.Option(help=f"Step to skip: {', '.join(STEPS)}; repeatable.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Guess about a clip that the checkpoint does not know, too.")
    ] = False,
    verbose: Verbose = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each video, a line each.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write all steps, prompts and replies to this JSON file.", **PATH)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the frames with their tracklets to this PNG.", **PATH)
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Answer every line {"video", "question", "candidates"?, "id"?} of this JSONL file.', **PATH
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --batch: JSONL of answers; what is answered in it is skipped, errors are tried again.",
            **PATH,
        ),
    ] = None,
    engine: Engine = "local",
    workers: Workers = None,
) -> None:
    """Answer a question about videos, with evidence (times in seconds, boxes as fractions of the frame)."""
    require("vot ask", "video", "llm")
    from vot_kernels.pipelines.sampling import Sampling
    from vot_kernels.reasoning.reasoning import check_question, split_candidates

    check_engine(engine, workers)
    sampling = Sampling(fps, num_frames, start, end)
    wanted = split_candidates(objects) or ()
    models = Models(
        checkpoint, llm, vlm, detector, wanted, device, dtype, window, skip=tuple(skip or ()), anyway=anyway
    )
    if batch is not None:
        if out is None or video or question is not None:
            raise ValueError("--batch needs --out FILE and accepts no video and no question.")
        _check_unused(
            candidates=candidates is not None,
            trace=trace is not None,
            picture=picture is not None,
            json=json_,
            verbose=verbose,
        )
        answer_file = partial(_answer_file_on_ray, workers=workers) if engine == "ray" else _answer_file
        return _print_counts(answer_file(models, batch, out, sampling), out)
    if engine != "local":
        raise ValueError(
            f"--engine {engine} is for a file of questions: give --batch FILE and --out FILE, too."
        )
    if out is not None:
        raise ValueError("--out is the file of a batch of answers: give --batch FILE, too.")
    if not video or question is None:
        raise ValueError('Give a video and a question: vot ask clip.mp4 "What happens?".')
    check_question(question)
    asked = _Asked(question, split_candidates(candidates), sampling)
    _answer_videos(models, video, asked, _Shown(json_, verbose, trace, picture, anyway))


def _check_unused(**given: bool) -> None:
    """Refuse the first option that is given, since a batch makes no use of it."""
    for name in (name for name, is_given in given.items() if is_given):
        raise ValueError(
            f"--{name} is for a question on the command line; with --batch, candidates are in the file of questions "
            "and answers, with all their steps, in that of --out."
        )


@dataclass(frozen=True)
class _Asked:
    """A question about each of some videos."""

    question: str
    candidates: Sequence[str] | None
    sampling: "Sampling"


@dataclass(frozen=True)
class _Shown:
    """How answers are printed, and the files that the answer about a single video is written to.

    `anyway` says that guesses were asked for.
    """

    json: bool
    verbose: bool
    trace: Path | None
    picture: Path | None
    anyway: bool


def _answer_file(models: Models, batch: Path, out: Path, sampling: "Sampling") -> "BatchCounts":
    """Answer the questions of a JSONL file."""
    from vot_kernels.pipelines.batch import answer_batch, jobs_of
    from vot_kernels.pipelines.progress import steps

    _check_files(models, batch, out, sampling)
    with steps() as step:
        step(models.loading)
        video_qa = models.load()
    _print_estimate(video_qa, jobs_of(batch, out, sampling), verbose=False)
    return answer_batch(video_qa, batch, out, sampling)


def _answer_file_on_ray(
    models: Models, batch: Path, out: Path, sampling: "Sampling", workers: int | None
) -> "BatchCounts":
    """Answer them on workers, which load the models."""
    from vot_kernels.pipelines.on_ray import answer_batch_on_ray

    _check_files(models, batch, out, sampling)
    load = models.absolute().load  # workers are in other folders
    return answer_batch_on_ray(load, batch, out, sampling, workers=workers, device=models.device)


def _check_files(models: Models, batch: Path, out: Path, sampling: "Sampling") -> None:
    """Find whatever can be wrong before anything is loaded."""
    from vot_kernels.pipelines.batch import jobs_of

    models.check()
    jobs_of(batch, out, sampling)


def _print_counts(counts: "BatchCounts", out: Path) -> None:
    answered, skipped, failed = counts
    print(f"{answered} answered, {skipped} already in {out}, {failed} failed.", file=sys.stderr)
    if failed:
        print("The same command tries the failed ones again.", file=sys.stderr)
        raise typer.Exit(1)


def _answer_videos(models: Models, videos: Sequence[Path], asked: _Asked, shown: _Shown) -> None:
    """Answer one question about each video; one that cannot be read does not stop the others."""
    from vot_kernels.pipelines.progress import steps
    from vot_kernels.pipelines.sampling import find_clips

    paths = find_clips(videos)
    alone = len(paths) == 1
    if not alone and (shown.trace or shown.picture):
        raise ValueError(f"--trace and --picture are for one video, but there are {len(paths)}.")
    for output, suffix in ((shown.trace, ".json"), (shown.picture, ".png")):
        if output is not None:
            check_output(output, suffix, *paths)
    with steps(shown=not shown.json) as step:
        # One bad file is reported before anything is loaded.
        clips: Sequence[Video] = [_opened(models, paths[0], asked.sampling, step)] if alone else paths
        models.check()
        step(models.loading)
        video_qa = models.load()
        _print_estimate(video_qa, [(clip, 1, asked.sampling) for clip in clips], shown.verbose)
        answer = partial(_answer_video, video_qa, asked=asked, shown=shown, alone=alone, step=step)
        failed = sum(not answer(path, clip) for path, clip in zip(paths, clips, strict=True))
    if failed:
        if not alone:
            print(f"{failed} of {len(paths)} videos failed.", file=sys.stderr)
        raise typer.Exit(1)


def _opened(
    models: Models, path: Path, sampling: "Sampling", step: Callable[[str], None]
) -> "VideoClip | FrameStream":
    """Decode a short video, or the beginning of a long one."""
    from vot_kernels.pipelines.sampling import MAX_FRAMES, open_samples

    if sys.stderr.isatty():  # elsewhere a bad file is one line, and decoding is short
        step(f"Reading {path.name}")
    return open_samples(path, sampling, models.fps, models.window or MAX_FRAMES)


def _answer_video(
    video_qa: "VideoQA",
    path: Path,
    clip: "Video",
    *,
    asked: _Asked,
    shown: _Shown,
    alone: bool,
    step: Callable[[str], None],
) -> bool:
    """Answer the question about a video and print it, or what failed; return whether nothing did."""
    try:
        result = video_qa.ask(clip, asked.question, asked.candidates, asked.sampling, report=step)
    except CORRECTABLE as error:
        if alone:
            raise
        step("")
        failure = sentence(error)
        if shown.json:
            _print_json({"video": str(path), "question": asked.question, "error": failure})
    else:
        step("")
        failure = _print_result(result, shown, None if alone else path, video_qa.kernels)
    if failure:
        print(failure, file=sys.stderr)
    return not failure


def _print_result(result: "VideoAnswer", shown: _Shown, heading: Path | None, kernels: Sequence[str]) -> str:
    """Print an answer and write its files, below the name of its video if there is a `heading`; return what failed."""
    failures: list[str] = []
    try:
        failures = write_extras(result, shown.trace, shown.picture)
    finally:
        if shown.json:
            _print_json(as_json(result, shown.trace, shown.picture))
        else:
            if heading is not None:
                print(f"{heading}:", flush=True)
            print_answer(result, shown.picture, shown.verbose, kernels, anyway=shown.anyway)
            if heading is not None:
                print(flush=True)
    return " ".join(failures)


def _print_estimate(
    video_qa: "VideoQA", jobs: "Sequence[tuple[Video, int, Sampling]]", verbose: bool
) -> None:
    """Say on stderr what a long run will take; with `verbose`, what any run will."""
    from vot_kernels.pipelines.estimates import estimate_run

    estimate = estimate_run(video_qa, jobs)
    if estimate is not None and (verbose or estimate.long):
        print(estimate, file=sys.stderr)


def write_extras(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> list[str]:
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


def as_json(result: "VideoAnswer", trace: Path | None, picture: Path | None) -> dict[str, Any]:
    files = {"trace_file": trace, "picture_file": picture}
    return result.to_dict() | {
        name: str(path) for name, path in files.items() if path is not None and path.exists()
    }


def _print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)
