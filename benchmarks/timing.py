"""Timers for CPU and CUDA, peak memory, and the ceilings of the machine.

Functions are timed in turns (A B A B ...), so that a slow minute affects all of them alike.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Function = Callable[[], object]

_CPU_FLUSH = 1 << 26  # bytes; twice the last-level cache that cores of a large server share
_SLOW = 0.03  # seconds for a small matrix product on a CPU; one of full size would take 64 times as long


class Timer(Protocol):
    """Seconds of one call on one device."""

    def __call__(self, function: Function) -> float: ...


class CpuTimer:
    """Wall-clock seconds after overwriting the caches, so that no function profits from the previous one."""

    def __init__(self) -> None:
        self._flush = torch.empty(_CPU_FLUSH, dtype=torch.int8)

    def __call__(self, function: Function) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class CudaTimer:
    """Seconds between two events on the current stream, after overwriting the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device=device)

    def __call__(self, function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def make_timer(device: torch.device) -> Timer:
    """Return the timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def time_in_turns(
    functions: Sequence[Callable[[int], Function]], timer: Timer, rounds: int, warmups: int = 1
) -> list[tuple[float, ...]]:
    """Return the seconds of every round of every function, after `warmups` rounds that do not count.

    `functions[i](round)` does what must not be timed (choose inputs, run the forward before a backward) and
    returns what is timed.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(-warmups, rounds):
        for own, function in zip(seconds, functions, strict=True):
            elapsed = timer(function(turn))
            if turn >= 0:
                own.append(elapsed)
    return [tuple(own) for own in seconds]


def peak_memory(function: Function, device: torch.device) -> int:
    """Return the bytes allocated at the peak of a call, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    changes = [e for e in results.events() if e.name() == "[memory]"] if results else []
    allocated = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, object]:
    """Return the rates that this machine reaches: bytes/s of a copy (read plus written) and FLOP/s of a matrix
    product.

    They are measured, not looked up: each is the median of several runs at a size that fills the device. A processor
    without instructions for a dtype gets smaller matrices, for it would need minutes.
    """
    timer = make_timer(device)
    cuda = device.type == "cuda"
    source = torch.randn((1 << 30 if cuda else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    seconds = time_in_turns([lambda _: lambda: target.copy_(source)], timer, 9, warmups=3)[0]
    ceilings: dict[str, object] = {"copy_bytes_per_s": 2 * 4 * source.numel() / _median(seconds)}
    products = {}
    for dtype in dtypes:
        size = 8192 if cuda else 1536
        if not cuda and _product_seconds(timer, device, dtype, size // 4, 1) > _SLOW:
            size //= 4
        products[str(dtype).removeprefix("torch.")] = (
            2 * size**3 / _product_seconds(timer, device, dtype, size, 7)
        )
    return {**ceilings, "matmul_flops_per_s": products}


def _product_seconds(timer: Timer, device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _median(time_in_turns([lambda _: lambda: a @ b], timer, rounds, warmups=3)[0])


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]
