"""Medians of interleaved runs, and what a reader needs to reproduce them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider.

    Attributes:
        median_s: of `runs_s`.
        runs_s: wall-clock time of every run after the warm-up, in order.
        cpu_s: processor time of the same runs, all threads together; where it stays while the wall-clock
            time jumps, the machine was busy with something else.
    """

    median_s: float
    runs_s: tuple[float, ...]
    cpu_s: tuple[float, ...]


def time_interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each function `repeats` times after one warm-up, in turns: a slow minute hits all alike."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            seconds = _time_once(function)
            if turn:
                runs[name].append(seconds)
    timings = {}
    for name, pairs in runs.items():
        wall, cpu = zip(*pairs, strict=True)
        timings[name] = Timing(statistics.median(wall), wall, cpu)
    return timings


def describe_machine() -> dict[str, object]:
    """Processor, threads, versions and the load before the run."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _time_once(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
