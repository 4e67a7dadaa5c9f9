"""The resources of an SM of each architecture, the number of blocks of a kernel that fit on it, and rooflines.

Sources: CUDA C++ Programming Guide, table of technical specifications per compute capability, the data sheets of
A100 SXM 80 GB, A10, L40S, H100 SXM and B200, and the white paper on the architecture of RTX 5090 (dense rates with
sums in float32). These are estimates for comparing configs, not measurements.
"""

from dataclasses import dataclass

KIB = 1024
REGISTERS_PER_SM = 64 * KIB
TENSOR_MEMORY_COLUMNS = 512
_RESERVED_SHARED = KIB  # the system takes this much of every block's shared memory
_REGISTER_UNIT = 256  # registers are allocated to a warp in multiples of this
_SCHEDULERS = 4  # each owns a quarter of the registers


@dataclass(frozen=True)
class Gpu:
    """A GPU to estimate for; the figures are for the whole GPU unless they say otherwise.

    Attributes:
        name: the product.
        shared_per_sm: bytes.
        memory_bytes_per_s: device memory.
        flops_per_s: by unit: "half" (float16 and bfloat16), "tf32", and "fma" (float32 without
            tensor cores).
        threads_per_sm, blocks_per_sm: the most that an SM holds at a time.
    """

    name: str
    shared_per_sm: int
    memory_bytes_per_s: float
    flops_per_s: dict[str, float]
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32

    @property
    def shared_per_block(self) -> int:
        """Bytes that one block may ask for."""
        return self.shared_per_sm - _RESERVED_SHARED


GPUS = {
    "sm_80": Gpu("A100", 164 * KIB, 2.04e12, {"half": 312e12, "tf32": 156e12, "fma": 19.5e12}),
    "sm_86": Gpu("A10", 100 * KIB, 0.6e12, {"half": 125e12, "tf32": 62.5e12, "fma": 31.2e12}, 1536, 16),
    "sm_89": Gpu("L40S", 100 * KIB, 0.864e12, {"half": 362e12, "tf32": 183e12, "fma": 91.6e12}, 1536, 24),
    "sm_90": Gpu("H100", 228 * KIB, 3.35e12, {"half": 989e12, "tf32": 495e12, "fma": 67e12}),
    "sm_100": Gpu("B200", 228 * KIB, 8e12, {"half": 2250e12, "tf32": 1125e12, "fma": 75e12}),
    "sm_120": Gpu("RTX 5090", 100 * KIB, 1.792e12, {"half": 210e12, "tf32": 105e12, "fma": 105e12}, 1536, 24),
}


def occupancy(
    gpu: Gpu, *, threads: int, registers: int, shared: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """Return the number of blocks of a kernel that fit on an SM, and the resource that prevents another one.

    Args:
        threads: threads of a block.
        registers: registers of a thread.
        shared: bytes of shared memory that a block requests.
        tensor_memory: columns that a block allocates.
    """
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = REGISTERS_PER_SM // _SCHEDULERS // per_warp * _SCHEDULERS
    fits = {
        "registers": warps_by_registers // warps,
        "shared": gpu.shared_per_sm // (shared + _RESERVED_SHARED),
        "threads": gpu.threads_per_sm // (32 * warps),
        "blocks": gpu.blocks_per_sm,
    }
    if tensor_memory:
        fits["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory
    limit = min(fits, key=lambda name: fits[name])
    return fits[limit], limit


def roofline(gpu: Gpu, flops: int, moved: int, unit: str) -> tuple[float, str]:
    """Return the least seconds for the operations on `unit` and the bytes moved, and which of the two decides."""
    compute, memory = flops / gpu.flops_per_s[unit], moved / gpu.memory_bytes_per_s
    return (compute, "compute") if compute > memory else (memory, "memory")
