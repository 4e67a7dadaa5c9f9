"""`vot data`: files of questions about your own videos, to train on."""

import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from vot_kernels.cli.manners import nothing_is_kept, when_interrupted
from vot_kernels.cli.options import GROUP, PATH, examples
from vot_kernels.extras import require

Format = Literal["nextqa", "star", "clevrer", "charades-sta", "activitynet-qa", "action-genome"]

data_app = typer.Typer(help="Check a file of questions about your own videos, or make one.", **GROUP)


@data_app.command(
    "check", epilog=examples("vot data check questions.jsonl", "vot data check questions.jsonl --videos")
)
@when_interrupted(nothing_is_kept)
def check(
    file: Annotated[Path, typer.Argument(help="JSONL with a question in each line.", **PATH)],
    videos: Annotated[
        bool,
        typer.Option(
            "--videos", help="Also decode a frame of each video, and compare times with its length."
        ),
    ] = False,
) -> None:
    """Say in one sentence what is wrong with each bad line, then what the file has; exit with 1 if a line is bad."""
    if videos:
        require("vot data check --videos", "video")
    from vot_kernels.data.questions import check_questions
    from vot_kernels.pipelines.progress import meter

    size = file.stat().st_size
    with meter("reading") as progress:
        summary = check_questions(
            file,
            lambda number, problem: print(f"{file}, line {number}: {problem}"),
            videos=videos,
            progress=lambda position: progress(position, size),
        )
    if not summary.lines:
        raise ValueError(f"{file} has no line; a line is an object with a video, a question and an answer.")
    print(summary)
    if summary.bad:
        raise typer.Exit(1)


@data_app.command(
    "convert",
    epilog=examples(
        "vot data convert nextqa train.csv questions.jsonl --videos videos --names map_vid_vidorID.json --split train",
        "vot data convert charades-sta charades_sta_train.txt questions.jsonl --videos Charades_v1_480",
        "vot data convert action-genome object_bbox_and_relationship.json graphs.jsonl --videos Charades_v1_480",
    ),
)
@when_interrupted(nothing_is_kept)
def convert(
    form: Annotated[Format, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(get_args(Format))}.")],
    source: Annotated[Path, typer.Argument(help="The annotation file.", **PATH)],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.", **PATH)],
    videos: Annotated[
        Path | None,
        typer.Option(help="Folder of the videos.", show_default="the folder of OUT", **PATH),
    ] = None,
    suffix: Annotated[str, typer.Option(help="Of the names of videos that have none.")] = ".mp4",
    names: Annotated[
        Path | None, typer.Option(help="JSON object that gives ids of videos other names.", **PATH)
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames per second of videos that are not there, for frames that have numbers.", min=0.001
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of all questions: train, val, test.", show_default="as the file says"),
    ] = None,
) -> None:
    """Turn the annotation file of a published data set into a file of questions; exit with 1 if any is left out."""
    from vot_kernels.data.questions import convert_questions
    from vot_kernels.pipelines.progress import meter

    with meter("converting") as progress:
        done = convert_questions(
            form,
            source,
            out,
            lambda reason: print(reason, file=sys.stderr),
            videos=videos,
            suffix=suffix,
            names=names,
            fps=fps,
            split=split,
            progress=progress,
        )
    print(f"{out}: {done.questions:,} questions of {done.records:,} records; {done.left_out:,} left out.")
    if done.left_out:
        raise typer.Exit(1)
