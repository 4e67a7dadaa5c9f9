"""`vot demo`: questions about two clips."""

from pathlib import Path
from typing import Annotated

import typer

from vot_kernels.cli.answers import print_answer
from vot_kernels.cli.manners import when_interrupted
from vot_kernels.cli.options import PATH, Device, Verbose
from vot_kernels.extras import require
from vot_kernels.files import check_output_folder


@when_interrupted(lambda given: f"the pictures and traces that are done are in {given['out']}.")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and traces.", **PATH)] = Path(
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
    with steps() as step:
        for result, picture in run_demo(out, step, device):
            step("")
            print(f"{result.clip.info.path}: {result.answer.question}")
            print_answer(result, picture, verbose)
            print(flush=True)
