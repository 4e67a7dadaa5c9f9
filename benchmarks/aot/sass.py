"""What a kernel's machine code does in its main loop, read from the disassembly and from Triton's last GPU dialect.

The main loop is the innermost loop with the most matrix products; of equal ones it is the shortest, because blocks
of keys that need a mask have a loop of their own with more instructions.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

# Multiply-adds of one instruction of one warp; those of a warpgroup are shared by its four warps.
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}
_FLOATS = re.compile(r"([DFH](FMA|ADD|MUL)|MUFU)")
_TCGEN05 = re.compile(r"UTC\w*MMA")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"(\.L_\w+|\$[\w$.]+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_JUMPS, _ENDS = ("BRA", "JMP", "BRX"), ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its predicate ("" for none), name with modifiers, operands, and the label it may jump to."""

    predicate: str
    name: str
    operands: str
    target: str | None

    @property
    def stem(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def macs(self) -> int:
        """Multiply-adds of one warp on the tensor cores; 0 for those of tcgen05, whose sizes are not in the text."""
        if found := _HGMMA.match(self.name):
            return prod(map(int, found.groups())) // 4
        return _HMMA.get(self.name.split(".")[1], 0) if self.stem == "HMMA" else 0

    @property
    def busy(self) -> float:
        """Multiply-adds of one warp for which there would have been time; more than `macs` if operands come slowly.

        An SM of sm_90 does 2048 of 16 bits per cycle and reads 128 bytes of shared memory: a narrow product of two
        operands from there waits for the left one. An instruction takes 32 bytes of each row, whatever the dtype.
        """
        found = _HGMMA.match(self.name)
        if not found:
            return self.macs
        rows, columns, depth = map(int, found.groups())
        from_registers = re.match(r"R\d+, R\d+", self.operands) is not None
        fetched = 32 * (columns if from_registers else columns + rows)
        return max(self.macs, fetched / 128 * 2048 / 4 * depth / 16)

    @property
    def multiplies(self) -> bool:
        """Whether it works on the tensor cores."""
        return self.macs > 0 or _TCGEN05.match(self.name) is not None


@dataclass(frozen=True)
class MainLoop:
    """What one iteration of the main loop does.

    Attributes:
        instructions: of one warp.
        instructions_per_kmac: of all warps, for 1024 multiply-adds that the products need. None if the loop has
            only the products, as in warp-specialised kernels of sm_100.
        tensor_work: time of the tensor cores, by what the products need. It is above 1 where several warps compute the
            same part of a product, and where the instructions are too narrow to keep the tensor cores busy.
        barriers: at which all warps of the block wait for each other.
    """

    instructions: int
    instructions_per_kmac: float | None
    tensor_work: float
    barriers: int


@dataclass(frozen=True)
class Product:
    """A matrix product in Triton's GPU dialect.

    Attributes:
        macs: multiply-adds that it needs.
        issued: multiply-adds that its layout does.
        warps: that take part; 0 if it is not known, as where the warps differ in what they do and one of them asks
            for the products of all.
    """

    macs: int
    issued: int
    warps: int


def main_loop(cubin: bytes, ttgir: str) -> tuple[MainLoop | None, int]:
    """Return the main loop, None without matrix products on tensor cores, and how often loops with products spill.

    The second number counts the loads and stores of local memory in all loops with products.
    """
    products = _main_products(ttgir)
    bodies = _product_loops(parse(disassemble(cubin))) if products else []
    if not bodies:
        return None, 0
    spills = _local(bodies)
    body = max(bodies, key=lambda body: (*_work(body), -len(body)))
    macs, _ = _work(body)
    needed, issued = (sum(getattr(product, name) for product in products) for name in ("macs", "issued"))
    warps = products[0].warps
    # A loop that ptxas unrolled has the products of several iterations.
    useful = warps * macs * needed / issued if macs else needed
    per_kmac = round(len(body) * warps * 1024 / useful, 3) if warps else None
    barriers = sum(one.stem == "BAR" for one in body)
    waited = sum(one.busy for one in body) / macs if macs else 1
    return MainLoop(len(body), per_kmac, round(waited * issued / needed, 3), barriers), spills


def local_in_loops(cubin: bytes) -> int:
    """Return how many loads and stores of local memory there are in innermost loops that compute with floats."""
    instructions, labels = parse(disassemble(cubin))
    loops = loops_of(instructions, labels)
    computing = [loop for loop in loops if any(_FLOATS.match(instructions[i].stem) for i in loop)]
    return _local(_bodies(instructions, _innermost(computing)))


def _local(bodies: Iterable[Sequence[Instruction]]) -> int:
    return sum(one.stem in ("LDL", "STL") for body in bodies for one in body)


def _work(body: Sequence[Instruction]) -> tuple[int, int]:
    """Return the multiply-adds of one warp and the number of instructions for the tensor cores."""
    return sum(one.macs for one in body), sum(one.multiplies for one in body)


def disassemble(cubin: bytes) -> str:
    """Return the machine code as text. Triton's cache keeps it: nvdisasm takes half a second to start."""
    tool = knobs.nvidia.nvdisasm
    command = [tool.path, "--print-code", "--no-dataflow"]
    words = "\0".join((tool.version, *command[1:]))
    cache = get_cache_manager(hashlib.sha256(words.encode() + cubin).hexdigest())
    if kept := cache.get_file("kernel.sass"):
        return Path(kept).read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([*command, str(path)], check=True, capture_output=True, text=True)
    cache.put(done.stdout, "kernel.sass", binary=False)
    return done.stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions, and for each label the index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[3])
            instructions.append(Instruction(found[1] or "", found[2], found[3], target and target[1]))
    return instructions, labels


def _product_loops(program: tuple[list[Instruction], dict[str, int]]) -> list[list[Instruction]]:
    """Return the bodies of the loops with products in them, but in no loop inside."""
    instructions, _ = program
    loops = loops_of(*program)
    with_products = [loop for loop in loops if any(instructions[i].multiplies for i in loop)]
    return _bodies(instructions, _innermost(with_products))


def _innermost(loops: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Return the loops with no other of them inside."""
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _bodies(instructions: Sequence[Instruction], loops: Iterable[frozenset[int]]) -> list[list[Instruction]]:
    return [[instructions[i] for i in sorted(loop)] for loop in loops]


def loops_of(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """Return the natural loops of the program, each as the indices of its instructions; one for each first block."""
    starts = sorted({0, *labels.values(), *(i + 1 for i, one in enumerate(instructions) if _jumps(one))})
    starts = [start for start in starts if start < len(instructions)]
    ends = [*starts[1:], len(instructions)]
    block_at = {start: block for block, start in enumerate(starts)}
    after = [
        [block_at[place] for place in _successors(instructions[end - 1], end, labels) if place in block_at]
        for end in ends
    ]
    before: list[list[int]] = [[] for _ in starts]
    for block in _reached(after):  # behind the end is a jump to itself, which nothing reaches
        for following in after[block]:
            before[following].append(block)
    dominators = _dominators(before)
    found: dict[int, set[int]] = {}
    for block in _reached(after):
        for first in after[block]:
            if dominators[block] >> first & 1:
                found.setdefault(first, {first}).update(_reaching(block, first, before))
    return [
        frozenset(i for block in blocks for i in range(starts[block], ends[block]))
        for blocks in found.values()
    ]


def _jumps(one: Instruction) -> bool:
    return one.stem in _JUMPS or one.stem in _ENDS


def _successors(last: Instruction, following: int, labels: dict[str, int]) -> Iterator[int]:
    """Yield where a block may continue whose last instruction this is."""
    sometimes = bool(last.predicate) or re.match(r"!?U?P\d", last.operands) is not None
    if not _jumps(last) or sometimes:
        yield following
    if last.stem in _JUMPS and last.target in labels:
        yield labels[last.target]


def _reached(after: Sequence[Sequence[int]]) -> set[int]:
    """Return the blocks that are reached from the first one."""
    found: set[int] = set()
    waiting = [0]
    while waiting:
        if (block := waiting.pop()) not in found:
            found.add(block)
            waiting += after[block]
    return found


def _dominators(before: Sequence[Iterable[int]]) -> list[int]:
    """Return for each block the set of blocks on every way to it, as bits; block 0 is the entry."""
    everything = (1 << len(before)) - 1
    found = [1] + [everything] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            common = everything
            for previous in before[block]:
                common &= found[previous]
            common |= 1 << block
            changed |= common != found[block]
            found[block] = common
    return found


def _reaching(block: int, first: int, before: Sequence[Iterable[int]]) -> set[int]:
    """Return the blocks from which `block` is reached without passing `first`."""
    found, waiting = {first}, [block]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += before[one]
    return found


_LAYOUT = re.compile(
    r"(#\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[([\d, ]+)\].*?instrShape = \[([\d, ]+)\].*?\}>"
)
_PRODUCT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*? : "
    r"(?:tensor|!ttg\.memdesc)<([\dx]+)x[a-z].*?(?:->|,) (?:tensor|!ttg\.memdesc)<([\dx]+)xf32, (#\w+)"
)


_LOOP = re.compile(r"\bscf\.(for|while)\b")


def _main_products(ttgir: str) -> list[Product]:
    """Return the products of the loop that needs the most multiply-adds, without those of loops inside it."""
    layouts = {
        name: (_numbers(warps, ","), _numbers(shape, ",")) for name, warps, shape in _LAYOUT.findall(ttgir)
    }
    specialized = "ttg.warp_specialize(" in ttgir
    warps = re.search(r'"ttg.num-warps" = (\d+)', ttgir)
    everyone = int(warps[1]) if warps and not specialized else 0
    loops: list[list[Product]] = []
    regions: list[list[Product] | None] = []  # open ones: the products of a loop, None for another region
    for line in ttgir.splitlines():
        inside = [loop for loop in regions if loop is not None]
        if inside and (found := _PRODUCT.search(line)):
            inside[-1].extend(_product(found, layouts, everyone))
        opened = line.count("{") - line.count("}")
        regions += [[] if _LOOP.search(line) else None for _ in range(opened)]
        for _ in range(-opened):
            loops.append(regions.pop() or [])
    return max(loops, key=lambda loop: sum(product.macs for product in loop), default=[])


def _product(
    found: re.Match[str], layouts: dict[str, tuple[list[int], list[int]]], everyone: int
) -> list[Product]:
    """Return a product on tensor cores, nothing for one without. everyone: the warps of a product of tcgen05."""
    left, result, layout = _numbers(found[1], "x"), _numbers(found[2], "x"), found[3]
    macs = prod(result) * left[-1]
    if "tc_gen5_mma" in found[0]:
        return [Product(macs, macs, everyone)]
    if layout not in layouts:
        return []
    warps, shape = layouts[layout]
    # On sm_90 a warpgroup of four warps computes instrShape, of which each warp has 16 rows.
    covered = [count * size for count, size in zip(warps, shape, strict=False)]
    excess = prod(max(1.0, whole / size) for whole, size in zip(covered, result, strict=True))
    return [Product(macs, round(macs * excess), prod(warps))]


def _numbers(text: str, separator: str) -> list[int]:
    return [int(number) for number in text.split(separator)]
