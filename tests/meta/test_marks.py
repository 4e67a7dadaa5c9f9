"""The rule for skipping tests."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.marks import why_skipped

HERE = {"interpreting": False, "triton": True, "gpu": False, "no_cpp": None}


@pytest.mark.parametrize(
    ("marks", "changed", "reason"),
    [
        ([], {}, None),
        (["slow"], {"triton": False}, None),
        (["gpu"], {}, "CUDA device"),
        (["gpu"], {"gpu": True}, None),
        (["interpreter"], {}, "TRITON_INTERPRET=1 python -m pytest -m interpreter"),
        (["interpreter"], {"interpreting": True}, None),
        (["interpreter"], {"interpreting": True, "triton": False}, "not installed"),
        (["interpreter", "gpu"], {"interpreting": True}, "CUDA device"),
        (["cpp"], {}, None),
        (["cpp"], {"no_cpp": "they are not compiled"}, "needs the C++ kernels: they are not compiled"),
        (["compiled"], {}, None),
        (["compiled"], {"interpreting": True}, "unset TRITON_INTERPRET"),
    ],
)
def test_reasons(marks, changed, reason):
    found = why_skipped(marks, **HERE | changed)
    assert found is None if reason is None else reason in found


def test_every_mark_is_explained():
    root = Path(__file__).parents[2]
    options = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    registered = {re.match(r"\w+", line)[0] for line in options["markers"]}
    section = (root / "CONTRIBUTING.md").read_text().partition("\n## Tests\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == registered


def test_files_for_the_interpreter_are_found_by_the_name_of_the_mark():
    """`pytest_ignore_collect` of the conftest looks for "interpreted", so no test may write the mark in full."""
    tests = Path(__file__).parents[1]
    spelled = re.compile(r"mark\.interpreter\b")
    assert [p.name for p in sorted(tests.rglob("*.py")) if spelled.search(p.read_text())] == ["marks.py"]
