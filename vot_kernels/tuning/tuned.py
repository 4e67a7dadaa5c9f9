"""What `vot tune` has measured, kept for one GPU, one version of Triton and one state of the sources.

`$VOT_TUNING_DIR/<GPU>/triton-<version>-<sources>.json`, by default in ~/.cache/vot-kernels/tuned, holds tables like the
shipped ones, by family. With `VOT_TUNED=1` launches on that GPU use its entries before the shipped ones
(`vot_kernels.ops.launch`); otherwise nothing reads it, and the results of a program do not depend on the home
directory. Other block sizes sum in another order, so results may differ in their last bits.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vot_kernels.files import atomic_write
from vot_kernels.tuning import CONFIGS, Table, use

Tables = dict[str, Table]


def folder() -> Path:
    """Return the folder of all measurements."""
    return Path(os.environ.get("VOT_TUNING_DIR") or os.path.expanduser("~/.cache/vot-kernels/tuned"))


def path_for(gpu: str) -> Path:
    """Return the file for a GPU of this name, with this Triton and these sources."""
    name = re.sub(r"\W+", "-", gpu.lower()).strip("-")
    return folder() / name / f"triton-{_triton_version()}-{_sources()}.json"


def use_tuned(gpu: str, arch: str) -> bool:
    """Put the entries measured on `gpu`, if there are any, before the shipped ones of `arch`.

    A file that cannot be read is named in a warning, and the shipped configs are used.
    """
    path = path_for(gpu)
    try:
        tables = read(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used, the shipped configs are: {error}.", stacklevel=2)
        return False
    use(arch, tables)
    return bool(tables)


@cache
def use_tuned_once(gpu: str, arch: str) -> None:
    """Call `use_tuned` unless this process did so for this GPU, because every launch asks."""
    use_tuned(gpu, arch)


def read(path: Path) -> Tables:
    """Return the tables of a file, none if there is no file.

    Raises:
        ValueError: the file does not hold tables.
        OSError: the file cannot be read.
    """
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not isinstance(tables, dict) or not all(map(_is_table, tables.values())):
        raise ValueError("it does not hold tables of entries like vot_kernels/tuning/configs/sm_90/*.json")
    return tables


def write(path: Path, tables: Mapping[str, Table]) -> None:
    """Write the tables of a GPU."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@cache
def _sources() -> str:
    """Return a hash of the device code and of the shipped configs."""
    kernels = import_module("..kernels", __package__)
    digest = hashlib.sha256()
    for root in (*map(Path, kernels.__path__), CONFIGS):
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _is_table(table: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(entries, list) and all(map(_is_entry, entries)) for entries in table.values()
    )


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    blocks, when = entry.get("blocks"), entry.get("when", {})
    if not isinstance(blocks, dict) or not isinstance(when, dict):
        return False
    numbers = [
        *blocks.values(),
        entry.get("num_warps"),
        entry.get("num_stages"),
        entry.get("max_registers", 0),
    ]
    return all(isinstance(number, int) and number >= 0 for number in numbers) and all(
        map(_is_range, when.values())
    )


def _is_range(allowed: Any) -> bool:
    ends = allowed if isinstance(allowed, list) else [allowed] * 2
    return len(ends) == 2 and all(isinstance(end, int) for end in ends)
