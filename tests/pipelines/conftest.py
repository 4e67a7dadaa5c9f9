"""What the tests of commands share."""

import sys

import pytest

from vot_kernels import cli


@pytest.fixture
def vot(monkeypatch, capsys):
    """Run `vot ...`; return (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vot", *words])
        capsys.readouterr()  # what fixtures wrote
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
