"""The wheel and the sdist: built without torch and network, installed and imported from another folder."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest

from vot_kernels.cpp import paths
from vot_kernels.cpp.build import portable_isas
from vot_kernels.data.video import save_mp4

ROOT = Path(__file__).parents[2]
SOURCES = {"vot_kernels": "vot_kernels", "vot_kernels/csrc": "csrc", "vot_kernels/kernels": "kernels/triton"}
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo-output", "runs")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # What the test session exports for itself must not leak into the clean environment.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_of(folder: Path) -> set[str]:
    """Every file a user needs at run time, relative to `folder`."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory):
    """A folder that, on PYTHONPATH, makes `import torch` fail."""
    folder = tmp_path_factory.mktemp("no-torch")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')")
    return str(folder)


def build_wheel(source: Path, out: Path, without_torch: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source, PYTHONPATH=without_torch)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The sources as they are now, without the outputs of an earlier build."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "tree", ignore=IGNORED)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, tree, without_torch):
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(shutil.copytree(tree, folder / "tree"), folder / "out", without_torch)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory, tree, without_torch):
    folder = tmp_path_factory.mktemp("sdist")
    source = shutil.copytree(tree, folder / "tree")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder / "out"]
    run(*build, ".", cwd=source, PYTHONPATH=without_torch)
    [archive] = (folder / "out").glob("*.tar.gz")
    return archive


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_package_list_equals_the_disk(tree):
    found = {
        ".".join([prefix.replace("/", "."), *path.relative_to(tree / folder).parent.parts])
        for prefix, folder in SOURCES.items()
        for path in (tree / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp")
    }
    listed = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    wanted = "\n".join(f'    "{name}",' for name in sorted(found))
    assert listed == sorted(found), f"[tool.setuptools] packages in pyproject.toml should be\n{wanted}"


def test_every_folder_with_code_is_a_package(tree):
    folders = {path.parent for folder in SOURCES.values() for path in (tree / folder).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_the_wheel_holds_every_file_and_nothing_else(wheel, tree):
    installed = {name for name in contents(wheel) if ".dist-info/" not in name}
    wanted = {f"{prefix}/{name}" for prefix, folder in SOURCES.items() for name in files_of(tree / folder)}
    assert "vot_kernels/py.typed" in wanted
    assert installed == wanted


def test_the_wheel_is_pure_python_with_one_import_package(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {name.split("/")[0] for name in contents(wheel) if ".dist-info/" not in name} == {"vot_kernels"}


def test_a_wheel_with_kernels_is_for_this_processor_and_every_python(tree, tmp_path, monkeypatch):
    """A script in place of the compiler makes files, but none that could be loaded."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\necho fake'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("VOT_BUILD_CPU", "1")
    wheel = build_wheel(shutil.copytree(tree, tmp_path / "tree"), tmp_path / "out", "")
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    files = contents(wheel)
    [library] = [name for name in files if name.endswith(".so")]
    assert library == f"vot_kernels/cpp/lib/{paths.library_name()}"
    stamp = json.loads(files[library.replace(".so", ".json")])
    assert (
        stamp["isas"] == list(portable_isas())
        and stamp["sha256"] == hashlib.sha256(files[library]).hexdigest()
    )
    assert [name for name in files if name.endswith(".o")] == []


def test_metadata(wheel):
    files = contents(wheel)
    [name] = [name for name in files if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(files[name].decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert b"TERMS AND CONDITIONS" in files[name.replace("METADATA", "licenses/LICENSE")]
    extras = {
        "video",
        "llm",
        "train",
        "bench",
        "cli",
        "docs",
        "lmms",
        "vlm",
        "web",
        "rl",
        "ray",
        "dev",
        "all",
    }
    assert set(metadata.get_all("Provides-Extra")) == extras
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in core) == ["numpy", "torch", "triton"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload().strip(), "the README should be the long description"


def test_one_version(wheel):
    module = ast.parse((ROOT / "vot_kernels" / "__init__.py").read_text())
    [version] = [
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert wheel.name.startswith(f"vot_kernels-{version}-")


def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path, without_torch):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    again = build_wheel(source, tmp_path / "out", without_torch)
    assert contents(again) == contents(wheel)


def test_the_sdist_carries_its_tests(sdist, tree):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("tests", "benchmarks", "docs", "examples")
    wanted = {f"{folder}/{name}" for folder in folders for name in files_of(tree / folder)}
    wanted |= {path.name for path in tree.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert sorted(wanted - names) == []


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory, wheel):
    """A new virtual environment with the wheel, and this one's site-packages behind it for torch."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    [site] = folder.glob("venv/lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not run, an editable install's among them.
    behind = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(behind) + "\n")
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return python


def test_the_installed_package_works_from_another_folder(clean_python, tmp_path):
    code = (
        "import torch, vot_kernels, vot_kernels.kernels\n"
        "for module in (vot_kernels, vot_kernels.kernels): print(module.__file__)\n"
        "q = torch.ones(3, 1, 4)\n"
        "layout = vot_kernels.PackedLayout.from_lengths([2, 1])\n"
        "assert torch.allclose(vot_kernels.packed_attention(q, q, q, layout), q)"
    )
    lines = run(clean_python, "-c", code, cwd=tmp_path).splitlines()
    site = clean_python.parents[1] / "lib"
    assert len(lines) == 2
    assert all(Path(line).is_relative_to(site) for line in lines), lines


def test_the_installed_commands_work_from_another_folder(clean_python, tmp_path):
    assert "packed_attention" in run(clean_python, "-m", "vot_kernels.info", cwd=tmp_path)
    assert "ask" in run(clean_python.with_name("vot"), "--help", cwd=tmp_path)


def test_the_installed_command_line_looks_at_a_clip(clean_python, tmp_path):
    vot = clean_python.with_name("vot")
    assert "DigitWorld" in run(vot, "demo", "--help", cwd=tmp_path)
    assert "hybrid_attention" in run(vot, "info", cwd=tmp_path)
    save_mp4(tmp_path / "grey.mp4", np.full((8, 64, 64, 3), 128, np.uint8), 8)
    said = run(vot, "ask", "grey.mp4", "What is moving?", cwd=tmp_path)  # needs no language model
    assert "outside what the checkpoint knows" in said
