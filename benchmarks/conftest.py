"""Options of `pytest benchmarks/` and its output: a line for every race, and the machine at the end."""

import argparse
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.core import DIRECTIONS, Provider, Workload
from benchmarks.gate import Gate, read_gate
from benchmarks.progress import Progress
from benchmarks.providers import PROVIDERS, providers_of
from benchmarks.race import Rules
from benchmarks.session import Session, describe_device
from benchmarks.workloads import SUITES, workloads

_JSON = pytest.StashKey[Path | None]()
_CHOSEN = pytest.StashKey[list[tuple[Workload, str, Provider]]]()
_GATE = pytest.StashKey[Callable[[str], str | None]]()
_RULES = pytest.StashKey[Rules]()
_PROGRESS = pytest.StashKey[Progress]()
_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vot-kernels")
    add = group.addoption
    add("--suite", default="", help=f"only these, separated by commas: {', '.join(SUITES)}")
    add("--provider", default="", help="only these providers, separated by commas (case does not matter)")
    add("--workload", default="", help="only workloads whose name contains this text")
    add("--direction", default="", help=f"only these, separated by commas: {', '.join(DIRECTIONS)}")
    add("--quick", action="store_true", help="the quick suite: six minutes on two CPU cores")
    add("--device", default=None, choices=("cpu", "cuda"), help="default: cuda where there is one")
    add(
        "--threads",
        type=_number(int),
        default=None,
        help="CPU threads, pinned to as many cores (default: torch's own)",
    )
    add(
        "--rounds",
        type=_number(int),
        default=None,
        help="timed runs per provider (default: as many as fit 2 s)",
    )
    add(
        "--budget",
        type=_number(float),
        default=None,
        metavar="SECONDS",
        help="start nothing after so many seconds",
    )
    add(
        "--gate",
        type=Path,
        default=None,
        metavar="JSON",
        help="GPU test results by op: an op of ours that is not green there gets no figure",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Refuse wrong options before anything is measured."""
    options = config.option
    # We write the file ourselves, after every race: measured figures survive whatever comes next.
    config.stash[_JSON] = _writable(options.benchmark_json)
    options.benchmark_json = None
    config.stash[_CHOSEN] = _choose(options)
    config.stash[_GATE] = _gate(options.gate)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.threads:
        _pin(options.threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the machine and the versions here, because -q hides pytest's header."""
    described = describe_device(torch.device(config.stash[_CHOSEN][0][0].device))
    line = f"measured on {described['name']}, torch {torch.__version__}"
    if described["type"] == "cpu":
        line += f", {described['threads']} threads, pinned to cores {described['pinned_to'] or 'none'}"
    terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.stash[_CHOSEN]
    ids = [f"{w.suite}/{w.name}/{direction}/{p.name.replace(' ', '-')}" for w, direction, p in chosen]
    metafunc.parametrize(("workload", "direction", "provider"), chosen, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the clock of the run."""
    config, options = session.config, session.config.option
    rules = Rules(
        rounds=options.rounds,
        seconds_per_provider=0.5 if options.quick else 2.0,
        quick=options.quick,
        deadline=time.monotonic() + options.budget if options.budget else float("inf"),
        gate=config.stash[_GATE],
    )
    config.stash[_RULES] = rules
    if not (options.collectonly or options.benchmark_disable):
        config.stash[_PROGRESS] = Progress(filter(None, map(_entry, session.items)), rules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Announce the race that begins, above the dots of its providers."""
    progress, entry = item.config.stash.get(_PROGRESS, None), _entry(item)
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    line = progress.begin(*entry[:2]) if progress and entry else None
    if line and reporter:
        reporter.showfspath = False  # the one file of this suite, in front of the dots
        reporter.write(f"\n{line}\n", flush=True)


def _entry(item: pytest.Item) -> tuple[Workload, str, Provider] | None:
    """Return the workload, direction and provider of a test."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    return (given["workload"], given["direction"], given["provider"]) if "workload" in given else None


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Session:
    config = request.config
    chosen = config.stash[_CHOSEN]
    workloads, providers = [w for w, _, _ in chosen], [p.name for _, _, p in chosen]
    session = Session(config, config.stash[_JSON], workloads, providers, config.stash[_RULES])
    config.stash[_SESSION] = session
    session.start()
    return session


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    own = session.config.stash.get(_SESSION, None)
    if own is not None:
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        own.finish(complete=ended and not session.shouldfail and not session.shouldstop)


def _pin(threads: int) -> None:
    """Use as many threads as cores, where the system lets a process choose its cores."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def _choose(options: Any) -> list[tuple[Workload, str, Provider]]:
    """Return the selected workloads, directions and providers, in the order in which they run."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device; torch finds none")
    suites = _chosen(options.suite, SUITES, "suite")
    directions = _chosen(options.direction, DIRECTIONS, "direction")
    names = _chosen(options.provider, tuple(dict.fromkeys(p.name for p in PROVIDERS)), "provider")
    found = [
        (workload, direction, provider)
        for workload in workloads(device)
        if workload.suite in suites and options.workload in workload.name
        for direction in directions
        if direction in (workload.quick if options.quick else workload.directions)
        for provider in providers_of(workload.suite)
        if provider.name in names
    ]
    if not found:
        keys = ("suite", "workload", "direction", "provider")
        given = [f"--{key} {getattr(options, key)}" for key in keys if getattr(options, key)]
        given += ["--quick"] if options.quick else []
        raise pytest.UsageError(f"nothing to measure on {device}: no workload fits {' '.join(given)}")
    return found


def _chosen(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """Return the names listed in `text`, all if it is empty, in the order of `known`."""
    names = {_plain(name): name for name in known}
    words, wanted, unknown = [word for word in text.split(",") if word.strip()], set(), []
    while words:  # some names contain a comma, so the longest match first
        ends = [end for end in range(len(words), 0, -1) if _plain(",".join(words[:end])) in names]
        end = ends[0] if ends else 1
        (wanted.add if ends else unknown.append)(_plain(",".join(words[:end])))
        del words[:end]
    if unknown:
        raise pytest.UsageError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(known)}")
    return [name for name in known if not wanted or _plain(name) in wanted]


def _plain(name: str) -> str:
    """Return a name without the parts that users may type differently: case, and blanks around commas."""
    return ",".join(part.strip() for part in name.lower().split(","))


def _writable(path: Path | None) -> Path | None:
    """Return the path if a file can be written there, and make its folder."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("its folder is read-only")
    except OSError as error:
        raise pytest.UsageError(f"--benchmark-json {path} cannot be written: {error}") from None
    return path


def _number(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return the type of an option: a number above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be {kind.__name__} above 0, got {text!r}")
        return value

    return parse


def _gate(path: Path | None) -> Gate:
    if path is None:
        return lambda op: None
    try:
        return read_gate(path)
    except ValueError as error:
        raise pytest.UsageError(f"--gate: {error}") from None
