"""`vot ablate`: each part of the system against what others do in its place."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vot_kernels.cli.manners import kept_in, when_interrupted
from vot_kernels.cli.options import CHECKPOINT, PATH
from vot_kernels.extras import require


def runs_are_kept(given: dict[str, Any]) -> str:
    out = given["out"]
    return kept_in("the runs so far", out.with_suffix(".rows.jsonl"), out.with_suffix(".runs"))


@when_interrupted(runs_are_kept)
def ablate(
    out: Annotated[Path, typer.Option(help="JSON file for the result; unfinished runs are resumed.", **PATH)],
    only: Annotated[list[str] | None, typer.Option(help="A part, repeatable (default: all).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of a run (default: each task's own).")
    ] = None,
    vlm: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a model of `vot train sft`, for graph tokens and reinforcement, or digitworld-reader.",
            **CHECKPOINT,
        ),
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of rows of `vot eval digitworld`, repeatable, for thought and verification.", **PATH
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for a picture.", **PATH)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs with parameters, operations and time.")
    ] = False,
) -> None:
    """Compare each part of the system with what others do in its place, on DigitWorld."""
    require("vot ablate", "video", "llm", "train")
    from vot_kernels.pipelines.ablation.run import Plan, choose_parts, plan_text, run_ablations
    from vot_kernels.pipelines.ablation.tasks.base import Sources

    sources = Sources(vlm, tuple(answers or ()))
    plan = Plan(choose_parts(only, sources), seeds, steps, sources)
    print(plan_text(plan) if dry_run else run_ablations(out, plan, plot))
