"""One run of the suite: it runs each race once, and its JSON is complete after every race."""

import gc
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vot_kernels
from benchmarks.core import Outcome, Provider, Work, Workload, anonymous
from benchmarks.providers import providers_of
from benchmarks.race import Rules, race
from benchmarks.timing import measure_ceilings
from vot_kernels.cpp.library import library
from vot_kernels.files import atomic_write

if TYPE_CHECKING:  # other programs use the rest of this file without pytest
    import pytest

SCHEMA = 1


class Session:
    """The outcomes of all races so far, and the file that they are written to.

    Args:
        config: the configuration of pytest, whose hooks make the JSON of pytest-benchmark.
        path: the file of the JSON, None for no file.
        workloads, providers: the selected ones, at least one of each.
        rules: the rules of the races.
    """

    def __init__(
        self,
        config: "pytest.Config",
        path: Path | None,
        workloads: Sequence[Workload],
        providers: Sequence[str],
        rules: Rules,
    ) -> None:
        self._config, self._path, self._rules = config, path, rules
        self._providers = set(providers)
        self._stats: list[Any] = []
        self._races: dict[tuple[str, str, str], dict[str, Outcome]] = {}
        self._records: list[dict[str, Any]] = []
        self._machine: dict[str, Any] = {}
        self._commit: dict[str, Any] = {}
        self._device = torch.device(workloads[0].device)
        self._dtypes = sorted({w.dtype for w in workloads if w.dtype.is_floating_point}, key=str)
        arguments = [anonymous(str(argument)) for argument in config.invocation_params.args]
        self._facts: dict[str, Any] = {
            "schema": SCHEMA,
            "device": describe_device(self._device),
            "versions": versions(),
            "command": " ".join(["pytest", *arguments]),
            "ceilings": {},
            "complete": False,
        }

    def start(self) -> None:
        """Describe the machine and measure its ceilings; the file exists from now on."""
        self.write()
        machine = self._config.hook.pytest_benchmark_generate_machine_info(config=self._config)
        # The name of the machine stays private.
        self._machine = {key: value for key, value in machine.items() if key not in ("node", "release")}
        commit = self._config.hook.pytest_benchmark_generate_commit_info(config=self._config)
        self._commit = {key: commit.get(key) for key in ("id", "time", "dirty")}
        if not self._rules.out_of_time():
            self._facts["ceilings"] = measure_ceilings(self._device, self._dtypes)
        gc.freeze()  # a collection during a timed call need not visit everything that was imported
        self.write()

    def outcome(self, workload: Workload, direction: str, provider: Provider) -> Outcome:
        """Return the outcome of one provider; the first request for a workload and direction runs the race."""
        key = (workload.suite, workload.name, direction)
        if key not in self._races:
            chosen = [p for p in providers_of(workload.suite) if p.name in self._providers]
            self._races[key] = race(workload, direction, chosen, self._rules)
            for competitor in chosen:
                found = self._races[key][competitor.name]
                verdict = {"status": str(found.status), "reason": found.reason, "notes": found.notes}
                self._records.append({**race_facts(workload, direction, competitor), **verdict})
            self.write()
        return self._races[key][provider.name]

    def keep(self, stats: Any) -> None:
        """Add the figures of one benchmark to the JSON."""
        self._stats.append(stats)
        self.write()

    def finish(self, complete: bool) -> None:
        """Write the last state of the JSON."""
        self._facts["complete"] = complete
        self.write()

    def write(self) -> None:
        """Write the JSON of pytest-benchmark with our facts added, complete at any moment."""
        if self._path is None:
            return
        output = self._config.hook.pytest_benchmark_generate_json(
            config=self._config,
            benchmarks=self._stats,
            include_data=True,
            machine_info=self._machine,
            commit_info=self._commit,
        )
        output["vot_kernels"] = {**self._facts, "outcomes": self._records}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as temporary:
            temporary.write_text(json.dumps(output, indent=1, default=str) + "\n")


def race_facts(workload: Workload, direction: str, provider: Provider) -> dict[str, Any]:
    """Return what the report needs to know of a provider on a workload, apart from the measurements."""
    problem = workload.problem
    try:
        work = problem.work(direction, workload.dtype.itemsize)
    except ImportError:  # the sizes come from an optional package, without which nobody can solve the problem
        work = Work(0, 0)
    return {
        "suite": workload.suite,
        "workload": workload.name,
        "direction": direction,
        "provider": provider.name,
        "ours": provider.ours,
        "instead": provider.instead,
        "describe": problem.describe(),
        "op": problem.op,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "size": problem.size,
        **asdict(work),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return name, capability and sizes of a GPU; or the processor, its threads, the cores they are pinned to, and
    the instruction set of the C++ kernels, None without these kernels."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    return {
        "type": "cpu",
        "name": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pinned_to": _pinned_cores(),
        "cpp_isa": library().isa or None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _pinned_cores() -> list[int] | None:
    """Return the cores on which the process may run, None if these are all or not known."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores if len(cores) <= torch.get_num_threads() else None


def versions() -> dict[str, str | None]:
    """Return the versions of everything that may explain a figure; None for packages that are not installed."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "triton", "numpy", "transformers", "pytest-benchmark")
    found: dict[str, str | None] = {
        "vot-kernels": vot_kernels.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {
        **found,
        "platform": f"{platform.system()} {platform.machine()}",
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
