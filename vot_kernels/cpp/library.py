"""The compiled C++ kernels, loaded when an op first asks for them: never at import, and never by compiling."""

import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vot_kernels.cpp import paths

_COMMAND = "python -m vot_kernels.cpp"


@dataclass(frozen=True)
class Library:
    """A library that was looked for.

    Attributes:
        path: of the file, None where there is none.
        problem: why it cannot be used, in a clause; None if it can.
        isa: the instruction set that runs, "" if none does.
        isas: those that were compiled, the best one first.
        compiler: that made it.
    """

    path: Path | None
    problem: str | None = None
    isa: str = ""
    isas: tuple[str, ...] = ()
    compiler: str = ""


def why_not_cpp(device_type: str) -> str | None:
    """Why the C++ kernels cannot take tensors on such a device, in a clause; None if they can.

    Loads the library when it is first asked for CPU tensors.
    """
    if device_type != "cpu":
        return f"C++ kernels run on CPU tensors, not on {device_type}"
    return library().problem


# What torch.compiler.assume_constant_result does, without importing the compiler: a traced call happens at once.
setattr(why_not_cpp, "_dynamo_marked_constant", True)  # noqa: B010


def kernels() -> Any:
    """The registered functions, `torch.ops.vot_kernels_cpp`.

    Raises:
        RuntimeError: they could not be loaded.
    """
    if (problem := library().problem) is not None:
        raise RuntimeError(f"The C++ kernels cannot run: {problem}.")
    return torch.ops.vot_kernels_cpp


@cache
def library() -> Library:
    """Look for the library and load it: once in a process, whatever comes of it. Never raises."""
    if sys.platform != "linux":
        return Library(None, f"the C++ kernels are for Linux, this is {sys.platform}")
    if not paths.source_folder().is_dir():
        return Library(None, "this copy of the package has no C++ sources")
    folders = (paths.build_folder(), paths.package_folder())
    for folder in folders:
        if (folder / paths.library_name()).is_file():
            return _load(folder / paths.library_name())
    stale = any(True for folder in folders for _ in folder.glob("vot_kernels-*.so"))
    state = "were compiled from other sources" if stale else "are not compiled"
    return Library(None, f"the C++ kernels {state}; {_COMMAND} compiles them")


def _load(path: Path) -> Library:
    try:
        stamp = paths.read_stamp(path)
        torch.ops.load_library(path)
        isa = torch.ops.vot_kernels_cpp.isa()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        return Library(path, f"{path} cannot be loaded ({reason}); {_COMMAND} compiles it again")
    known = Library(path, None, isa, tuple(stamp["isas"]), stamp["compiler"])
    if isa:
        return known
    wanted = os.environ.get("VOT_CPU_ISA")
    asked = f"VOT_CPU_ISA={wanted} names none of them" if wanted else "this processor runs none of them"
    return replace(known, problem=f"the C++ kernels are compiled for {', '.join(known.isas)}, and {asked}")
