"""Launch parameters of the Triton kernels: a pure, cached lookup in the JSON files beside this one.

`configs/<arch>/<op>.json` maps the name of a kernel to its entries, the first that fits wins:

    {"kernel_name": [{"when": {"head_dim": 64, "bits": [16, 32]}, "blocks": {"BLOCK_T": 64},
                      "num_warps": 4, "num_stages": 3,
                      "limits": {"registers": 168, "spill_bytes": 0, "wgmma": true}}]}

`when` holds what the entry is for: a number, or [smallest, largest]; what it does not name may be anything.
`blocks` become constexprs of the kernel. `limits` are what ahead-of-time compilation must keep to
(`python -m benchmarks.aot`). The number of tokens is never a key: packings of any length share a kernel.
Nothing here depends on the environment or the home directory; `autotune` does, if asked to.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
INTERPRETER = "interpreter"  # small blocks, so that small shapes take the paths between blocks too


Table = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Request:
    """What a config was looked up for: the arguments of `lookup`, the key sorted by name."""

    op: str
    kernel: str
    arch: str
    key: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        blocks: its BLOCK_* and other tuned constexprs.
        num_warps, num_stages: as Triton means them.
        limits: what the compiled kernel must keep to: "registers", "spill_bytes", "wgmma", "tma",
            "warp_specialized".
        request: what it was looked up for; None if it was not.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    limits: Mapping[str, int | bool] = field(default_factory=dict)
    request: Request | None = field(default=None, compare=False, repr=False)

    def launch_options(self) -> dict[str, int]:
        """Keywords of a launch: the blocks, then num_warps and num_stages."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@lru_cache(maxsize=1024)
def _lookup(op: str, kernel: str, arch: str, key: tuple[tuple[str, int], ...]) -> Config:
    config = first_fitting(_table(op, nearest_arch(op, arch)), Request(op, kernel, arch, key))
    if config is None:
        path = CONFIGS / arch / f"{op}.json"
        raise LookupError(f"No config of {op}/{kernel} for {arch} fits {dict(key)}; see {path}.")
    return config


def first_fitting(table: Table, request: Request) -> Config | None:
    """The first config of `table` that fits."""
    wanted = dict(request.key)
    for entry in table.get(request.kernel, []):
        if all(_fits(wanted, name, allowed) for name, allowed in entry.get("when", {}).items()):
            limits = entry.get("limits", {})
            return Config(entry["blocks"], entry["num_warps"], entry["num_stages"], limits, request)
    return None


def lookup(op: str, kernel: str, arch: str, **key: int) -> Config:
    """The shipped config of `kernel` of `op` on `arch` ("sm_90", "interpreter", ...) for `key`.

    Raises:
        LookupError: no entry fits, or there is no table for the op at all.
    """
    return _lookup(op, kernel, arch, tuple(sorted(key.items())))


@lru_cache(maxsize=256)
def nearest_arch(op: str, arch: str) -> str:
    """`arch` if `op` has a table for it, else the nearest older one, else the oldest; warns once."""
    known = known_archs(op)
    if arch in known or arch == INTERPRETER:
        return arch
    if not known:
        raise LookupError(f"{op} has no configs in {CONFIGS}.")
    older = [name for name in known if _number(name) <= _number(arch)]
    found = older[-1] if older else known[0]
    warnings.warn(
        f"vot-kernels ships no {op} configs for {arch} and uses those of {found}; results are the same, "
        f"speed may not be. Add {CONFIGS.name}/{arch}/{op}.json to tune for this GPU.",
        stacklevel=2,
    )
    return found


def known_archs(op: str) -> tuple[str, ...]:
    """GPU architectures with a table for `op`, oldest first."""
    found = [path.parent.name for path in CONFIGS.glob(f"sm_*/{op}.json")]
    return tuple(sorted(found, key=_number))


def tables(arch: str) -> dict[str, Table]:
    """Every op's table for `arch`, as it lies in the files."""
    return {path.stem: _table(path.stem, arch) for path in sorted((CONFIGS / arch).glob("*.json"))}


@lru_cache(maxsize=256)
def _table(op: str, arch: str) -> Table:
    path = CONFIGS / arch / f"{op}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LookupError(f"{op} has no configs for {arch}: {path} is missing.") from None
    except json.JSONDecodeError as error:
        raise LookupError(f"{path} is not valid JSON: {error}.") from None


def _fits(wanted: Mapping[str, int], name: str, allowed: int | list[int]) -> bool:
    if name not in wanted:
        return False
    if isinstance(allowed, list):
        return allowed[0] <= wanted[name] <= allowed[1]
    return wanted[name] == allowed


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))
