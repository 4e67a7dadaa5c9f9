"""`vot demo`: questions about two clips, here or on a web page."""

import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from vot_kernels.cli.answers import print_answer
from vot_kernels.cli.manners import has_contents, nothing_is_kept, when_interrupted
from vot_kernels.cli.models import Models
from vot_kernels.cli.options import (
    PATH,
    Checkpoint,
    Detector,
    Device,
    Dtype,
    Llm,
    Objects,
    Verbose,
    Vlm,
    Window,
)
from vot_kernels.extras import require
from vot_kernels.files import check_output_folder


def _done(given: dict[str, Any]) -> str:
    if given["web"]:
        return "the page is closed; nothing was written."
    if not has_contents(given["out"]):
        return nothing_is_kept(given)
    return f"the pictures and traces that are done are in {given['out']}."


@when_interrupted(_done)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and traces.", **PATH)] = Path(
        "demo-output"
    ),
    web: Annotated[
        bool,
        typer.Option("--web", help="Serve a web page, to this machine alone, where you ask the questions."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            help="With --web: the port (default: the first free one from 7860 on).", min=1, max=65535
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    llm: Llm = None,
    vlm: Vlm = None,
    detector: Detector = None,
    objects: Objects = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    window: Window = None,
    verbose: Verbose = False,
) -> None:
    """Ask about a DigitWorld clip, which the checkpoint knows, and a natural clip, which it does not.

    With --web, the models are those that you give, as with vot ask.
    """
    if port is not None and not web:
        raise ValueError("--port is the port of the web page: give --web, too.")
    if not web and any((checkpoint, llm, vlm, detector, objects, window)):
        raise ValueError("The demo without --web has the bundled models: give --web, or ask with vot ask.")
    require("vot demo --web" if web else "vot demo", "video", "llm", *(["web"] if web else []))
    from vot_kernels.pipelines.sampling import check_device
    from vot_kernels.reasoning.reasoning import split_candidates

    check_device(device)
    if web:
        wanted = split_candidates(objects) or ()
        _serve(port, Models(checkpoint, llm, vlm, detector, wanted, device, dtype, window))
    else:
        check_output_folder(out)
        _print_answers(out, device, verbose)


def _print_answers(out: Path, device: str, verbose: bool) -> None:
    from vot_kernels.pipelines.demo import run_demo
    from vot_kernels.pipelines.progress import steps

    with steps() as step:
        for result, picture in run_demo(out, step, device):
            step("")
            by = f" ({result.answer.model})" if result.answer.model else ""
            print(f"{result.clip.info.path}: {result.answer.question}{by}")
            print_answer(result, picture, verbose)
            print(flush=True)


def _serve(port: int | None, models: Models) -> None:
    from vot_kernels.pipelines.demo import demo_questions
    from vot_kernels.pipelines.progress import steps

    models.check()
    with steps() as step:
        step(models.loading)
        from vot_kernels.pipelines.web import build, served

        page = build(models.load(), demo_questions())
    with served(page, port) as address:
        print(f"{address} answers questions until Ctrl-C.", flush=True)
        _forever()


def _forever() -> None:
    threading.Event().wait()
