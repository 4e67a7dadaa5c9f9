"""How `make` sets up the environment: order, reuse, reinstall on change, recovery from an interruption.

Scripts that record their calls replace Python and pip, so nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGET = ".venv/.package-installed"

PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *"-m venv --clear"*) echo "venv $*" >> calls; rm -rf .venv; mkdir -p .venv/bin; exit 0 ;;
    *"-m pip --python"*) echo "outer pip" >> calls ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
OLD_PYTHON = f"""#!/usr/bin/env bash
code='import sys; sys.version_info = (3, 9); sys.version = "3.9.2 (old)"; exec(sys.argv[1])'
exec {sys.executable} -c "$code" "$2"
"""
PIP = """#!/usr/bin/env bash
echo "pip $*" >> calls
case "$*" in *"$FAIL"*) exit 1 ;; esac
"""


REQUIREMENTS = ("requirements.txt", "requirements-data.txt", "requirements-torchvision.txt")


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", *REQUIREMENTS, "pyproject.toml", "setup.py"):
        date(shutil.copy(ROOT / name, tmp_path), seconds_ago=20)
    for name, source in (("python", PYTHON), ("old-python", OLD_PYTHON), ("pip", PIP)):
        (tmp_path / name).write_text(source)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(clone: Path, *, python="python", fail="nothing fails") -> tuple[int, list[str]]:
    """Return the exit status, and the recorded calls."""
    (clone / "calls").write_text("")
    result = run_make(clone, f"PYTHON=./{python}", "PIP=./pip", TARGET, fail=fail)
    return result.returncode, (clone / "calls").read_text().splitlines() + result.stderr.splitlines()


def run_make(clone: Path, *arguments: str, fail: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FAIL": fail}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True)


FULL = [
    "venv -m venv --clear .venv",
    "pip install --no-compile -r .venv/torch.txt",
    "pip install --no-compile -r requirements.txt",
    "pip install --no-compile --no-deps -r requirements-data.txt",
    "pip install --no-compile --no-deps --target .venv/torchvision -r requirements-torchvision.txt",
    "pip install --no-compile --quiet --no-deps --no-build-isolation --editable .",
]


def test_torch_comes_first_and_the_second_run_does_nothing(clone):
    assert make(clone) == (0, FULL)
    torch_line = (clone / ".venv/torch.txt").read_text()
    assert torch_line.startswith("torch==") and torch_line.count("\n") == 1
    assert make(clone) == (0, [])


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_changed_requirements_are_installed_into_the_same_environment(clone, name):
    make(clone)
    touch(clone / name)
    assert make(clone) == (0, FULL[1:])


def test_changed_metadata_reinstalls_the_package_alone(clone):
    make(clone)
    touch(clone / "pyproject.toml")
    assert make(clone) == (0, FULL[-1:])


@pytest.mark.parametrize("fail", ["torch.txt", *(f"-r {name}" for name in REQUIREMENTS)])
def test_an_interrupted_install_is_made_anew(clone, fail):
    status, calls = make(clone, fail=fail)
    assert status == 2 and fail in calls[-2]
    assert make(clone) == (0, FULL)


def test_an_interrupted_update_is_made_anew(clone):
    make(clone)
    touch(clone / "requirements.txt")
    assert make(clone, fail="-r requirements.txt")[0] == 2
    assert make(clone) == (0, FULL)


def test_a_python_without_ensurepip_borrows_pip_from_outside(clone):
    (clone / "python").write_text(PYTHON.replace("exit 0", '[[ "$*" == *--without-pip* ]]; exit $?'))
    assert make(clone)[1][:3] == [FULL[0], "venv -m venv --clear --without-pip .venv", "outer pip"]


def test_an_old_python_is_refused_in_one_sentence(clone):
    status, messages = make(clone, python="old-python")
    assert status == 2
    assert messages[0].startswith("vot-kernels needs Python 3.11 or later, ./old-python is 3.9.2;")


# `make test` and its two runs of pytest.

RUN = """#!/usr/bin/env bash
echo "${TRITON_INTERPRET:-0} $*" >> calls
echo "$* passed"
case "$*" in *"$FAIL"*) exit 1 ;; esac
"""
RUNS = ["1 interpreter and not gpu", "0 not interpreter and not gpu"]


@pytest.mark.parametrize(
    ("fail", "status"),
    [("nothing", 0), ("-m interpreter", 2), ("-m not interpreter", 2), ("check .", 2)],
)
def test_both_runs_of_pytest_take_place_and_either_fails_make(clone, fail, status):
    make(clone)
    for name in ("python", "ruff", "mypy"):
        (clone / ".venv/bin" / name).write_text(RUN)
        (clone / ".venv/bin" / name).chmod(0o755)
    (clone / "calls").write_text("")
    result = run_make(clone, "test", fail=fail)
    assert result.returncode == status
    first, *calls = [line for line in (clone / "calls").read_text().splitlines() if "-m pytest" in line]
    assert "--collect-only" in first, "which compiles the modules"
    assert [f"{line[0]} {line.partition(' -m pytest ')[2].partition('-m ')[2]}" for line in calls] == RUNS
    assert result.stdout.splitlines()[-1].endswith("passed")
    run_make(clone, "test", fail=fail)
    assert (clone / "calls").read_text().count("--collect-only") == 1, "modules are compiled once"


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    [phony] = [line.split()[1:] for line in text.splitlines() if line.startswith(".PHONY:")]
    printed = run_make(ROOT, "help", fail="").stdout
    listed = dict(line.split(maxsplit=1) for line in printed.splitlines()[1:])
    assert sorted(listed) == sorted(phony)


def test_matrix_has_a_venv_for_each_torch_and_the_oldest_is_the_oldest_allowed(clone):
    """Only the commands are tested, because the real run downloads gigabytes."""

    def commands(*arguments):
        result = run_make(clone, "-n", "matrix", *arguments, fail="")
        assert result.returncode == 0, result.stderr
        return result.stdout

    installs = re.findall(r"(\S+)/bin/python -m pip .*--upgrade (\S+)", commands())
    assert installs == [(".venv-matrix/2.11.0", "torch==2.11.0"), (".venv-matrix/newest", "torch")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"torch>=2.11", "triton>=3.6"} <= {line.split(";")[0] for line in project["dependencies"]}
    assert '"triton==3.6.*"' in commands("TORCH=2.11.0")
    newer = commands("TORCH=2.13.0")
    assert '"triton"' in newer
    assert re.findall(r'2\.13\.0/bin/python -m pytest .*?-m "(.*?)" tests/', newer) == [
        run[2:] for run in RUNS
    ]
    assert all((ROOT / path).exists() for path in re.findall(r"tests/\S+", newer))


def touch(path: Path) -> None:
    """Make `path` newer than the stamps, whatever the clock's resolution."""
    for stamp in path.parent.glob(".venv/.*-installed"):
        date(stamp, seconds_ago=10)
    date(path, seconds_ago=5)


def date(path: Path, seconds_ago: int) -> None:
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
