"""Launching of Triton kernels: on a GPU, on the interpreter, or into a list for ahead-of-time compilation.

A launcher declares each kernel once and launches it by keyword:

    FWD = Kernel("range_attention", "fwd", "range_attention.fwd:_range_attention_fwd_kernel")
    FWD.launch(grid, key={"head_dim": 64, "bits": 16}, q_ptr=q, **strides(q=q))
"""

import contextvars
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor

from vot_kernels.tuning import INTERPRETER, Config, lookup, smaller
from vot_kernels.tuning.tuned import use_tuned_once

# The number of programs along each axis, or a function that computes it from the block sizes.
Grid = tuple[int, ...] | Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        arguments: all arguments by name: tensors, numbers, None, and the constexprs.
        config: its block sizes are among the arguments; its limits apply to the compiler's output.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config


# These are read once, as Triton reads them, and are plain globals, because torch.compile traces through the dispatch.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_TUNED = os.environ.get("VOT_TUNED") == "1"
_HAS_TRITON = find_spec("triton") is not None
_VECTOR = 8  # 16-bit elements in the widest load
_OLDEST_GPU = (8, 0)  # older GPUs have no bfloat16 and too little shared memory for the shipped block sizes
_recording: tuple[str, list[Launch]] | None = None
_checking = INTERPRETING


@dataclass(frozen=True)
class Kernel:
    """A kernel by name. The first launch imports its device code, and Triton with it.

    Attributes:
        family: its config table is `vot_kernels/tuning/configs/<arch>/<family>.json`.
        name: its name in that table.
        source: its place below `vot_kernels.kernels`, as "module:function".
    """

    family: str
    name: str
    source: str

    @cached_property
    def function(self) -> Any:
        """The `@triton.jit` function."""
        module, function = self.source.split(":")
        return getattr(import_module(f"..kernels.{module}", __package__), function)

    def config(
        self,
        device: torch.device,
        key: Mapping[str, int] | None = None,
        *,
        prefer: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> Config:
        """Return the config for `device` and `key`; see `vot_kernels.tuning.lookup` for the variants and the errors."""
        if _TUNED and device.type == "cuda" and _recording is None:
            use_tuned_once(torch.cuda.get_device_name(device), target_arch(device))
        return lookup(
            self.family, self.name, target_arch(device), prefer=prefer, exclude=exclude, **(key or {})
        )

    def launch(
        self,
        grid: Grid,
        *,
        key: Mapping[str, int] | None = None,
        config: Config | None = None,
        **arguments: Any,
    ) -> None:
        """Call `launch` with the config for `key`, or with one that the caller has looked up.

        Args:
            arguments: a tensor `x_ptr` must be contiguous unless its strides, such as `x_stride` or `x_head_stride`,
                are among them, as `strides` returns them. The interpreter and `record_launches` check that; on a GPU
                it would only cost time, for the tests of a launcher have found what it does wrong.

        Raises:
            ValueError: a tensor is not contiguous and the arguments do not have its strides.
        """
        if _checking:
            _check_strides(f"{self.family} {self.name}", arguments)
        found = self.config(_device(arguments), key) if config is None else config
        launch(self.function, grid, found, arguments)


def _check_strides(kernel: str, arguments: Mapping[str, Any]) -> None:
    """Refuse tensors from which the kernel would read the wrong elements."""
    others = [*map(str.lower, arguments)]
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or x.is_contiguous():
            continue
        prefix = name.removesuffix("ptr").lower()
        told = [other for other in others if re.fullmatch(rf"{prefix}(\w+_)?stride", other)]
        columns = x.stride(-1) == 1 or x.shape[-1] == 1 or f"{prefix}transposed" in others
        if len(told) != x.ndim - 1 or not columns:
            raise ValueError(
                f"{kernel}: {name} has shape {list(x.shape)} and strides {list(x.stride())}; the kernel takes "
                f"{len(told)} of these and needs the other dimensions contiguous."
            )


def launch(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
    """Run `kernel` on `grid` with `arguments` and the block sizes of `config`, on the device of the first tensor.

    An empty grid launches nothing. While `record_launches` is active, the launch is recorded instead.

    Args:
        kernel: the `@triton.jit` function.
        grid: the number of programs along each axis, or a function of the block sizes that returns it.
    """
    programs = grid(config.blocks) if callable(grid) else grid
    if 0 in programs:
        return
    if _watchers.innermost is None:
        start(kernel, grid, config, arguments)
    else:
        with _watchers.innermost(kernel, grid, config, arguments):
            start(kernel, grid, config, arguments)


def start(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
    """Do what `launch` does, for a grid that is not empty, without a word to who watches launches."""

    def programs(config: Config) -> tuple[int, ...]:
        return grid(config.blocks) if callable(grid) else grid

    if _recording is not None:
        _recording[1].append(Launch(kernel, programs(config), {**arguments, **config.blocks}, config))
        return
    device = _device(arguments)

    def run_with(config: Config) -> None:
        kernel[programs(config)](**arguments, **config.launch_options())

    def run() -> None:
        run_within_resources(run_with, config, any_blocks=callable(grid))

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if config.blocks.get("USE_TMA"):
            with_workspace(run)
        else:
            run()


# Called with the arguments of a launch; the launch takes place inside what it returns.
Watcher = Callable[[Any, Grid, Config, dict[str, Any]], AbstractContextManager[None]]


class _Watchers(threading.local):
    innermost: Watcher | None = None


_watchers = _Watchers()


@contextmanager
def watched_launches(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` for each launch of this thread, other than empty ones."""
    before = _watchers.innermost
    _watchers.innermost = watcher
    try:
        yield
    finally:
        _watchers.innermost = before


# What ran in place of a config that asks for more than the GPU has, by the id of that config, which is kept with it.
_SMALLER: dict[int, tuple[Config, Config]] = {}


def run_within_resources(run: Callable[[Config], None], config: Config, *, any_blocks: bool) -> None:
    """Call `run` with `config`, or if the GPU lacks the resources for it, with the next smaller one that fits.

    Args:
        any_blocks: whether the launch takes other block sizes; if not, the smaller config has the same blocks.

    Raises:
        triton.runtime.errors.OutOfResources: the GPU lacks them even for the smallest config.
    """
    from triton.runtime.errors import OutOfResources

    try:
        return run(fitting(config))
    except OutOfResources as error:
        lacking = error
    for other in smaller(config):
        if not any_blocks and other.blocks != config.blocks:
            continue
        try:
            run(other)
        except OutOfResources:
            continue
        _SMALLER[id(config)] = config, other
        kernel = "a kernel" if config.request is None else f"{config.request.family} {config.request.kernel}"
        warnings.warn(
            f"This GPU lacks the resources for {kernel} with {config.launch_options()} ({lacking}), which runs with "
            f"{other.launch_options()} instead; results are the same, speed may not be.",
            stacklevel=2,
        )
        return None
    raise lacking


def fitting(config: Config) -> Config:
    """Return the config that `run_within_resources` uses for `config`, as far as it is known."""
    known = _SMALLER.get(id(config))
    return config if known is None else known[1]


def with_workspace(run: Callable[[], None]) -> None:
    """Call `run`, which launches a kernel that makes tensor descriptors; Triton asks PyTorch for their memory.

    Triton keeps the allocator in a context variable, which is unset on autograd's threads. It is set in a copy of the
    context, so that the caller's own allocator stays.
    """

    def run_here() -> None:
        import triton

        triton.set_allocator(_allocate_workspace)
        run()

    contextvars.copy_context().run(run_here)


def _allocate_workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate on the current device and stream, like the launch; the allocator reuses memory in stream order."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _device(arguments: Mapping[str, Any]) -> torch.device:
    return next(x.device for x in arguments.values() if isinstance(x, Tensor))


@contextmanager
def record_launches(arch: str, *, checked: bool = True) -> Iterator[list[Launch]]:
    """Collect what ops with `backend="triton"` would launch on `arch` ("sm_90") for CPU tensors, without running it.

    The results of the ops are then uninitialized memory.

    Args:
        checked: check the strides of every launch; False leaves that out, as a launch on a GPU does.
    """
    global _recording, _checking
    launches: list[Launch] = []
    before = _recording, _checking
    _recording, _checking = (arch, launches), checked
    try:
        yield launches
    finally:
        _recording, _checking = before


def is_recording() -> bool:
    """Whether `record_launches` is active."""
    return _recording is not None


def target_arch(device: torch.device) -> str:
    """Return the architecture to choose a config for: that of the GPU or of `record_launches`, or "interpreter"."""
    if _recording is not None:
        return _recording[0]
    return _arch_of_gpu(device) if device.type == "cuda" else INTERPRETER


@lru_cache(maxsize=64)
def _arch_of_gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_interpreted(device: torch.device) -> bool:
    """Whether kernels on tensors of `device` would run in Triton's interpreter."""
    return device.type == "cpu" and INTERPRETING and _recording is None


def why_not_triton(device: torch.device) -> list[str]:
    """Return the reasons why no Triton kernel can run on tensors of `device`; the list is empty if one can."""
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
    """Say whether the GPU is too old. Without a visible GPU (compile-only run) assume that it is supported."""
    if not torch.cuda.is_available():
        return []
    gpu = torch.cuda.get_device_properties(device)  # unlike get_device_capability, torch.compile can trace it
    if (gpu.major, gpu.minor) >= _OLDEST_GPU:
        return []
    oldest = ".".join(map(str, _OLDEST_GPU))
    return [f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, Triton kernels need {oldest}"]


def ceil_div(size: int, block: int) -> int:
    """Return how many blocks hold `size` elements."""
    return -(-size // block)


def padded(width: int) -> int:
    """Return the columns of a block for `width` columns: a power of two, at least the 16 of a matrix product."""
    return max(16, 1 << (width - 1).bit_length())


def contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return `x`, in `dtype` if given, or a contiguous copy of it. None stays None."""
    if x is None or ((dtype is None or x.dtype == dtype) and x.is_contiguous()):
        return x
    return x.to(dtype or x.dtype).contiguous()


def rows_contiguous(x: Tensor, *, compact: bool = False) -> Tensor:
    """Return `x`, or a copy of it if its columns are not contiguous. All other strides are accepted.

    Args:
        compact: 128 rows must also span less than 2**31 elements, for kernels that address a block with 32 bits.
    """
    side_by_side = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if side_by_side and not (compact and x.stride(0) >= 2**24) else x.contiguous()


def matrices_contiguous(w: Tensor) -> Tensor:
    """Return `w` `[n, rows, columns]`, or a copy of it if neither rows nor columns of its matrices are contiguous."""
    return w if 1 in w.stride()[1:] else w.contiguous()


def strides(matrices: Mapping[str, Tensor | None] | None = None, /, **rows: Tensor | None) -> dict[str, Any]:
    """Return the stride arguments of a kernel, in units of `STRIDE_UNIT` elements; 0 for None.

    Triton specialises an argument on being a multiple of 16. A multiple of 8 elements is enough for the widest loads,
    and heads of 72 or 40 elements are such multiples, so the unit is the largest divisor of all strides up to 8.

    Args:
        matrices: `[n, rows, columns]` as `matrices_contiguous` returns them. `NAME_stride` is the stride of the
            dimension that is not contiguous, the columns if `NAME_TRANSPOSED`; `NAME_expert_stride` leads to the next
            matrix.
        rows: `[rows, columns]` or `[rows, heads, columns]` as `rows_contiguous` returns them. `NAME_stride` leads to
            the next row, and `NAME_head_stride`, with three dimensions, to the next head.
    """
    if not matrices:
        return _strides_of_rows(
            tuple([(name, None if x is None else x.stride()) for name, x in rows.items()])
        )
    found, transposed = _by_name([(name, None if x is None else x.stride()) for name, x in rows.items()]), {}
    for name, w in matrices.items():
        columns_apart = w is not None and w.stride(2) != 1
        transposed[f"{name.upper()}_TRANSPOSED"] = columns_apart
        found[f"{name}_expert_stride"] = 0 if w is None else w.stride(0)
        found[f"{name}_stride"] = 0 if w is None else w.stride(2 if columns_apart else 1)
    return _in_units(found) | transposed


_Strides = Iterable[tuple[str, tuple[int, ...] | None]]


@lru_cache(maxsize=1024)
def _strides_of_rows(rows: tuple[tuple[str, tuple[int, ...] | None], ...]) -> dict[str, int]:
    """Return the arguments for rows of these strides; nobody changes the dict."""
    return _in_units(_by_name(rows))


def _by_name(rows: _Strides) -> dict[str, int]:
    found = {}
    for name, stride in rows:
        found[f"{name}_stride"] = 0 if stride is None else stride[0]
        if stride is not None and len(stride) == 3:
            found[f"{name}_head_stride"] = stride[1]
    return found


def _in_units(found: Mapping[str, int]) -> dict[str, int]:
    small = all(n < 2**31 for n in found.values())  # the kernels multiply by the unit in 32 bits
    unit = gcd(_VECTOR, *found.values()) if small else 1
    return {name: n // unit for name, n in found.items()} | {"STRIDE_UNIT": unit}
