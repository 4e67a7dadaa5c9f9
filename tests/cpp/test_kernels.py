"""The compiled kernels apart from any op: where instructions stand, what sanitizers say, every instruction set."""

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.marks import cpp
from vot_kernels.cpp import build, paths
from vot_kernels.cpp.library import library
from vot_kernels.files import atomic_write
from vot_kernels.ops.dispatch import CAPABILITIES, FUNCTIONS, _no_cpp_kernel
from vot_kernels.ops.pack_patches import pack_patches

ROOT = Path(__file__).parents[2]
CHECKS = sorted((ROOT / "tests" / "csrc").glob("*.cpp"))
# The kinds of the fuzzer's calls that reach C++ kernels.
KINDS = [op for op in FUNCTIONS if CAPABILITIES[op]["cpp"] is not _no_cpp_kernel]


def functions_with(instructions: str, disassembly: str) -> set[str]:
    """The names of the functions whose instructions have such registers."""
    found, name = set(), ""
    for line in disassembly.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = header[1]
        elif re.search(instructions, line):
            found.add(name)
    return found


@cpp
def test_wide_instructions_stand_in_the_functions_of_their_instruction_set_alone():
    """Elsewhere they would run on processors that lack them, as when the linker keeps that copy of a template."""
    isas = library().isas
    halves = {"avx512_bf16", "amx"} & set(isas)
    wide = {"avx512"} & set(isas) | halves
    if not wide or shutil.which("objdump") is None:
        pytest.skip("needs a library with AVX-512, and objdump")
    text = subprocess.run(
        ["objdump", "-d", library().path], capture_output=True, text=True, check=True
    ).stdout
    for found_in, allowed in (
        (r"%tmm", {"amx"}),
        (r"vdpbf16ps|vcvtne.*bf16", halves),
        (r"%zmm", wide),
        (r"%ymm", wide | {"avx2"}),
    ):
        found = functions_with(found_in, text)
        assert found or not allowed & set(isas)
        assert [name for name in found if not any(isa in name for isa in allowed)] == []


def test_the_search_for_wide_instructions_can_find_some():
    text = "0010 <_ZN3vot4mainEv>:\n  10: vaddps %zmm0,%zmm1,%zmm2\n0020 <other>:\n  20: addps %xmm0,%xmm1\n"
    assert functions_with(r"%zmm", text) == {"_ZN3vot4mainEv"}


# Unoptimised: compiling takes longer than running. Without these macros, which no header asks for, GCC takes the same
# compiled headers whatever the sanitizer.
COMMON = ("-O0", "-U__SANITIZE_ADDRESS__", "-U__SANITIZE_THREAD__")
SYSTEM_HEADERS = ROOT / "tests" / "csrc" / "system.h"


def compile_headers(options: tuple[str, ...], folder: Path) -> Path:
    """A header to include before all else. Without it, every file spends most of its time on the system's headers."""
    command = [*build.find_compiler(), *build.OPTIONS, *options, "-x", "c++-header"]
    text = SYSTEM_HEADERS.read_text()
    key = "\0".join((build.compiler_version(), *command, text))
    header = folder / hashlib.sha256(key.encode()).hexdigest()[:16] / SYSTEM_HEADERS.name
    header.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(header) as draft:
        draft.write_text(text)
    compiled = header.with_name(f"{header.name}.gch")
    # Clang refuses those of other sanitizers, and reads the text instead if there are none.
    if not compiled.exists() and "clang" not in build.compiler_version():
        with atomic_write(compiled) as draft:
            build.run([*command, str(header), "-o", str(draft)])
    return header


def compile_driver(sanitizer: str, isa: str, checks: list[Path]) -> Path:
    """The checks of tests/csrc with the kernels. Objects are kept for the next run of the tests."""
    folder = paths.build_folder() / "sanitizers"
    own = (f"-DVOT_ISA={isa}", *build.ISAS[isa], *COMMON)
    include = ("-include", str(compile_headers(own, folder)))
    options = (*COMMON, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *include)
    # Only the driver starts threads, and only kernels run on them: no check touches memory while there are several.
    plain = [path for path in checks if sanitizer == "thread" and path.stem != "driver"]
    units = build.kernel_units([isa], options)
    for path in checks:
        units.append(build.Unit(path, isa, (*own, *(include if path in plain else options))))
    objects = build.compile_units(units, folder / sanitizer)
    program = folder / sanitizer / "driver"
    link = [*build.find_compiler(), f"-fsanitize={sanitizer}", "-pthread"]
    build.run([*link, *map(str, objects), "-o", str(program)])
    return program


@cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "isa"), [("address,undefined", 0), ("thread", -1)], ids=["address and undefined", "thread"]
)
def test_sanitizers_find_nothing(sanitizer, isa):
    isa = build.default_isas()[isa]
    program = compile_driver(sanitizer, isa, CHECKS)
    result = subprocess.run([program, "10"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert sorted(result.stdout.split()) == sorted(path.stem for path in CHECKS if path.stem != "driver")


@cpp
def test_the_ops_on_the_other_instruction_sets():
    """The fuzzer's calls, in a process that is told which instruction set to use."""
    for isa in set(library().isas) & set(build.default_isas()) - {library().isa}:
        command = [sys.executable, "-m", "tests.fuzz", "--calls", "60"]
        command += [word for kind in KINDS for word in ("--kind", kind)]
        environment = os.environ | {"VOT_CPU_ISA": isa}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def flags_of_memory_at(address: int) -> list[str]:
    """What the system says of the mapping that has this address."""
    found, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    return flags


@cpp
@pytest.mark.parametrize("side", [1328, 3456])  # results of 5 and of 34 MiB
def test_a_large_result_asks_for_large_pages(side):
    """The system takes longer to clear small pages than the kernel to fill them."""
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("the system has no large pages to ask for")
    # Memory of its own, since the allocator may hand out some that an earlier result has had.
    image = torch.frombuffer(mmap.mmap(-1, 3 * side * side), dtype=torch.uint8).view(3, side, side)
    image.copy_(torch.arange(image.numel(), dtype=torch.int32).view(image.shape))
    patches, _ = pack_patches([image], 16, backend="cpp")
    assert "hg" in flags_of_memory_at(patches.data_ptr() + patches.numel() // 2)
    assert "hg" not in flags_of_memory_at(image.data_ptr() + image.numel() // 2)
    assert torch.equal(patches, pack_patches([image], 16, backend="torch")[0])
