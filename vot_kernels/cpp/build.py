"""Compile the C++ kernels: `python -m vot_kernels.cpp`. It needs a C++17 compiler and torch's headers.

Each kernel file is compiled once per instruction set; the library chooses among them when it is loaded. Object files
are kept under a hash of all that goes into them, so that after a change only what it touched is compiled again.
"""

import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vot_kernels.cpp import paths
from vot_kernels.files import atomic_write

# Instruction sets and their options, the best one first. "generic" is whatever every processor of its kind has.
_AVX512 = ("-march=skylake-avx512", "-mprefer-vector-width=512")
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ISAS = {
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-march=x86-64-v3",),
    "generic": (),
}
# What a processor must have for them, as Linux calls it.
_NEEDED = {
    "amx": {*_AVX512_FLAGS, "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": {*_AVX512_FLAGS, "avx512_bf16"},
    "avx512": _AVX512_FLAGS,
    "avx2": {"avx2", "fma"},
}
_COMPILERS = ("c++", "g++", "clang++")
OPTIONS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # g++ 12 is wrong about the intrinsics of AVX-512
)


class CannotBuild(RuntimeError):
    """Why there is no library, in a sentence."""


@dataclass(frozen=True)
class Unit:
    """One run of the compiler: a source file with its options.

    Attributes:
        source: the file.
        label: tells it from other units of the same file, for instance the instruction set.
        options: words for the compiler.
    """

    source: Path
    label: str
    options: tuple[str, ...]


def default_isas() -> tuple[str, ...]:
    """The best that this machine runs and AVX2, to compare with; elsewhere "generic"."""
    flags = _processor_flags()
    runs = [isa for isa in ISAS if isa in _NEEDED and _NEEDED[isa] <= flags and _takes(ISAS[isa])]
    if runs[:1] == ["amx"] and not _lends_tiles():
        runs = runs[1:]
    return tuple(dict.fromkeys([*runs[:1], *runs[-1:]])) or ("generic",)


def portable_isas() -> tuple[str, ...]:
    """What a library for every processor of this kind has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("generic",)
    return tuple(isa for isa, options in ISAS.items() if _takes(options))


def _lends_tiles() -> bool:
    """Whether Linux lets this process use the registers of AMX, as `csrc/kernels/tiles.h` asks; sandboxes may not."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def _takes(options: Sequence[str]) -> bool:
    """Whether the compiler knows the options: those of AMX are younger than C++17."""
    try:
        run([*find_compiler(), *options, "-E", "-x", "c++", os.devnull])
    except CannotBuild:
        return not options
    return True


def build(folder: Path | None = None, isas: Sequence[str] | None = None) -> Path:
    """Compile what is missing, and return the library.

    Args:
        folder: where it is put; default `paths.build_folder()`.
        isas: names of `ISAS`; default `default_isas()`.

    Raises:
        ValueError: an instruction set is unknown.
        CannotBuild: there is no compiler or no torch, or the compiler failed.
        OSError: the folder cannot be written to.
    """
    if sys.platform != "linux":
        raise CannotBuild(f"The C++ kernels are for Linux, this is {sys.platform}.")
    folder = paths.build_folder() if folder is None else folder
    wanted = default_isas() if isas is None else tuple(isas)
    if unknown := [isa for isa in wanted if isa not in ISAS]:
        raise ValueError(f"The instruction set must be one of {', '.join(ISAS)}, got {unknown[0]!r}.")
    library = folder / paths.library_name()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not _is_built(library, wanted):
            _make(library, [isa for isa in ISAS if isa in wanted])
    return library


def find_compiler() -> list[str]:
    """The words that call it: those of CXX if that is set, else the first there is.

    Raises:
        CannotBuild: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(words[0]):
            return words
    missing = f"CXX={named[0]} was not" if named else f"none of {', '.join(_COMPILERS)} was"
    raise CannotBuild(f"The C++ kernels need a C++ compiler, and {missing} found.")


def kernel_units(isas: Sequence[str], options: Sequence[str] = ()) -> list[Unit]:
    """The kernels for each instruction set; they include nothing of torch."""
    return [
        Unit(path, isa, (f"-DVOT_ISA={isa}", *ISAS[isa], *options))
        for path in _sources("kernels")
        for isa in isas
    ]


def binding_units(isas: Sequence[str], torch: Path) -> list[Unit]:
    """What joins the kernels to the torch in folder `torch`."""
    options = (
        f"-DTORCH_TARGET_VERSION={paths.TORCH_TARGET}",
        f"-DVOT_ISAS(X)={' '.join(f'X({isa})' for isa in isas)}",
        f"-I{torch / 'include'}",
        f"-I{torch / 'include/torch/csrc/api/include'}",
    )
    return [Unit(path, "bindings", options) for path in _sources("bindings")]


def compile_units(units: Sequence[Unit], folder: Path) -> list[Path]:
    """Their object files, as many at a time as there are cores. What `folder` has of an earlier run is used again.

    Raises:
        CannotBuild: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(unit: Unit) -> Path:
        command = [*compiler, *OPTIONS, *unit.options]
        result = folder / f"{unit.source.stem}-{unit.label}-{_digest(unit.source, [version, *command])}.o"
        if not result.exists():
            with atomic_write(result) as draft:
                run([*command, "-c", str(unit.source), "-o", str(draft)])
        return result

    version = compiler_version()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compiled, units))


def compiler_version() -> str:
    """The first line of what it says of itself."""
    return run([*find_compiler(), "--version"]).partition("\n")[0]


def run(command: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        CannotBuild: it failed; the message has its first error.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"status {result.returncode}"]
        error = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{command[0]} failed: {error.strip()}.")
    return result.stdout


def _is_built(library: Path, isas: Sequence[str]) -> bool:
    try:
        return set(isas) <= set(paths.read_stamp(library)["isas"])
    except (OSError, ValueError, KeyError):
        return False


def _make(library: Path, isas: Sequence[str]) -> None:
    torch = _torch_folder()
    units = [*kernel_units(isas), *binding_units(isas, torch)]
    objects = compile_units(units, library.parent / "objects")
    with atomic_write(library) as draft:
        links = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        run([*find_compiler(), "-shared", *map(str, objects), "-o", str(draft), *links])
    stamp = {"sha256": paths.digest_of(library), "isas": list(isas), "compiler": compiler_version()}
    with atomic_write(paths.stamp_of(library)) as draft:
        draft.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    _remove_others(library, objects)


def _sources(folder: str) -> list[Path]:
    return [path for path in paths.sources() if path.suffix == ".cpp" and path.parent.name == folder]


def _digest(source: Path, words: Sequence[str]) -> str:
    """Of a source, the headers that it may include, and the compiler with its options."""
    digest = hashlib.sha256("\0".join(words).encode())
    folders = {source.parent, paths.source_folder() / "kernels"}
    for path in [source, *sorted(header for folder in folders for header in folder.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remove_others(library: Path, objects: Sequence[Path]) -> None:
    """In a checkout, what was compiled from other sources is of no use any more; installed versions share a folder."""
    others = set(library.parent.glob("objects/*.o")) - set(objects)
    if library.parent == paths.build_folder() and paths.IN_CHECKOUT:
        others |= set(library.parent.glob("vot_kernels-*")) - {library, paths.stamp_of(library)}
    for path in others:
        path.unlink(missing_ok=True)


def _torch_folder() -> Path:
    spec = find_spec("torch")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(
            "The C++ kernels need torch's headers, and torch is not installed "
            "(pip builds without it unless told --no-build-isolation)."
        )
    return Path(spec.submodule_search_locations[0])


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While another process builds there, wait: it may well build the same."""
    import fcntl  # not everywhere

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
