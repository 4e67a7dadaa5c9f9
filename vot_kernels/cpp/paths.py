"""Where the sources and the compiled library lie, and how a library is known to belong to these sources."""

import hashlib
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

# The oldest torch that a library runs with, in the form that its headers want: 2.11.
TORCH_TARGET = "0x020b000000000000"

_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[1]
IN_CHECKOUT = (_CHECKOUT / "csrc").is_dir() and (_CHECKOUT / "pyproject.toml").is_file()


def source_folder() -> Path:
    """`csrc/` of a checkout, or the copy of it in an installed package."""
    return _CHECKOUT / "csrc" if IN_CHECKOUT else _HERE.parent / "csrc"


def package_folder() -> Path:
    """Where `VOT_BUILD_CPU=1 pip install` puts the library."""
    return _HERE / "lib"


def build_folder() -> Path:
    """Where `build` puts the library: in a checkout `build/cpp`, else a folder of the user's cache."""
    if IN_CHECKOUT:
        return _CHECKOUT / "build" / "cpp"
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "vot-kernels" / "cpp"


def sources() -> list[Path]:
    """Every file that the library is compiled from."""
    return sorted(path for path in source_folder().rglob("*") if path.suffix in (".h", ".cpp"))


@cache
def library_name() -> str:
    """A file name that no library of other sources, of another ABI or for another kind of processor has."""
    digest = hashlib.sha256(f"{TORCH_TARGET} {platform.machine()}".encode())
    for path in sources():
        digest.update(f"\0{path.relative_to(source_folder()).as_posix()}\0".encode() + path.read_bytes())
    return f"vot_kernels-{digest.hexdigest()[:16]}.so"


def stamp_of(library: Path) -> Path:
    """The file beside a library that says how it was made."""
    return library.with_suffix(".json")


def digest_of(library: Path) -> str:
    """Of a file's contents."""
    return hashlib.sha256(library.read_bytes()).hexdigest()


def read_stamp(library: Path) -> dict[str, Any]:
    """What `build` wrote down about a library: "sha256", "isas", "compiler".

    Raises:
        ValueError: the library is not the file that was written down.
        OSError: one of the two is not there.
    """
    stamp = json.loads(stamp_of(library).read_text(encoding="utf-8"))
    if not isinstance(stamp, dict) or stamp.get("sha256") != digest_of(library):
        raise ValueError("it is damaged")
    return stamp
