"""Tuning at run time on the GPU in use, only if `VOT_AUTOTUNE=1` was set when this package was imported.

The first launch of a kernel for a key (family, kernel, variant, architecture, and what the entries' `when` may name)
then times candidates around the shipped config on its own arguments, and stores the fastest in
`<arch>/<family>.json` in `$VOT_TUNING_DIR`, by default ~/.cache/vot-kernels/tuning. Later runs with `VOT_AUTOTUNE=1`
read it from there. Without it no such file is read: the results of a program do not depend on the home directory.

The number of tokens is not part of the key, so the first call should have the usual size. Compiling some 15 candidates
takes 10 to 60 seconds per kernel. Nothing is tuned while a CUDA graph is captured, so warm up before. Other block
sizes sum in another order, so results may differ in their last bits from those of the shipped configs.

The files have the format of the shipped ones: to contribute their entries, put them in front of those in
`configs/<arch>/<family>.json`.
"""

import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vot_kernels.files import atomic_write
from vot_kernels.tuning import Config, Request, Table, as_config, fitting_entries

_WARPS = (4, 8)
_STAGES = (1, 2, 3, 4)
# A block of a matrix product has at least 16 rows and columns; kernels address at most 128 rows in 32 bits.
_MATRIX_BLOCKS = range(16, 128 + 1)


def shape_candidates(config: Config) -> Iterator[Config]:
    """Yield `config` with one block halved, doubled or unchanged, each with several numbers of warps, but not itself.

    Only blocks named BLOCK... change, because buffers have the size of one kernel's tiles and another kernel reads
    them.
    """
    shapes = [dict(config.blocks)]
    for name, block in config.blocks.items():
        if name.startswith("BLOCK"):
            shapes += [{**config.blocks, name: size} for size in _block_sizes(block)]
    for blocks in shapes:
        for warps in sorted({*_WARPS, config.num_warps}):
            if (blocks, warps) != (config.blocks, config.num_warps):
                yield replace(config, blocks=blocks, num_warps=warps, limits={})


def stage_candidates(config: Config) -> Iterator[Config]:
    """Yield `config` with other depths of software pipelining."""
    for stages in _STAGES:
        if stages != config.num_stages:
            yield replace(config, num_stages=stages, limits={})


def _block_sizes(block: int) -> list[int]:
    """Return half and twice a block size, where one for matrix products stays valid for them."""
    sizes = [size for size in (block // 2, 2 * block) if size]
    return [size for size in sizes if size in _MATRIX_BLOCKS] if block in _MATRIX_BLOCKS else sizes


class Tuner:
    """The tuned configs in a folder, and the search for more. Several threads may use it.

    Args:
        folder: holds `<arch>/<family>.json`; it is created on the first write.
        measure: returns the time in milliseconds of a function that launches a kernel.
    """

    def __init__(self, folder: Path, measure: Callable[[Callable[[], None]], float]):
        self._folder = folder
        self._measure = measure
        self._known: dict[Request, Config] = {}
        self._tables: dict[Path, Table | None] = {}
        self._lock = threading.Lock()

    def find(self, shipped: Config) -> Config | None:
        """Return the config to use in place of a shipped one, or None if there is none yet.

        An entry whose blocks have other names than the shipped one is for another version of the kernel and is
        ignored. If the file cannot be read, the result is the shipped config.
        """
        request = _request(shipped)
        if request not in self._known:
            table = self._table(request)
            found = shipped if table is None else _tuned(table, request)
            if found is None or set(found.blocks) != set(shipped.blocks):
                return None
            self._known[request] = found
        return self._known[request]

    def tune(self, shipped: Config, run: Callable[[Config], None]) -> Config:
        """Return the candidate with which `run`, which launches the kernel, is fastest; store it and report it on
        stderr.

        `run` is called many times, so the kernel must not read what it writes. Candidates that fail are skipped; an
        error of the shipped config is raised.
        """
        with self._lock:
            known = self.find(shipped)
            if known is not None:
                return known
            before = time = self._measure(partial(run, shipped))
            best = shipped
            for candidates in (shape_candidates, stage_candidates):
                for candidate in candidates(best):
                    found = self._time(candidate, run)
                    if found < time:
                        best, time = candidate, found
            self._known[_request(shipped)] = best
            self._write(best)
            _tell(shipped, before, best, time)
            return best

    def _time(self, candidate: Config, run: Callable[[Config], None]) -> float:
        try:
            return self._measure(partial(run, candidate))
        except Exception:  # the compiler and the driver raise many types for a config that does not fit
            return math.inf

    def _path(self, request: Request) -> Path:
        return self._folder / request.arch / f"{request.family}.json"

    def _table(self, request: Request) -> Table | None:
        """Return the contents of the file, read once; None, with a warning, if it cannot be used."""
        path = self._path(request)
        if path not in self._tables:
            try:
                self._tables[path] = _read(path)
            except (OSError, ValueError) as error:
                self._tables[path] = None
                warnings.warn(
                    f"{path} is not changed and the shipped configs are used: {error}.", stacklevel=2
                )
        return self._tables[path]

    def _write(self, config: Config) -> None:
        """Put the config first in its file, which another process may have changed since it was read."""
        request = _request(config)
        path, when = self._path(request), dict(request.key)
        try:
            table = _read(path)
            new = _entry(config, when)
            same = (new["when"], new.get("variant"))
            others = [
                x for x in table.get(request.kernel, []) if (x.get("when", {}), x.get("variant")) != same
            ]
            table[request.kernel] = [new, *others]
            with atomic_write(path) as temporary:
                temporary.write_text(_format(table), encoding="utf-8")
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{path} cannot be written, so the tuned config is used by this process only: {error}.",
                stacklevel=2,
            )


def gpu_milliseconds(run: Callable[[], None]) -> float:
    """Return the median time of `run` on the current stream by CUDA events, after a warm-up, with a cold L2 cache.

    Clearing the cache also lets the CPU run ahead, so that the time of short kernels excludes their launch.
    """
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


def _request(config: Config) -> Request:
    if config.request is None:
        raise ValueError(f"{config} cannot be tuned: it does not come from a lookup.")
    return config.request


def _tuned(table: Table, request: Request) -> Config | None:
    """Return the first fitting entry of the variant that was chosen without this table."""
    entries = fitting_entries(table, request.kernel, request.key)
    same = [entry for entry in entries if entry.get("variant") == request.variant]
    return as_config(same[0], request) if same else None


def _read(path: Path) -> Table:
    """Return the table in the file, empty if there is no file.

    Raises:
        ValueError: the file is not a table.
        OSError: the file cannot be read.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not _is_table(table):
        raise ValueError("it is not a table of entries like vot_kernels/tuning/configs/sm_90/*.json")
    return table


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
    numbers = [*blocks.values(), entry.get("num_warps"), entry.get("num_stages")]
    return all(isinstance(number, int) and number >= 0 for number in numbers) and all(
        map(_is_range, when.values())
    )


def _is_range(allowed: Any) -> bool:
    ends = allowed if isinstance(allowed, list) else [allowed] * 2
    return len(ends) == 2 and all(isinstance(end, int) for end in ends)


def _entry(config: Config, when: dict[str, int]) -> dict[str, Any]:
    variant: dict[str, Any] = {} if config.variant is None else {"variant": config.variant}
    entry: dict[str, Any] = {**variant, "when": when, "blocks": dict(config.blocks)}
    entry |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {**entry, "limits": dict(config.limits)} if config.limits else entry


def _format(table: Table) -> str:
    """Format one entry per line, as in the shipped files."""
    kernels = []
    for kernel, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _tell(shipped: Config, before: float, best: Config, after: float) -> None:
    request = _request(shipped)
    words = [] if request.variant is None else [request.variant]
    key = " ".join(words + [f"{name}={value}" for name, value in request.key])
    print(
        f"vot-kernels: {request.family}/{request.kernel} on {request.arch} ({key}): "
        f"{_words(shipped)}: {before:.4f} ms -> {_words(best)}: {after:.4f} ms, {before / after:.2f}x",
        file=sys.stderr,
    )


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.launch_options().items())


def tuner_from_environment() -> Tuner | None:
    """Return a tuner if VOT_AUTOTUNE is "1", for $VOT_TUNING_DIR or ~/.cache/vot-kernels/tuning; else None."""
    if os.environ.get("VOT_AUTOTUNE") != "1":
        return None
    folder = os.environ.get("VOT_TUNING_DIR") or os.path.expanduser("~/.cache/vot-kernels/tuning")
    return Tuner(Path(folder), gpu_milliseconds)


TUNER = (
    tuner_from_environment()
)  # a plain global, because code that torch.compile traces may not read the environment
