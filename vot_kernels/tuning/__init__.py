"""Launch parameters of the Triton kernels: a pure, cached lookup in the JSON files of this folder.

`configs/<arch>/<family>.json`, one for each folder of `kernels/triton` that has launchers, maps the name of a kernel
to its entries. The first entry that fits is used:

    {"kernel_name": [{"variant": "tma", "default": false, "why": "slower below 2,000 tokens",
                      "when": {"head_dim": 64, "bits": [16, 32]}, "blocks": {"BLOCK_T": 64, "USE_TMA": 1},
                      "num_warps": 4, "num_stages": 3,
                      "limits": {"registers": 168, "spill_bytes": 0, "tma": true}}]}

* `when`: the conditions of the entry, each a number or [smallest, largest]. A key that it does not name may have any
  value. The number of tokens is never a key: packings of any length share a kernel.
* `blocks`: constexprs of the kernel.
* `max_registers`: of a thread, so that more blocks fit on an SM. What does not fit is spilled, which may be allowed
  outside of the loops with matrix products: `limits` then has "spill_bytes".
* `limits`: what ahead-of-time compilation checks (`python -m benchmarks.aot`). Unless they are among the limits, it
  allows no "spill_bytes" and no spills in loops with matrix products ("local_in_loops"). "tensor_work" above 1 means
  that several warps compute the same product, or that its instructions are narrow.
* `variant`: the name of another form of the kernel, such as "tma", "warp_specialized" and "fused" of range attention.
  With `"default": true` ordinary launches use the entry; with false only those that ask for the variant do. Changing
  this one word makes it the default of a GPU. An entry without a variant is the plain kernel, always a default.
* `why`: the reason for a choice, in words. No code reads it.

Nothing here depends on the environment or the home directory. What `vot tune` has measured on a GPU is used only if it
is asked for: see `tuned`.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
INTERPRETER = "interpreter"  # small block sizes, so that small shapes reach the paths between blocks too


Entry = dict[str, Any]
Table = dict[str, list[Entry]]


@dataclass(frozen=True)
class Request:
    """The arguments with which a config was looked up.

    Attributes:
        family, kernel, arch: the arguments of `lookup`.
        key: the key of the lookup, sorted by name.
        variant: variant of the entry that was found, None for the plain kernel.
    """

    family: str
    kernel: str
    arch: str
    key: tuple[tuple[str, int], ...]
    variant: str | None = None


@dataclass(frozen=True)
class Config:
    """The launch parameters of one kernel.

    Attributes:
        blocks: its BLOCK_* and other tuned constexprs.
        num_warps, num_stages: as in Triton.
        limits: what the compiled kernel must satisfy: "registers", "spill_bytes", "shared_bytes", "local_in_loops",
            "tensor_work", "wgmma", "tcgen05", "tma", "warp_specialized".
        request: the lookup that found it; None if there was none.
        max_registers: of a thread, which the compiler then keeps to by spilling; None leaves it to the compiler.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    limits: Mapping[str, int | float | bool] = field(default_factory=dict)
    request: Request | None = field(default=None, compare=False, repr=False)
    max_registers: int | None = None

    @property
    def variant(self) -> str | None:
        """The name of the kernel's form, None for the plain one."""
        return None if self.request is None else self.request.variant

    def launch_options(self) -> dict[str, int]:
        """The keywords of a launch: the blocks, then those of `compiler_options`."""
        return {**self.blocks, **self.compiler_options()}

    def compiler_options(self) -> dict[str, int]:
        """The keywords that are for Triton's compiler, not for the kernel."""
        bound = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **bound}


def lookup(
    family: str,
    kernel: str,
    arch: str,
    *,
    prefer: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    **key: int,
) -> Config:
    """Return the shipped config of `kernel` of `family` on `arch` ("sm_90", "interpreter", ...) for `key`.

    Args:
        prefer: variants to use, whether default or not. The first of them that has a fitting entry is used, and if
            none has, the first fitting entry that is a default.
        exclude: variants not to use by default.

    Raises:
        LookupError: no entry fits, or there is no table for the family.
    """
    wanted = prefer
    if _preferred:
        wanted += tuple(variant for variant in _preferred if variant not in exclude)
    return _lookup(family, kernel, arch, wanted, exclude, tuple(key.items()))


_preferred: tuple[str, ...] = ()  # of all lookups
_first: dict[tuple[str, str], Table] = {}  # by (arch, family): entries that come before the shipped ones
_changes = 0  # of `_first`


@contextmanager
def preferring(*variants: str) -> Iterator[None]:
    """Prefer these variants in every lookup inside, on all threads, unless the caller of a lookup excludes them."""
    global _preferred
    before, _preferred = _preferred, variants
    try:
        yield
    finally:
        _preferred = before


@contextmanager
def using(arch: str, tables: Mapping[str, Table]) -> Iterator[None]:
    """Call `use` for the lookups inside, on all threads."""
    before = dict(_first)
    try:
        use(arch, tables)
        yield
    finally:
        _replace(before)


def use(arch: str, tables: Mapping[str, Table]) -> None:
    """Put these entries, by family, before the shipped ones of `arch`, in place of those of an earlier call."""
    others = {place: table for place, table in _first.items() if place[0] != arch}
    _replace(others | {(arch, family): table for family, table in tables.items()})


def state() -> tuple[object, ...]:
    """Return what the outcome of all lookups depends on, beyond their arguments."""
    return _preferred, _changes


def _replace(first: Mapping[tuple[str, str], Table]) -> None:
    global _changes
    _changes += 1
    _first.clear()
    _first.update(first)
    _lookup.cache_clear()


def variants(family: str) -> tuple[str, ...]:
    """Return the names of all variants of the kernels of a family, on any GPU, sorted."""
    entries = (entry for arch in known_archs(family) for es in _table(family, arch).values() for entry in es)
    return tuple(sorted({entry["variant"] for entry in entries if "variant" in entry}))


def candidates(request: Request, most: int = 6) -> list[Entry]:
    """Return the shipped entries that a kernel may use for a request, of all variants; the first is its default.

    Entries with the same launch parameters are one. There are at most `most`.
    """
    table = _table(request.family, nearest_arch(request.family, request.arch))
    found = fitting_entries(table, request.kernel, request.key)
    found.sort(key=lambda entry: not entry.get("default", True))  # stable: the tables' order otherwise
    distinct = {
        (entry.get("variant"), *sorted(as_config(entry, request).launch_options().items())): entry
        for entry in reversed(found)
    }
    return [*reversed(distinct.values())][:most]


@lru_cache(maxsize=1024)
def _lookup(
    family: str,
    kernel: str,
    arch: str,
    prefer: tuple[str, ...],
    exclude: tuple[str, ...],
    key: tuple[tuple[str, int], ...],
) -> Config:
    key = tuple(sorted(key))
    fitting = fitting_entries(_first.get((arch, family), {}), kernel, key)
    fitting += fitting_entries(_table(family, nearest_arch(family, arch)), kernel, key)
    chosen = [entry for variant in prefer for entry in fitting if entry.get("variant") == variant]
    chosen += [
        entry for entry in fitting if entry.get("default", True) and entry.get("variant") not in exclude
    ]
    if not chosen:
        path = CONFIGS / arch / f"{family}.json"
        raise LookupError(f"No config of {family}/{kernel} for {arch} fits {dict(key)}; see {path}.")
    return as_config(chosen[0], Request(family, kernel, arch, key, chosen[0].get("variant")))


def fitting_entries(table: Table, kernel: str, key: tuple[tuple[str, int], ...]) -> list[Entry]:
    """Return the entries of `kernel` for `key`, of any variant."""
    wanted = dict(key)
    return [
        entry
        for entry in table.get(kernel, [])
        if all(_fits(wanted, name, allowed) for name, allowed in entry.get("when", {}).items())
    ]


def as_config(entry: Entry, request: Request) -> Config:
    """Return the config that an entry of a table describes."""
    limits = entry.get("limits", {})
    sizes = entry["blocks"], entry["num_warps"], entry["num_stages"]
    return Config(*sizes, limits, request, entry.get("max_registers"))


# KiB of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications per compute
# capability). An entry for one GPU does not fit on another one with less, whatever their ages.
SHARED_KIB = {
    **{"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_88": 99, "sm_89": 99, "sm_90": 227},
    **{"sm_100": 227, "sm_101": 227, "sm_103": 227, "sm_110": 227, "sm_120": 99, "sm_121": 99},
}
_TWINS = {"sm_86": "sm_89", "sm_121": "sm_120"}  # they share a table, because their SMs hardly differ


def shared_kib(arch: str) -> int:
    """Return the KiB of shared memory that a block may have; of an unknown GPU, the least of the known newer ones."""
    return SHARED_KIB.get(arch, 99)


@lru_cache(maxsize=256)
def nearest_arch(family: str, arch: str) -> str:
    """Return the architecture whose table of `family` serves `arch`, and warn once if that is not its own.

    It is the newest of the older ones with no more shared memory per block, else the one with the least.
    """
    known = known_archs(family)
    if arch in known or arch == INTERPRETER:
        return arch
    if not known:
        raise LookupError(f"{family} has no configs in {CONFIGS}.")
    if _TWINS.get(arch) in known:
        return _TWINS[arch]
    fitting = [name for name in known if shared_kib(name) <= shared_kib(arch)]
    older = [name for name in fitting if _number(name) <= _number(arch)]
    found = (older[-1:] or fitting[:1] or [min(known, key=lambda name: (shared_kib(name), _number(name)))])[0]
    warnings.warn(
        f"vot-kernels ships no {family} configs for {arch} and uses those of {found}; results are the same, "
        f"speed may not be. Add {CONFIGS.name}/{arch}/{family}.json to tune for this GPU.",
        stacklevel=2,
    )
    return found


def smaller(config: Config) -> Iterator[Config]:
    """Yield configs to try if the GPU lacks the resources for `config`, ever smaller ones, for the same lookup.

    They are those of the tables of GPUs with less shared memory, then `config` itself with fewer stages. The block
    sizes that a launcher relies on besides its grid, whose names begin with TILE, stay as they are.
    """
    if config.request is not None:
        request = config.request
        here = shared_kib(nearest_arch(request.family, request.arch))
        below = [name for name in known_archs(request.family) if shared_kib(name) < here]
        for arch in sorted(below, key=lambda name: (-shared_kib(name), -_number(name))):
            for entry in fitting_entries(_table(request.family, arch), request.kernel, request.key):
                if entry.get("variant") == request.variant and _tiles(entry["blocks"]) == _tiles(
                    config.blocks
                ):
                    yield as_config(entry, request)
                    break
    for stages in range(config.num_stages - 1, 0, -1):
        yield replace(config, num_stages=stages)


def _tiles(blocks: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in blocks.items() if name.startswith("TILE")}


def known_archs(family: str) -> tuple[str, ...]:
    """Return the GPU architectures with a table for `family`, oldest first."""
    found = [path.parent.name for path in CONFIGS.glob(f"sm_*/{family}.json")]
    return tuple(sorted(found, key=_number))


def tables(arch: str) -> dict[str, Table]:
    """Return every family's table for `arch`, as stored in the files."""
    return {path.stem: _table(path.stem, arch) for path in sorted((CONFIGS / arch).glob("*.json"))}


@lru_cache(maxsize=256)
def _table(family: str, arch: str) -> Table:
    path = CONFIGS / arch / f"{family}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LookupError(f"{family} has no configs for {arch}: {path} is missing.") from None
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
