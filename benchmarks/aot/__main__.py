"""`python -m benchmarks.aot`: see `--help`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.aot.build import (
    Case,
    Job,
    Plan,
    Row,
    compile_all,
    make_plan,
    registered_kernels,
    unreached_kernels,
    unused_entries,
)
from benchmarks.aot.gpus import GPUS

if TYPE_CHECKING:
    from benchmarks.aot.compiler import Resources

INTERRUPTED = 130
COLUMNS = (
    *("kernel", "case", "key", "config", "registers", "spill bytes", "shared bytes", "matrix", "TMA"),
    *("instructions/kMAC", "tensor work", "barriers", "spills in loops"),
    *("blocks/SM (estimate)", "least us (estimate)", "limits"),
)


def main(arguments: Sequence[str] | None = None, own_cases: Sequence[Case] | None = None) -> int:
    """Compile `own_cases`, by default all of `benchmarks.aot.cases`, and print tables.

    Returns:
        0, 1 if something is wrong with a kernel, 2 for a bad option or machine, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        _check_machine()
        if options.json and options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder; name a file.")
        found = _all_cases() if own_cases is None else list(own_cases)
        archs = _pick("arch", options.arch, list(GPUS))
        ops = _pick("op", options.op, list(dict.fromkeys(case.op for case in found)))
        wanted = [case for case in found if case.op in ops and (case.quick or not options.quick)]
        plan = make_plan(wanted, archs)
        jobs = _with_kernel(plan.jobs, options.kernel)
    except ValueError as error:
        print(f"benchmarks.aot: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted before anything was compiled.", file=sys.stderr)
        return INTERRUPTED
    partial = options.op or options.kernel or options.quick or own_cases is not None
    problems = plan.problems + ([] if partial else _uncovered(plan, archs))

    complete = _compile(jobs, options.jobs)
    rows = [job.row for job in jobs if job.row.done]
    problems += [f"{row.title}: {sentence}." for row in rows for sentence in row.violations]
    if options.json:
        _write(options.json, rows, problems, complete)
    for arch in archs:
        print(render(arch, rows))
    for line in problems:
        print(f"FAILED {line}")
    print(f"{len(rows)} of {len(jobs)} kernels compiled, {len(problems)} problems.")
    if not complete:
        return INTERRUPTED
    return 1 if problems else 0


def render(arch: str, rows: Sequence[Row]) -> str:
    """Format the table of one architecture."""
    lines = [COLUMNS, *(_cells(row) for row in rows if row.arch == arch)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([f"{arch}; estimates are for one {GPUS[arch].name}", *text, ""])


def _cells(row: Row) -> tuple[str, ...]:
    names = (row.kernel.strip("_").removesuffix("_kernel"), f"{row.op} {row.cases[0]}", row.key, row.config)
    found = row.resources
    if found is None:
        return (*names, *["-"] * (len(COLUMNS) - len(names) - 1), "FAILED")
    return (
        *names,
        str(found.registers),
        str(found.spill_bytes),
        str(found.shared_bytes),
        found.matrix,
        "yes" if found.tma else "no",
        *_loop_cells(found),
        f"{row.blocks_per_sm} ({row.limited_by})",
        f"{row.least_us:.1f} ({row.bound})",
        "FAILED" if row.violations else "ok",
    )


def _loop_cells(found: "Resources") -> tuple[str, ...]:
    loop = found.loop
    if loop is None:
        return ("-",) * 4
    per_kmac = "-" if loop.instructions_per_kmac is None else f"{loop.instructions_per_kmac:.2f}"
    return per_kmac, f"{loop.tensor_work:.2f}", str(loop.barriers), str(found.local_in_loops)


def _compile(jobs: Sequence[Job], workers: int) -> bool:
    """Fill in the rows; return whether all of them were reached."""
    try:
        with _progress(len(jobs)) as advance:
            compile_all(jobs, workers, advance)
    except KeyboardInterrupt:
        print("Interrupted: what follows is not everything.", file=sys.stderr)
        return False
    return True


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """Yield a function to call with each of `total` rows; it moves a bar on a terminal with rich, or prints lines."""
    if sys.stderr.isatty() and find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("compiling", total=total)
            yield lambda row: bar.update(task, advance=1, description=f"{row.arch} {row.kernel}")
        return
    done = 0

    def advance(row: Row) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {row.title}", file=sys.stderr, flush=True)

    yield advance


def _all_cases() -> list[Case]:
    from benchmarks.aot.cases import cases

    return cases()


def _uncovered(plan: Plan, archs: Sequence[str]) -> list[str]:
    return [
        *unreached_kernels(plan.launched, registered_kernels()),
        *unused_entries(plan.launched, archs),
    ]


def _write(path: Path, rows: Sequence[Row], problems: Sequence[str], complete: bool) -> None:
    import triton

    from vot_kernels.files import atomic_write

    document = {
        "triton": triton.__version__,
        "complete": complete,
        "estimates_for": {arch: gpu.name for arch, gpu in GPUS.items()},
        "problems": list(problems),
        "kernels": [row.as_json() for row in rows],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _check_machine() -> None:
    if find_spec("triton") is None:
        raise ValueError("triton is not installed; on Linux x86-64 it comes with `pip install vot-kernels`.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled; unset it.")


def _pick(option: str, given: str | None, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")] if given else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--{option} {', '.join(map(repr, unknown))} is not known; known are {', '.join(known)}."
        )
    return [name for name in known if name in names]


def _with_kernel(jobs: Sequence[Job], part: str | None) -> list[Job]:
    found = [job for job in jobs if not part or part in job.row.kernel]
    if part and not found:
        known = ", ".join(sorted({job.row.kernel for job in jobs}))
        raise ValueError(f"--kernel {part!r} is part of no kernel's name; known are {known}.")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compile every kernel in every shipped config for GPUs that need not be here, print what "
        "the compiler made of it, and fail where a limit of a config is broken.",
    )
    parser.add_argument("--arch", help=f"{', '.join(GPUS)}, several with commas; default: all")
    parser.add_argument("--op", help="an op, several with commas; default: all")
    parser.add_argument("--kernel", metavar="TEXT", help="kernels with this in their name; default: all")
    parser.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE too")
    parser.add_argument("--jobs", type=_count, default=os.cpu_count() or 1, help="threads; default: cores")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
