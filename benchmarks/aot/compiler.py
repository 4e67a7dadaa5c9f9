"""Compilation of a launch's kernel without a GPU, and its resources."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.aot.sass import MainLoop, local_in_loops, main_loop
from vot_kernels.ops.launch import Launch


@dataclass(frozen=True, eq=False)
class Specialization:
    """The kernel and the arguments that the JIT would compile for a launch.

    Attributes:
        kernel: the `@triton.jit` function.
        target: the GPU.
        signature: type of each argument by name.
        constexprs: values by position: those of constexpr parameters, None, and integers equal to 1.
        attributes: by position, known facts about the others (a multiple of 16).
        options: num_warps, num_stages and the rest.
    """

    kernel: JITFunction
    target: GPUTarget
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[Any]]
    options: dict[str, Any]

    @property
    def identity(self) -> str:
        """A value that is equal for launches that share a compiled kernel."""
        parts = (self.signature, self.constexprs, self.attributes, self.options)
        return "\n".join(map(str, (self.kernel.cache_key, self.target, *parts)))

    def key(self) -> str:
        """The dtype of the first tensor and the constants except block sizes; "-weights": that argument is None."""
        words = [next((kind[1:] for kind in self.signature.values() if kind.startswith("*")), "")]
        for (index, *_), value in sorted(self.constexprs.items(), key=lambda item: item[1] is None):
            name = self.kernel.params[index].name
            if not name.startswith(("BLOCK", "TILE")):
                words.append(_word(name.removesuffix("_ptr"), value))
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Resources:
    """The resources that a compiled kernel uses.

    Attributes:
        registers: registers of a thread.
        spill_bytes: stack frame of a thread, where registers go that do not fit. Triton's kernels keep
            nothing else there; the loads and stores that ptxas counts may touch a slot more than once.
        shared_bytes: of a block, as asked for at launch.
        threads: of a block.
        tensor_memory: columns of a block (sm_100).
        matrix: "wgmma", "tcgen05", "mma" or "none": the instructions of its matrix products.
        unit: "half", "tf32" or "fma": what these multiply, the slowest of them.
        tma: bulk tensor copies are used.
        warp_specialized: warps differ in what they do. A loop may ask for it and be compiled as any other.
        loop: what the main loop does; None without matrix products on tensor cores in a loop.
        local_in_loops: loads and stores of local memory, where spilled registers go, in loops with matrix products; if
            none of these is on tensor cores, in loops with any arithmetic.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    tensor_memory: int
    matrix: str
    unit: str
    tma: bool
    warp_specialized: bool
    loop: MainLoop | None = None
    local_in_loops: int = 0


def specialize(launch: Launch, arch: str) -> Specialization:
    """Determine, from the arguments' types and values, what Triton's own launch code would compile for `arch`.

    Raises:
        TypeError: the kernel does not accept these arguments, or is interpreted.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel.__name__} is interpreted and cannot be compiled; unset TRITON_INTERPRET.")
    return specialize_call(kernel, arch, (), launch.arguments | launch.config.compiler_options())


def specialize_call(
    kernel: JITFunction, arch: str, positional: Sequence[Any], named: Mapping[str, Any]
) -> Specialization:
    """Do what `specialize` does, for the arguments of a call of any kernel and the options of the compiler."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, options = bind(*positional, **named)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, kinds, None)
    known = {index: value for index, value in attributes.items() if value}
    return Specialization(kernel, target, signature, constexprs, known, dict(parsed.__dict__))


def compile_kernel(what: Specialization) -> Resources:
    """Compile, or read from Triton's cache.

    Raises:
        Exception: whatever the compiler raises.
    """
    source = _source_type(what.kernel)(what.kernel, what.signature, what.constexprs, what.attributes)
    compiled = triton.compile(source, target=what.target, options=what.options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    matrix, unit = matrix_instructions(ptx)
    registers, stack = _resource_usage(compiled.asm["cubin"])
    loop, local = main_loop(compiled.asm["cubin"], compiled.asm["ttgir"])
    if loop is None and stack:
        local = local_in_loops(compiled.asm["cubin"])
    return Resources(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=metadata.shared,
        threads=_threads(ptx, 32 * metadata.num_warps),
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        matrix=matrix,
        unit=unit,
        tma="async.bulk.tensor" in ptx,  # cp.async loads and stores, cp.reduce.async adds
        warp_specialized=is_warp_specialized(compiled.asm["ttgir"]),
        loop=loop,
        local_in_loops=local,
    )


def machine_code(what: Specialization) -> bytes:
    """Compile, or read from Triton's cache, and return the machine code."""
    source = _source_type(what.kernel)(what.kernel, what.signature, what.constexprs, what.attributes)
    return triton.compile(source, target=what.target, options=what.options).asm["cubin"]


def _source_type(kernel: JITFunction) -> type[ASTSource]:
    """Return the type of the source of a kernel in Triton or in Gluon."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def is_warp_specialized(ttgir: str) -> bool:
    """Whether the operation is there; the attribute of a loop that requests it may remain without it."""
    return re.search(r"\bttg\.warp_specialize\(", ttgir) is not None


def matrix_instructions(ptx: str) -> tuple[str, str]:
    """Return the newest kind of matrix instruction in `ptx`, and the slowest unit that any of them uses."""
    found = {
        "tcgen05": re.findall(r"tcgen05\.mma\S*", ptx),
        "wgmma": re.findall(r"wgmma\.mma_async\S*", ptx),
        "mma": re.findall(r"(?<!\.)\bmma\.sync\S*", ptx),
    }
    matrix = next((name for name, instructions in found.items() if instructions), "none")
    if matrix == "none":
        return "none", "fma"
    tf32 = any("tf32" in instruction for instructions in found.values() for instruction in instructions)
    return matrix, "tf32" if tf32 else "half"


def traffic(arguments: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors of a launch, each counted once, because each is read or written."""
    values = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    distinct = {(x.data_ptr(), tuple(x.shape), x.stride(), x.dtype): x for x in tensors}
    return sum(x.numel() * x.element_size() for x in distinct.values())


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # There is one function each; helpers that were not inlined may be beside the kernel.
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not usage:
        raise RuntimeError(f"cuobjdump names no registers: {text.strip()!r}.")
    return max(int(registers) for registers, _ in usage), max(int(stack) for _, stack in usage)


def _threads(ptx: str, otherwise: int) -> int:
    """Return the threads of a block; warp specialization adds warps to those of the launch."""
    found = re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)
    return int(found[1]) if found else otherwise


def _word(name: str, value: Any) -> str:
    if value is None:
        return f"-{name}"
    if isinstance(value, bool):
        return name.lower() if value else ""
    if isinstance(value, str):
        return value
    return f"d{value}" if name == "HEAD_DIM" else f"{name.lower()}={value}"
