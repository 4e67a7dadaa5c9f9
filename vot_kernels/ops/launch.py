"""Launching Triton kernels: on a GPU, on the interpreter, or into a list for ahead-of-time compilation."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from vot_kernels.tuning import INTERPRETER, Config, lookup
from vot_kernels.tuning.autotune import TUNER, Tuner

# Programs along each axis, or how many there are with given blocks.
Grid = tuple[int, ...] | Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """One launch as it would have happened.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        arguments: every argument by name: tensors, numbers, None, and the constexprs.
        config: its blocks are among the arguments; its limits are for the compiler's output.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config


# Read once, as Triton itself does, and plain globals: torch.compile traces through the dispatch.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = find_spec("triton") is not None
_OLDEST_GPU = (8, 0)  # older ones have no bfloat16 and too little shared memory for the shipped blocks
_recording: tuple[str, list[Launch]] | None = None


def find_config(op: str, kernel: str, device: torch.device, **key: int) -> Config:
    """The config of `kernel` of `op` for `device` and `key`: the shipped one, or with VOT_AUTOTUNE=1 a tuned one.

    Raises:
        LookupError: see `vot_kernels.tuning.lookup`.
    """
    shipped = lookup(op, kernel, target_arch(device), **key)
    tuner = _tuner(device)
    return shipped if tuner is None else tuner.find(shipped) or shipped


def launch(kernel: Any, grid: Grid, config: Config, **arguments: Any) -> None:
    """Run `kernel` on `grid` with `arguments` and the blocks of `config`, on the device of the first tensor.

    Nothing is launched on an empty grid. While `record_launches` is active, the launch is noted instead.

    Args:
        grid: a function of the blocks. Numbers forbid tuning, which repeats the launch with other blocks: a
            kernel must have them that reads what it writes.
    """

    def programs(config: Config) -> tuple[int, ...]:
        return grid(config.blocks) if callable(grid) else grid

    if 0 in programs(config):
        return
    if _recording is not None:
        _recording[1].append(Launch(kernel, programs(config), {**arguments, **config.blocks}, config))
        return
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))

    def run(config: Config) -> None:
        kernel[programs(config)](**arguments, **config.launch_options())

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        tuner = _tuner(device) if callable(grid) and config.request is not None else None
        if tuner is not None and not torch.cuda.is_current_stream_capturing():
            config = tuner.tune(config, run)
        run(config)


def _tuner(device: torch.device) -> Tuner | None:
    """None unless tuning was asked for and kernels really run on a GPU."""
    return TUNER if device.type == "cuda" and not INTERPRETING and _recording is None else None


@contextmanager
def record_launches(arch: str) -> Iterator[list[Launch]]:
    """Collect what ops with `backend="triton"` would launch on `arch` ("sm_90"), on CPU tensors, running nothing.

    The ops' results are uninitialized memory then.
    """
    global _recording
    launches: list[Launch] = []
    before = _recording
    _recording = (arch, launches)
    try:
        yield launches
    finally:
        _recording = before


def target_arch(device: torch.device) -> str:
    """The architecture to choose a config for: of the GPU, of `record_launches`, or "interpreter"."""
    if _recording is not None:
        return _recording[0]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return INTERPRETER


def is_interpreted(device: torch.device) -> bool:
    """Whether kernels on tensors of `device` would run in Triton's interpreter."""
    return device.type == "cpu" and INTERPRETING and _recording is None


def why_not_triton(device: torch.device) -> list[str]:
    """Reasons why no Triton kernel can run on tensors of `device`; empty if one can."""
    if not _HAS_TRITON:
        return ["triton is not installed (it comes with vot-kernels on Linux x86-64)"]
    if device.type == "cuda":
        return _why_too_old(device)
    if device.type == "cpu" and (INTERPRETING or _recording is not None):
        return []
    if device.type == "cpu":
        return ["no Triton kernel runs on CPU tensors, unless TRITON_INTERPRET=1 is set to test them"]
    return [f"no Triton kernel runs on {device.type} tensors"]


def _why_too_old(device: torch.device) -> list[str]:
    """Of a GPU that is not there nothing bad is known."""
    if not torch.cuda.is_available():
        return []
    gpu = torch.cuda.get_device_properties(device)  # unlike get_device_capability, torch.compile can trace it
    if (gpu.major, gpu.minor) >= _OLDEST_GPU:
        return []
    oldest = ".".join(map(str, _OLDEST_GPU))
    return [f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, Triton kernels need {oldest}"]


def ceil_div(size: int, block: int) -> int:
    """Blocks that hold `size`."""
    return -(-size // block)


def padded(width: int) -> int:
    """Columns of a block that holds `width` of them: a power of two, at least the 16 of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x`, or one copy of it: columns lie side by side, and 128 rows span less than 2**31 numbers.

    Any other stride of rows and heads is taken as it is.
    """
    side_by_side = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if side_by_side and x.stride(0) < 2**24 else x.contiguous()


def matrices_contiguous(w: torch.Tensor) -> torch.Tensor:
    """`w` `[n, rows, columns]`, or a copy of it: the rows or the columns of its matrices lie side by side."""
    return w if 1 in w.stride()[1:] else w.contiguous()
