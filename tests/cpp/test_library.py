"""The library is found, checked and loaded, or there is one sentence why not, and the ops run in PyTorch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.marks import cpp
from vot_kernels.cpp import library as module
from vot_kernels.cpp import paths
from vot_kernels.cpp.library import Library, kernels, library, why_not_cpp
from vot_kernels.ops.dense_residual import dense_residual
from vot_kernels.ops.dispatch import describe_backends, select

COMMAND = "python -m vot_kernels.cpp compiles"
SUM = (
    "import torch\n"
    "from vot_kernels import *\n"
    "from vot_kernels.cpp.library import library\n"
    "assert library.cache_info().currsize == 0 and not torch.ops.loaded_libraries\n"
    "y = dense_residual([torch.ones(3)] * 2, torch.tensor([1.0, 2.0]))\n"
    "assert torch.equal(y, torch.full((3,), 3.0))\n"
    "print(library().problem)"
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder in place of those where a library is looked for, and a process that has not looked yet."""
    monkeypatch.setattr(paths, "build_folder", lambda: tmp_path)
    monkeypatch.setattr(paths, "package_folder", lambda: tmp_path / "none")
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def write(folder, content: bytes, name="", **stamp):
    path = folder / (name or paths.library_name())
    path.write_bytes(content)
    stamp = {"sha256": paths.digest_of(path), "isas": ["avx2"], "compiler": "c++"} | stamp
    paths.stamp_of(path).write_text(json.dumps(stamp))
    return path


def problem() -> str:
    """What is said, once `auto` has gone on to torch and "cpp" has been refused with the same words."""
    found = library().problem
    assert found is not None and "\n" not in found
    assert describe_backends("cpu")["dense_residual"]["cpp"] == [found]
    states = [torch.ones(3)]
    assert select("dense_residual", "auto", states[0]) == "torch"
    assert torch.equal(dense_residual(states, torch.ones(1)), states[0])
    with pytest.raises(ValueError, match="No backend can serve dense_residual"):
        dense_residual(states, torch.ones(1), backend="cpp")
    with pytest.raises(RuntimeError, match="The C\\+\\+ kernels cannot run"):
        kernels()
    return found


def test_no_library(elsewhere):
    assert problem() == f"the C++ kernels are not compiled; {COMMAND} them"


def test_a_library_of_other_sources(elsewhere):
    write(elsewhere, b"old", "vot_kernels-0123456789abcdef.so")
    assert problem() == f"the C++ kernels were compiled from other sources; {COMMAND} them"


@cpp
def test_a_truncated_library(elsewhere):
    whole = next((paths._CHECKOUT / "build" / "cpp").glob("vot_kernels-*.so")).read_bytes()
    path = write(elsewhere, whole)
    path.write_bytes(whole[: len(whole) // 2])
    assert "it is damaged" in problem() and f"{COMMAND} it again" in problem()


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(60)])
def test_a_file_that_is_no_library(elsewhere, content):
    write(elsewhere, content)
    assert "cannot be loaded" in problem()


@pytest.mark.parametrize("stamp", ["", "{}", "[]", "null", '{"sha256": 3'])
def test_a_stamp_that_says_nothing(elsewhere, stamp):
    path = write(elsewhere, b"anything")
    paths.stamp_of(path).write_text(stamp)
    assert "cannot be loaded" in problem()
    paths.stamp_of(path).unlink()
    library.cache_clear()
    assert "cannot be loaded" in problem()


def test_another_system(monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "darwin")
    library.cache_clear()
    assert library() == Library(None, "the C++ kernels are for Linux, this is darwin")
    library.cache_clear()


def test_other_devices_do_not_load_it(elsewhere):
    assert why_not_cpp("cuda") == "C++ kernels run on CPU tensors, not on cuda"
    assert library.cache_info().currsize == 0


@cpp
def test_the_environment_may_name_an_instruction_set_that_is_not_there():
    """And importing the package loads nothing."""
    environment = os.environ | {"VOT_CPU_ISA": "sse9"}
    printed = subprocess.run(
        [sys.executable, "-c", SUM], env=environment, capture_output=True, text=True, check=True
    )
    isas = ", ".join(library().isas)
    assert (
        printed.stdout
        == f"the C++ kernels are compiled for {isas}, and VOT_CPU_ISA=sse9 names none of them\n"
    )
