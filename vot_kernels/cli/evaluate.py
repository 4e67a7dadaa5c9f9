"""`vot eval`: one command per benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from vot_kernels.cli.manners import answers_are_kept, when_interrupted
from vot_kernels.cli.models import Models
from vot_kernels.cli.options import CHECKPOINT, GROUP, PATH, Checkpoint, Device, Llm, examples
from vot_kernels.extras import require
from vot_kernels.files import check_output

eval_app = typer.Typer(help="Measure accuracy on held-out videos.", **GROUP)


@eval_app.command("digitworld", epilog=examples("vot eval digitworld --out results.json --videos 100"))
@when_interrupted(answers_are_kept)
def eval_digitworld(
    out: Annotated[
        Path, typer.Option(help="JSON file for the results; an unfinished run is resumed.", **PATH)
    ],
    videos: Annotated[int, typer.Option(help="Held-out videos, one question each.")] = 300,
    when: Annotated[
        int,
        typer.Option(
            help="Held-out videos with a question of when, in a table of their own; the model of --vlm answers none."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the videos.")] = 0,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
    vlm: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a video-language checkpoint made by `vot train sft`, or digitworld-reader or "
            "digitworld-smollm2, which ship with the package.",
            **CHECKPOINT,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="What answers, repeatable: vlm, llm, rules, blind (default: all)."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="Held-out clips: test, val, held_out_pairs, five_objects, long or resolution."),
    ] = "test",
    device: Device = "cpu",
) -> None:
    """Accuracy per question type: model with and without VoT, rules on the STSG, blind baselines."""
    require("vot eval digitworld", "video", "llm", "train")
    check_output(out, ".json")
    from vot_kernels.models.checkpoint import VLM, checkpoint_kind

    Models(checkpoint, llm, device=device).check()
    if vlm is not None:
        checkpoint_kind(vlm, VLM)
    from vot_kernels.pipelines.evaluation import GROUPS, evaluate_digitworld, format_table

    answering = only or GROUPS
    result = evaluate_digitworld(
        out, videos, seed, checkpoint, llm, device, vlm=vlm, only=answering, when=when, split=split
    )
    print(format_table(result))


@eval_app.command(
    "calibrate", epilog=examples("vot eval calibrate results.rows.jsonl --checkpoint runs/perception/model")
)
def eval_calibrate(
    rows: Annotated[Path, typer.Argument(help="File of rows that `vot eval digitworld` wrote.", **PATH)],
    checkpoint: Checkpoint = None,
) -> None:
    """Fit the confidence of answers to how often they were right, and keep it beside the checkpoint."""
    require("vot eval calibrate", "train")
    from vot_kernels.pipelines.calibration import calibrate
    from vot_kernels.pipelines.sampling import checkpoint_folder

    fitted = calibrate(rows, checkpoint_folder(checkpoint))
    print(
        f"Fitted to {fitted.questions} answers: sigmoid({fitted.slope:.2f} * logit(raw) + {fitted.offset:.2f})."
    )
