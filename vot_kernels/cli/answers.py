"""An answer as lines on the terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer

EVIDENCE_LINES = 3  # shown without --verbose


def print_answer(
    result: "VideoAnswer",
    picture: Path | None,
    verbose: bool,
    kernels: Sequence[str] = (),
    *,
    anyway: bool = False,
) -> None:
    """Print the answer, then a few lines of evidence, or with `verbose` all of it, the steps and `kernels`.

    A clip that the checkpoint does not know has hints in place of evidence; `anyway` says that guesses were asked for.
    """
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(result.answer.headline(), markup=False, style="bold")
    if result.answer.warning is None:
        limit = None if verbose else EVIDENCE_LINES
        for line in result.evidence_lines()[:limit]:
            console.print(f"  {line}", markup=False)
    elif result.answer.choice is None:
        for hint in _hints(result, anyway):
            console.print(f"  {hint}", markup=False, style="dim")
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


def _hints(result: "VideoAnswer", anyway: bool) -> Iterator[str]:
    """Yield what else a user can do about a clip that has no answer."""
    if not anyway:
        yield "With --anyway, vot ask guesses all the same."
    elif not result.answer.candidates:
        yield "With --candidates 'ONE|ANOTHER', vot ask guesses one of them."
    yield "A video-language model that knows such clips: vot ask --vlm PATH."
