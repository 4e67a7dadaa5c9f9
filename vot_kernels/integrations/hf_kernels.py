"""`python -m vot_kernels.integrations.hf_kernels OUT`: the ops as a kernel of the Hugging Face Hub.

The `kernels` package loads it from a folder or from the Hub, without an installation of this package and beside other
versions of it. So all imports become relative, and the ops are registered under a name made of what is exported. One
folder serves CUDA (Triton and PyTorch), another one CPUs; their sources are the same.

Source: https://huggingface.co/docs/kernels/kernel-requirements
"""

import argparse
import hashlib
import json
import os
import re
import sys
from base64 import b64encode
from importlib import import_module
from pathlib import Path
from typing import Any

from vot_kernels.files import new_folder

NAME = "vot-kernels"
VERSION = 0  # of the exported interface; the Hub reserves 0 for what may still change
BACKENDS: dict[str, dict[str, Any]] = {
    "cuda": {"type": "cuda", "archs": ["8.0+PTX"]},  # Triton compiles for the GPU that is there, from 8.0 on
    "cpu": {"type": "cpu"},
}
# The C++ kernels are compiled by their user, so a folder for all machines has what looks for them, and no sources.
_PARTS = ("packing.py", "files.py", "ops", "tuning", "cpp/__init__.py", "cpp/paths.py", "cpp/library.py")
_IMPORT = re.compile(r"^(\s*)from vot_kernels((?:\.\w+)*) import ", re.MULTILINE)
_OPS = '"vot_kernels::'


def export(out: str | os.PathLike[str]) -> Path:
    """Write the kernel; the folder is there as a whole or not at all.

    Args:
        out: the folder, which must not exist or be empty. It gets `build/torch-cuda` and `build/torch-cpu`.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: it can be neither written to nor made.
    """
    with new_folder(out) as draft:
        files = _files()
        for backend in BACKENDS:
            _write(draft / "build" / f"torch-{backend}", backend, files)
    return Path(out)


def _files() -> dict[str, str]:
    """The text of every exported file by its path, with relative imports."""
    package, device_code = (
        Path(import_module(name).__path__[0]) for name in ("vot_kernels", "vot_kernels.kernels")
    )
    found = {"__init__.py": _init(), "layers.py": _read(package / "integrations" / "layers.py", 0)}
    for root, parts, inside in ((package, _PARTS, ""), (device_code, (".",), "kernels/")):
        for path in (path for part in parts for path in _sources(root / part)):
            name = path.relative_to(root).as_posix()
            found[inside + name] = _read(path, (inside + name).count("/"))
    return dict(sorted(found.items()))


def _sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [file for suffix in ("*.py", "*.json") for file in path.rglob(suffix)]
    return [file for file in found if "__pycache__" not in file.parts]


def _read(path: Path, depth: int) -> str:
    """A file that lies so many folders below the top of the export."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    return _IMPORT.sub(lambda m: f"{m[1]}from {'.' * (depth + 1)}{m[2][1:]} import ", text)


def _init() -> str:
    """The public names of the package but for those that need transformers."""
    package = import_module("vot_kernels")
    places = {name: package._MODULES.get(name, f"ops.{name}") for name in package.__all__}
    public = {
        n: place for n, place in places.items() if not n.startswith("_") and "integrations" not in place
    }
    title = f'"""Kernels of vot-kernels {package.__version__}."""'
    imports = [f"from .{place} import {name}" for name, place in public.items()]
    listed = [f'    "{name}",' for name in ("layers", *public)]
    return "\n".join([title, "", "from . import layers", *imports, "", "__all__ = [", *listed, "]", ""])


def _write(folder: Path, backend: str, files: dict[str, str]) -> None:
    """One build: the files with the ops under a name of their own, and what `kernels` wants to know of them."""
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    name = f"_{NAME.replace('-', '_')}_{backend}_{content[:10]}"
    digests = {}
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        written = text.replace(_OPS, f'"{name}::').encode()
        target.write_bytes(written)
        digests[path] = b64encode(hashlib.sha256(written).digest()).decode()
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """The command; an error is one sentence on stderr and the exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vot_kernels.integrations.hf_kernels", description=__doc__
    )
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist or be empty")
    try:
        print(export(parser.parse_args().out))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
