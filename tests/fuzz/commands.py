"""Wrong command lines: an exit status above 0 and an error in a sentence, never a traceback."""

import contextlib
import io
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.calls import Draw
from tests.fuzz.checks import WrongResult


def _files(folder: Path) -> dict[str, str]:
    """Paths by their fault."""
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    (folder / "folder").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "broken.jsonl").write_text('{"video": 3}\n{')
    names = ("empty.mp4", "text.mp4", "folder", "config.json", "broken.jsonl")
    return {name: str(folder / name) for name in names} | {
        "missing": str(folder / "missing.mp4"),
        "in a file": str(folder / "text.mp4" / "a.json"),
        "url": "https://example.org/a.mp4",
        "nothing": "",
        "null": "/dev/null",
    }


def command_line(draw: Draw, files: dict[str, str]) -> list[str]:
    """A command whose first file is wrong, so that it fails before any model is loaded."""

    def path() -> str:
        return files[draw.pick(sorted(files))]

    strange = draw.pick(["-1", "nan", "x", "", "999999999999999999999", "0", "--", "é"])
    return draw.pick(
        [
            ["ask", path(), draw.pick(["Who?", "", "?" * 3000])],
            ["ask", path(), "Who?", "--candidates", draw.pick(["", "|", "a", "a|a"])],
            ["ask", path(), "Who?", "--picture", path(), "--trace", path()],
            ["ask", path(), "Who?", "--frames", strange],
            ["ask", path(), "Who?", "--fps", strange, "--start", strange],
            ["ask", "--batch", path(), "--out", path()],
            ["ask"],
            ["encode", path(), "--out", path()],
            ["encode", path(), path(), "--out", path(), "--checkpoint", path()],
            ["encode"],
            ["train", "perception", "--steps", strange],
            ["train", draw.pick(["", "nothing", "encoder"]), "--steps", strange],
            ["eval", draw.pick(["", "nothing"]), "--out", path()],
            ["eval", "digitworld", "--out", files["in a file"], "--videos", strange],
            [draw.pick(["", "aks", "--nothing", "info"]), strange],
        ]
    )


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and all that a command printed, without a terminal."""
    from vot_kernels.cli import main

    said = io.StringIO()
    before, sys.argv = sys.argv, ["vot", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                main()
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return status, said.getvalue()


def check_command(draw: Draw) -> None:
    """One wrong command line.

    Raises:
        WrongResult: it succeeded, ended with a traceback, or did not say in words what was wrong.
    """
    with TemporaryDirectory() as folder:
        arguments = command_line(draw, _files(Path(folder)))
        shown = " ".join(arguments)[:200].replace(folder, "DIR")
        try:
            status, text = run(arguments)
        except BaseException as error:
            raise WrongResult(f"vot {shown}: {type(error).__name__}: {error}") from error
    helped = arguments[:1] in (["info"], [""])
    if status == 0 and not helped:
        raise WrongResult(f"vot {shown} ended with status 0: {text[-300:]}")
    if "Traceback" in text or re.search(r"\[Errno|NoneType|Error:.*Error:", text) or not text.strip():
        raise WrongResult(f"vot {shown} said: {text[-300:]}")
