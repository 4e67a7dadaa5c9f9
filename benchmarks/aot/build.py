"""From cases to rows: each compiled kernel once, with its resources, estimates and broken limits."""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.aot.cases import Case
from benchmarks.aot.gpus import GPUS, occupancy, roofline
from vot_kernels import tuning
from vot_kernels.ops.launch import Launch, record_launches

if TYPE_CHECKING:
    from benchmarks.aot.compiler import Resources, Specialization

STRICT: dict[str, int | float | bool] = {"spill_bytes": 0, "local_in_loops": 0}
"""The limits of a config that has no others of these names."""
KERNELS = Path(__file__).parents[2] / "kernels" / "triton"


@dataclass
class Row:
    """One compiled kernel.

    Attributes:
        arch: such as "sm_90".
        op: the op of the cases.
        kernel: name of the function.
        key: distinguishes this variant of the kernel from the others.
        config: blocks, warps, stages, and the bound of registers if it has one.
        limits: the limits of the config.
        cases: names of the cases that launch it.
        moved: bytes of the kernel's tensors in the first of these cases.
        flops: operations of the kernel's matrix products in that case.
        padding: columns of a head that the kernel computes, for each one that there is.
        resources: those of the compiled kernel, None if it did not compile.
        blocks_per_sm, limited_by: the estimated occupancy and what limits it.
        least_us, bound: the least time in that case by the roofline of the GPU, and what bounds it.
        violations: one sentence per broken limit.
    """

    arch: str
    op: str
    kernel: str
    key: str
    config: str
    limits: dict[str, int | float | bool]
    cases: list[str]
    moved: int
    flops: int
    padding: float = 1.0
    resources: "Resources | None" = None
    blocks_per_sm: int = 0
    limited_by: str = ""
    least_us: float = 0.0
    bound: str = ""
    violations: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return asdict(self)

    @property
    def done(self) -> bool:
        """Whether the row is compiled, or known not to compile."""
        return self.resources is not None or bool(self.violations)

    @property
    def title(self) -> str:
        """The name of the kernel in a violation."""
        return f"{self.arch} {self.kernel} ({self.op} {self.cases[0]}; {self.key}; {self.config})"


@dataclass(frozen=True, eq=False)
class Launched:
    """A launch of a case, without the memory of its tensors."""

    arch: str
    kernel: str
    blocks: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Job:
    """A row to fill in, and the launch to compile for it."""

    row: Row
    what: "Specialization"


@dataclass(eq=False)
class Plan:
    """Everything that has to be compiled.

    Attributes:
        launched: every launch of every case.
        jobs: launches that share a compiled kernel and its limits share a job.
        problems: one sentence for each case that cannot be launched.
    """

    launched: list[Launched] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def record(case: Case, arch: str) -> list[Launch]:
    """Return the launches of a case on `arch`.

    Raises:
        RuntimeError: the case raised, or launched nothing.
    """
    try:
        with record_launches(arch) as launches:
            case.run()
    except Exception as error:
        raise RuntimeError(f"{arch} {case.op} ({case.name}) cannot be launched: {_line(error)}") from error
    if not launches:
        raise RuntimeError(f"{arch} {case.op} ({case.name}) launches no kernel.")
    return launches


def launched(cases: Iterable[Case], archs: Iterable[str]) -> list[Launched]:
    """Return every launch of every case on every architecture."""
    pairs = [(case, arch) for arch in archs for case in cases]
    return [_launched(launch, arch) for case, arch in pairs for launch in record(case, arch)]


def _launched(launch: Launch, arch: str) -> Launched:
    return Launched(arch, launch.kernel.__name__, launch.config.blocks)


def make_plan(cases: Sequence[Case], archs: Sequence[str]) -> Plan:
    """Return the launches of the cases on these architectures, with each compiled kernel once."""
    from benchmarks.aot.compiler import specialize

    plan = Plan()
    jobs: dict[tuple[str, str], Job] = {}
    for arch in archs:
        for case in cases:
            try:
                launches = record(case, arch)
            except RuntimeError as error:
                plan.problems.append(str(error))
                continue
            for launch in launches:
                plan.launched.append(_launched(launch, arch))
                what = specialize(launch, arch)
                identity = (what.identity, str(launch.config))
                if identity not in jobs:
                    jobs[identity] = Job(_new_row(case, arch, launch, what), what)
                names = jobs[identity].row.cases
                names += [case.name] if case.name not in names else []
    plan.jobs += jobs.values()
    return plan


def _new_row(case: Case, arch: str, launch: Launch, what: "Specialization") -> Row:
    from benchmarks.aot.compiler import traffic

    name, config = launch.kernel.__name__, launch.config
    words = [f"{key.removeprefix('BLOCK_')}={value}" for key, value in config.blocks.items()]
    words += [f"warps={config.num_warps}", f"stages={config.num_stages}"]
    words += [] if config.max_registers is None else [f"maxnreg={config.max_registers}"]
    return Row(
        arch=arch,
        op=case.op,
        kernel=name,
        key=what.key(),
        config=" ".join(words),
        limits=dict(config.limits),
        cases=[],
        moved=traffic(launch.arguments),
        flops=case.flops(name),
        padding=_padding(launch.arguments),
    )


def _padding(arguments: Mapping[str, Any]) -> float:
    """Return how many columns of a head a kernel computes for each one; other kernels use these names otherwise."""
    return arguments["BLOCK_D"] / arguments["HEAD_DIM"] if {"BLOCK_D", "HEAD_DIM"} <= {*arguments} else 1.0


def compile_all(jobs: Sequence[Job], workers: int, finished: Callable[[Row], None]) -> None:
    """Fill in the rows on `workers` threads and call `finished` with each. Ctrl-C leaves the others unchanged."""
    # If ptxas fails, the compiler prints the whole program; the row has the message.
    with redirect_stdout(StringIO()), ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[None], Row] = {pool.submit(_fill, job.row, job.what): job.row for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                finished(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fill(row: Row, what: "Specialization") -> None:
    from benchmarks.aot.compiler import compile_kernel

    try:
        found = compile_kernel(what)
    except Exception as error:
        row.violations.append(f"does not compile: {_line(error)}")
        return
    gpu = GPUS[row.arch]
    row.blocks_per_sm, row.limited_by = occupancy(
        gpu,
        threads=found.threads,
        registers=found.registers,
        shared=found.shared_bytes,
        tensor_memory=found.tensor_memory,
    )
    seconds, row.bound = roofline(gpu, row.flops, row.moved, found.unit)
    row.least_us = seconds * 1e6
    row.violations += broken_limits(found, row.limits)
    if found.shared_bytes > gpu.shared_per_block:
        row.violations.append(
            f"asks for {found.shared_bytes} bytes of shared memory, a block has {gpu.shared_per_block}"
        )
    row.resources = found


def broken_limits(found: "Resources", limits: Mapping[str, int | float | bool]) -> list[str]:
    """Return a sentence for every limit that does not hold.

    Unless its config allows it, a kernel spills nothing.
    """
    amounts = {
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
        "local_in_loops": found.local_in_loops,
        "tensor_work": 1.0 if found.loop is None else found.loop.tensor_work,
    }
    features = {
        "wgmma": found.matrix == "wgmma",
        "tcgen05": found.matrix == "tcgen05",
        "tma": found.tma,
        "warp_specialized": found.warp_specialized,
    }
    broken = []
    for name, limit in {**STRICT, **limits}.items():
        if name in amounts and amounts[name] > limit:
            broken.append(f"{name} {amounts[name]}, the limit is {limit}")
        elif name in features and limit and not features[name]:
            broken.append(f"does not use {name}, and its config demands it")
        elif name not in amounts and name not in features:
            broken.append(f"limit {name!r} is unknown, known are {', '.join([*amounts, *features])}")
    return broken


def registered_kernels(folder: Path = KERNELS) -> set[str]:
    """Return the names of the `@triton.jit` and `@gluon.jit` functions under `folder` that end in `_kernel`."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = {ast.unparse(x).split("(")[0] for x in node.decorator_list}
                if decorators & {"triton.jit", "jit", "gluon.jit"}:
                    found.add(node.name)
    return found


def unreached_kernels(seen: Iterable[Launched], registered: Iterable[str]) -> list[str]:
    """Return a line for each registered kernel that no case launches."""
    reached = {launch.kernel for launch in seen}
    return [
        f"{name} is reached by no case of benchmarks/aot/cases.py" for name in sorted({*registered} - reached)
    ]


def unused_entries(seen: Iterable[Launched], archs: Iterable[str]) -> list[str]:
    """Return a line for each entry of the config tables of `archs` that no case uses."""
    # A config's blocks are the entry's own dict, so identity tells which of two equal entries was chosen.
    used = {id(launch.blocks) for launch in seen}
    return [
        f"configs/{arch}/{family}.json: entry {index} of {kernel} is used by no case of benchmarks/aot/cases.py"
        for arch in archs
        for family, table in tuning.tables(arch).items()
        for kernel, entries in table.items()
        for index, entry in enumerate(entries)
        if id(entry["blocks"]) not in used
    ]


def _line(error: BaseException) -> str:
    """Return the last line of a compiler's message, which says what is wrong; the first ones quote the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
