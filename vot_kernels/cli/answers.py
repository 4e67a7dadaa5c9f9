"""An answer as lines on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer

EVIDENCE_LINES = 3  # shown without --verbose


def print_answer(
    result: "VideoAnswer", picture: Path | None, verbose: bool, kernels: Sequence[str] = ()
) -> None:
    """Print the answer, then a few lines of evidence, or with `verbose` all of it, the steps and `kernels`."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(result.answer.headline(), markup=False, style="bold")
    if result.answer.warning is None:
        limit = None if verbose else EVIDENCE_LINES
        for line in result.evidence_lines()[:limit]:
            console.print(f"  {line}", markup=False)
    elif result.answer.choice is None:
        console.print("  With --anyway, vot ask guesses all the same.", style="dim")
        console.print("  A video-language model that knows such clips: vot ask --vlm PATH.", style="dim")
    if verbose:
        lines = [result.clip.info.describe()]
        if result.read is not None:
            lines.append(f"The answer is from a closer look. {result.read.info.describe()}")
        lines.append(f"The scene graph was seen by {result.sight.eyes}.")
        if result.sight.issues:
            lines.append(f"Its text had {len(result.sight.issues)} issues.")
        for line in (*lines, *result.answer.summary().splitlines()[:-1], *kernels):
            console.print(line, markup=False, style="dim")
    else:
        for note in result.clip.info.warnings:
            console.print(f"Note: {note}", markup=False)
    if picture is not None and picture.exists():
        console.print(f"Picture: {picture}", markup=False)
