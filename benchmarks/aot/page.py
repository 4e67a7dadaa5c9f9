"""`python -m benchmarks.aot.page [--arch sm_90,...]`: docs/gpu-static.md, what the compiler makes of the main kernels.

It compiles the first launch of every kernel in the calls of `CALLS`, and writes benchmarks/results/static.json,
then the page from this file and those of `benchmarks.aot.peers` and `benchmarks.aot.counts`. The first keeps the first
figures that a kernel ever had beside those of now.
`--page` only writes the page.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.aot import beside
from benchmarks.aot.__main__ import _compile, _pick
from benchmarks.aot.build import Job, Row, make_plan
from benchmarks.aot.cases import cases
from benchmarks.aot.gpus import GPUS, KIB
from vot_kernels.files import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "static.json"
COUNTS = RESULTS.with_name("static-counts.json")
PAGE = ROOT / "docs" / "gpu-static.md"
CALLS = {
    **{
        op: [
            *("bf16 d64", "bf16 d80", "bf16 d128", "bf16 d256"),
            *("bf16 d64 deterministic", "bf16 d64 plain", "bf16 d128 plain", "bf16 d64 eight warps"),
            *("bf16 d64 fused", "bf16 d128 fused"),
            *("bf16 d64 tma", "bf16 d128 tma"),
            *("bf16 d64 warp-specialized", "bf16 d128 warp-specialized", "bf16 d64 gluon", "bf16 d128 gluon"),
        ]
        for op in ("packed_attention", "hybrid_attention")
    },
    "linear_attention": ["bf16 d64", "bf16 d128", "bf16 d64 causal"],
    "aoe": ["bf16 d1536 n64 r512"],
    "moe": ["bf16 d2048 h768 n128"],
}
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")  # sm_86 takes the entries of sm_89
FULL = ("sm_90",)
USUAL = [(op, f"bf16 d{size}") for op in ("packed_attention", "hybrid_attention") for size in (64, 128)]
"""All calls are on the page where it is full, and on the other architectures the usual ones."""
KEY = ("arch", "op", "call", "kernel")
HEADER = (
    *("call", "kernel", "config", "instructions per kMAC", "tensor work", "blocks per SM"),
    *("registers", "shared KiB", "barriers", "spills in loops"),
)
Record = dict[str, Any]


def jobs_of(archs: Sequence[str], calls: Mapping[str, Sequence[str]] = CALLS) -> list[Job]:
    """Return the first launch of every kernel with matrix products in each of the calls."""
    wanted = [case for case in cases() if case.name in calls.get(case.op, ())]
    usual = [case for case in wanted if (case.op, case.name) in USUAL]
    first: dict[tuple[str, ...], Job] = {}
    for arch in archs:
        plan = make_plan(wanted if arch in FULL else usual, [arch])
        if plan.problems:
            raise RuntimeError(" ".join(plan.problems))
        for job in plan.jobs:
            if job.row.flops:  # kernels without matrix products are not on the page
                first.setdefault(key_of(_record(job.row)), job)
    return list(first.values())


def short(kernel: str) -> str:
    """Return the name of a kernel without what all names have."""
    return kernel.strip("_").removesuffix("_kernel")


def _record(row: Row) -> Record:
    """Return what the page says of a row; a row that is not compiled has the first five entries."""
    name = short(row.kernel)
    record = {"arch": row.arch, "op": row.op, "call": row.cases[0], "kernel": name, "config": row.config}
    if (found := row.resources) is None:
        return record | {"error": "; ".join(row.violations)} if row.violations else record
    loop = found.loop
    return record | {
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
        "threads": found.threads,
        "blocks_per_sm": row.blocks_per_sm,
        "limited_by": row.limited_by,
        "matrix": found.matrix,
        "instructions_per_kmac": _times(loop and loop.instructions_per_kmac, row.padding),
        "tensor_work": _times(loop and loop.tensor_work, row.padding),
        "barriers": loop and loop.barriers,
        "local_in_loops": found.local_in_loops,
    }


def _times(figure: float | None, padding: float) -> float | None:
    return None if figure is None else round(figure * padding, 3)


def records_of(jobs: Sequence[Job]) -> list[Record]:
    """Return the records of compiled jobs with matrix products on tensor cores, and of those that failed."""
    found = [_record(job.row) for job in jobs if job.row.done]
    return [record for record in found if "error" in record or record["tensor_work"] is not None]


def key_of(record: Record) -> tuple[str, ...]:
    """Return what tells a record from the others of a file."""
    return tuple(record[name] for name in KEY)


def merged(document: dict[str, Any], records: Iterable[Record], archs: Sequence[str], triton: str) -> Record:
    """Return the document with these records in place of the ones of `archs`; kernels new to it get a "before"."""
    before = {key_of(record): record for record in document.get("before", [])}
    now = [record for record in document.get("now", []) if record["arch"] not in archs]
    for record in records:
        now.append(record)
        before.setdefault(key_of(record), {**record, "triton": triton})
    versions = document.get("triton", {}) | dict.fromkeys(archs, triton)
    return {
        "command": "python -m benchmarks.aot.page",
        "triton": versions,
        "now": sorted(now, key=_order),
        "before": sorted(before.values(), key=_order),
    }


def _order(record: Record) -> tuple[Any, ...]:
    arch, op, call, kernel = key_of(record)
    return ARCHS.index(arch), list(CALLS).index(op), CALLS[op].index(call), kernel


def write(document: Record, results: Path = RESULTS) -> None:
    """Write the document with one record on a line."""
    lists = ("now", "before")
    head = {name: value for name, value in document.items() if name not in lists}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    for name in lists:
        text += f',\n "{name}": [\n' + ",\n".join(map(json.dumps, document[name])) + "\n ]"
    with atomic_write(results) as path:
        path.write_text(text + "\n}\n", encoding="utf-8")


def page(document: Record) -> str:
    """Return the page."""
    return "\n".join([introduction(), *_tables(document), *_beside(document)]) + "\n"


def introduction() -> str:
    """Return what is above the tables."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    rows = [
        [title, f"{counts['before'][name]:{form}}", f"{counts['now'][name]:{form}}"]
        for name, title, form in _COUNTED
    ]
    cells = [["counted", "before", "now"], ["---"] * 3, *rows]
    counted = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    return INTRODUCTION.format(short=100 * counts["now"]["short product"], counted=counted)


def _beside(document: Record) -> list[str]:
    """Return the section about peers, which are compiled for sm_90."""
    return list(beside.section(document)) if any(one["arch"] == "sm_90" for one in document["now"]) else []


def _tables(document: Record) -> Iterator[str]:
    before = {key_of(record): record for record in document["before"]}
    for arch in ARCHS:
        records = [record for record in document["now"] if record["arch"] == arch]
        if not records:
            continue
        gpu = GPUS[arch]
        yield f"\n## {arch}: {gpu.name}\n"
        shared = f"A block may have {gpu.shared_per_block // KIB} KiB of shared memory."
        yield f"Triton {document['triton'][arch]}. {shared}\n"
        for op in CALLS:
            rows = [_cells(record, before[key_of(record)]) for record in records if record["op"] == op]
            if rows:
                yield f"\n### {op} on {arch}\n"
                for cells in (HEADER, ["---"] * len(HEADER), *rows):
                    yield "| " + " | ".join(cells) + " |"


def _cells(record: Record, before: Record) -> list[str]:
    """Return the cells of a row; those that have changed have the first figure in brackets."""
    shown, old = _figures(record), _figures(before)
    cells = [new if new == was else f"{new} ({was})" for new, was in zip(shown, old, strict=True)]
    return [record["call"].removeprefix("bf16 "), f"`{record['kernel']}`", *cells]


def _figures(record: Record) -> list[str]:
    if "error" in record:
        return [record["config"], *["does not compile"] * (len(HEADER) - 3)]
    per_kmac, gpu = record["instructions_per_kmac"], GPUS[record["arch"]]
    fits = record["shared_bytes"] <= gpu.shared_per_block
    return [
        record["config"],
        "–" if per_kmac is None else f"{per_kmac:.2f}",
        f"{record['tensor_work']:.2f}",
        f"{record['blocks_per_sm']} by {record['limited_by']}" if fits else "does not fit",
        str(record["registers"]),
        f"{record['shared_bytes'] / KIB:.0f}",
        str(record["barriers"]),
        str(record["local_in_loops"]),
    ]


_COUNTED = [
    ("states d64", "GB that the kernels of states move in a forward of 65,536 tokens, 16 heads of 64", ".2f"),
    ("states d128", "the same, heads of 128", ".2f"),
    (
        "far d128",
        "instructions of a warp for a chunk of features in the far part of the forward, heads of 128",
        ".0f",
    ),
]
INTRODUCTION = """\
# What the compiler makes of the GPU kernels

No GPU has run these kernels yet. What can be known without one is in their machine code, and
`python -m benchmarks.aot.page` reads it there: it compiles the kernels with the configs of `vot_kernels/tuning/configs`
for GPUs that need not be present and disassembles them. All figures are of bfloat16 inputs. Where a figure has changed
since it was first measured, the first one is in brackets.

- **Instructions per kMAC**: machine instructions of all warps in the main loop for 1,024 useful multiply-adds. The main
  loop of attention has the blocks of keys that need no mask. An SM of sm_90 starts 4 instructions and does 2,048
  multiply-adds per cycle, so above 2 the instructions take longer than the products.
- **Tensor work**: multiply-adds that the tensor cores do for each one that the result needs. At 2, two groups of warps
  compute the same tile. Heads of 80 are computed as 128, because the blocks of Triton are powers of two: the tensor
  cores do 1.6 times the work, which one block of 64 and one of 16 columns would save at the price of twice as many,
  smaller products.
- **Blocks per SM**: how many blocks fit on an SM at a time, and what prevents another one. With two blocks, the
  exponentials of one overlap the products of the other.
- **Barriers**: per iteration of the main loop, at which all warps of a block wait for each other.
- **Spills in loops**: loads and stores of registers that did not fit, in loops with products. They must be 0, and the
  check `python -m benchmarks.aot` fails otherwise.

Where tensor work stays above 1 the next larger tile does not fit into the registers:

- dk and dv of heads of 128 with a far part, and the fused form: 64 rows in place of 32 would need no narrow products,
  but registers spill in the loop.
- sm_80, sm_89 and sm_120, dk and dv of heads of 128: 128 keys in place of 64 spill in the loop, too.
- Heads of 256: their sums alone take half of the registers. With 64 rows and 4 warps the far form spills hundreds of
  times in its loop.

With Triton 3.6 three kernels of sm_90 load or store registers in a loop:

- dk and dv of hybrid attention, fp16 heads of 64: once in a loop of 549 instructions. Fewer features or stages at a
  time spill as well; 32 rows in place of 64 do not, but need 40 per cent more instructions with Triton 3.7.
- Causal linear attention, heads of 256: once in the apply kernel backwards, and 10 to 17 times in the gradient of key
  features. Half the tokens or features at a time spill nothing, but need 20 to 100 per cent more instructions with
  every version.

With Triton 3.9 it is 33 launches of sm_90, of 1,113: 30 of causal linear attention, 2 to 26 times in a loop, and three
of hybrid attention, 1 to 3 times. 21 more are above their limits outside of loops
(`benchmarks/results/gate-sm_90-triton-3.9.json`). The limits are what 3.6 and 3.7 need: the same sources take more
registers with 3.9, and the bound of 255 is reached more often.

Choices that no GPU has decided:

- Four warps: heads of 64 on sm_90 run with 4 warps and two blocks per SM, and loads through descriptors. dk and dv with
  a far part keep 8 warps, because with 4 Triton 3.6 spills in the loop. The former forms are the variant `eight_warps`.
  Instructions per kMAC with Triton 3.6, 3.7 and 3.9: forward of packed attention 2.02, 1.98, 2.02; dq with a far part
  1.03, 1.03, 1.07; dk and dv without one 1.60, 1.28, 1.56, where 8 warps have 1.73, 1.37, 1.64.
- The fused backward is the default on sm_90 alone, for heads of 64 in 16 bits without a far part, where bits need not
  repeat. There its 5 products need 6.6 instructions if each has 1,024 multiply-adds, and the 7 of the pair of kernels
  8.6. For heads of 128 the pair needs fewer, 5.3 in place of 6.0. With a far part and heads of 64 the fused form needs
  fewer, too, 6.7 in place of 8.5, but waits for a measurement, as on all other GPUs.
- Products of experts have no loop over tiles. In one with a depth of 768, {short:.0f} per cent of a warp's instructions
  are before and after the loop (`benchmarks/results/static-counts.json`), which a loop over tiles could hide. The depth
  is no key of the configs either: a table by depth needs times of a GPU.
- Heads of 72 are computed as 128, like those of 80: 1.78 times the work.
- Gluon: the loop of hybrid attention over near keys is that of packed attention, so it fits the Gluon form. But this
  form takes 127 of 128 registers for heads of 64 and 254 of 255 for heads of 128, and has no far part.

Outside of main loops, for hybrid attention on sm_90, groups of 256 (`python -m benchmarks.aot.counts`; a tensor counts
once for each kernel that reads or writes it):

{counted}

A dash: in warp-specialised kernels of sm_100 one warp asks for the products of all, and the exponentials are in loops
of other warps.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write the results and the page; return the exit status."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.page", description=about)
    parser.add_argument("--arch", help=f"{', '.join(ARCHS)}, several with commas; default: all")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads; default: cores")
    options = parser.parse_args(arguments)
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not options.page:
        import triton

        try:
            archs = _pick("arch", options.arch, ARCHS)
        except ValueError as error:
            print(f"benchmarks.aot.page: {error}", file=sys.stderr)
            return 2
        jobs = jobs_of(archs)
        if not _compile(jobs, options.jobs):
            return 130
        document = merged(document, records_of(jobs), archs, triton.__version__)
        write(document)
    with atomic_write(PAGE) as path:
        path.write_text(page(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
