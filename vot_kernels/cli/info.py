"""`vot info`: what runs on this machine."""

import json
from typing import Annotated

import typer

from vot_kernels.cli.manners import nothing_is_kept, when_interrupted
from vot_kernels.extras import require


@when_interrupted(nothing_is_kept)
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
