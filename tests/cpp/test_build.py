"""Compiling: what is done again and what is not, and what is said where it cannot be done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vot_kernels.cpp import build, paths
from vot_kernels.cpp.__main__ import main

# It copies its last source into what it makes, so that a test sees what went in, and notes down each call.
COMPILER = """#!/usr/bin/env bash
echo "$*" >> {calls}
case "$*" in
    *--version) echo "a compiler 1.0"; exit ;;
    *"$FAIL"*) echo "x.cpp:1:1: error: no such thing" >&2; exit 1 ;;
esac
while [ $# -gt 0 ]; do case "$1" in -o) shift; out=$1 ;; -c) shift; in=$1 ;; esac; shift; done
cat ${{in:-/dev/null}} > $out
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A script in place of the compiler; what it was called for."""
    program, calls = tmp_path / "compiler", tmp_path / "calls"
    program.write_text(COMPILER.format(calls=calls))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", f"{program} -flag")
    monkeypatch.setenv("FAIL", "nothing fails")

    def called() -> list[str]:
        lines = [line for line in calls.read_text().splitlines() if "--version" not in line]
        calls.write_text("")
        return lines

    calls.write_text("")
    return called


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, which a test may change."""
    folder = shutil.copytree(paths.source_folder(), tmp_path / "csrc")
    monkeypatch.setattr(paths, "source_folder", lambda: folder)
    paths.library_name.cache_clear()
    yield folder
    paths.library_name.cache_clear()


def named(calls: list[str]) -> list[str]:
    """File and instruction set of each call that compiled something; "link" for the others."""
    found = []
    for call in calls:
        words = call.split()
        source = Path(words[words.index("-c") + 1]).name if "-c" in words else "link"
        found.append(" ".join([source, *(word[10:] for word in words if word.startswith("-DVOT_ISA="))]))
    return sorted(found)


def test_each_kernel_is_compiled_for_each_instruction_set(compiler, tmp_path):
    library = build.build(tmp_path / "out", ["avx2", "generic"])
    kernels = [path.name for path in (paths.source_folder() / "kernels").glob("*.cpp")]
    others = [path.name for path in (paths.source_folder() / "bindings").glob("*.cpp")]
    calls = compiler()
    assert named(calls) == sorted(
        ["link", *others, *(f"{k} {isa}" for k in kernels for isa in ("avx2", "generic"))]
    )
    assert all("-flag -std=c++17 -O3" in call for call in calls if " -c " in call)
    assert all("-march=x86-64-v3" in call for call in calls if "VOT_ISA=avx2" in call)
    assert paths.read_stamp(library)["isas"] == ["avx2", "generic"]
    assert [path.name for path in library.parent.glob("*.so")] == [paths.library_name()]


def test_what_is_there_is_not_compiled_again(compiler, sources, tmp_path):
    folder = tmp_path / "out"
    library = build.build(folder, ["avx2"])
    compiler()
    assert build.build(folder, ["avx2"]) == library and compiler() == []
    build.build(folder, ["generic", "avx2"])
    assert {name.split()[-1] for name in named(compiler())} - {"link"} == {"generic", "choice.cpp"} | {
        path.name for path in (sources / "bindings").glob("*.cpp")
    }
    library.write_bytes(b"damaged")
    build.build(folder, ["generic", "avx2"])
    assert named(compiler()) == ["link"] and paths.read_stamp(library)


def test_a_change_compiles_what_it_touches(compiler, sources, tmp_path):
    library = build.build(tmp_path / "out", ["avx2"])
    compiler()
    (sources / "kernels" / "dense_residual.cpp").open("a").write("// changed\n")
    paths.library_name.cache_clear()
    changed = build.build(tmp_path / "out", ["avx2"])
    assert changed.name != library.name
    assert named(compiler()) == ["dense_residual.cpp avx2", "link"]


def test_a_failing_compiler_leaves_no_library(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "dense_residual.cpp")
    monkeypatch.setattr(paths, "build_folder", lambda: tmp_path / "out")
    with pytest.raises(build.CannotBuild, match="compiler failed: x.cpp:1:1: error: no such thing."):
        build.build(isas=["avx2"])
    assert list((tmp_path / "out").glob("*.so")) == []
    assert main(["--isa", "avx2"]) == 1
    assert main(["--isa", "avx2", "--optional"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].endswith("no such thing. The ops run in PyTorch.")


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build.CannotBuild, match="CXX=no-such-compiler was not found"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match=r"none of c\+\+, g\+\+, clang\+\+ was found"):
        build.find_compiler()


def test_no_torch(monkeypatch, compiler, tmp_path):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(build.CannotBuild, match="torch is not installed .*--no-build-isolation"):
        build.build(tmp_path / "out", ["generic"])


def test_an_unknown_instruction_set(tmp_path, capsys):
    with pytest.raises(ValueError, match="must be one of amx, avx512_bf16, avx512, avx2, generic, got 'sse'"):
        build.build(tmp_path, ["sse"])
    with pytest.raises(SystemExit):
        main(["--isa", "sse"])


def test_the_instruction_sets_of_a_processor(monkeypatch):
    avx512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    amx = {"amx_tile", "amx_bf16", "avx512_bf16"}
    for flags, isas in (
        (avx512 | amx | {"avx2", "fma"}, ("amx", "avx2")),
        (avx512 | {"avx512_bf16", "avx2", "fma"}, ("avx512_bf16", "avx2")),
        (avx512 | {"avx2", "fma"}, ("avx512", "avx2")),
        ({"avx2", "fma"}, ("avx2",)),
        (set(), ("generic",)),
    ):
        monkeypatch.setattr(build, "_processor_flags", lambda flags=flags: flags)
        monkeypatch.setattr(build, "_takes", lambda options: True)
        monkeypatch.setattr(build, "_lends_tiles", lambda: True)
        assert build.default_isas() == isas
    monkeypatch.setattr(build, "_processor_flags", lambda: avx512 | amx | {"avx2", "fma"})
    monkeypatch.setattr(build, "_takes", lambda options: "-mamx-tile" not in options)  # as g++ 10
    assert build.default_isas() == ("avx512_bf16", "avx2")
    monkeypatch.setattr(build, "_takes", lambda options: True)
    monkeypatch.setattr(build, "_lends_tiles", lambda: False)  # as in some sandboxes
    assert build.default_isas() == ("avx512_bf16", "avx2")


def test_two_processes_build_once(compiler, tmp_path):
    code = "from pathlib import Path; from vot_kernels.cpp.build import build; build(Path({!r}), ['generic'])"
    command = [sys.executable, "-c", code.format(str(tmp_path / "out"))]
    processes = [subprocess.Popen(command, env=os.environ) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert named(compiler()).count("link") == 1
