"""Progress on stderr."""

import io
import sys

from vot_kernels.pipelines.progress import steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_empty_step_hides_the_spinner_and_frees_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with steps() as step:
        step("Looking")
        assert sys.stdout is not out  # what is printed now would go above the spinner, on stderr
        step("")
        assert sys.stdout is out
        print("Answer: left")
        step("Reading")
        assert sys.stdout is not out
    assert out.getvalue() == "Answer: left\n" and "Reading …" in terminal.getvalue()


def test_without_a_terminal_an_empty_step_is_no_line(capsys):
    with steps() as step:
        step("Looking")
        step("")
    assert capsys.readouterr().err == "Looking …\n"
