"""`python -m benchmarks.gate OUT.json [--seconds N] [--jobs N] [--keep-going]`: the GPU tests, op by op.

It writes the state of every op's tests, and stops at the first op that is not green. `pytest benchmarks/ --gate
OUT.json` uses it: an op of ours gets a figure only if its own tests passed, on this exact source. An op whose
tests did not run, were skipped or do not exist is not green. Most of the time goes into compiling, so the tests of
an op are divided into shards (`VOT_GPU_TESTS_SHARD` of `tests/gpu/conftest.py`), each a process of its own.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vot_kernels.files import atomic_write
from vot_kernels.ops.dispatch import OPS

ROOT = Path(__file__).resolve().parent.parent
# The sources that the GPU tests run, besides the tests themselves.
SOURCES = (
    *(
        f"vot_kernels/{name}"
        for name in ("packing.py", "testing.py", "files.py", "ops", "tuning", "nn", "models")
    ),
    *(f"vot_kernels/{name}" for name in ("data", "pipelines", "reasoning", "scene_graph")),
    "kernels",
)
TESTS = ROOT / "tests" / "gpu"
# The encoder combines all ops; the tests after it hold no op back.
TARGETS = (*OPS, "encoder", "flash_attention", "graphs", "range_attention_tma", "video_qa")
GOOD = PASSED, SKIPPED, NONE = "passed", "all skipped", "there are none"  # of a shard; an op must have passed
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu")
MOST = 16  # default limit of processes, because each takes GPU memory too
FEWEST = 8  # tests in one of several shards, because a process takes seconds to start
Gate = Callable[[str], str | None]
"""Why an op may not be timed, None if it may."""


@dataclass(frozen=True)
class Shard:
    """Part `number` of the `count` into which the tests of an op are divided.

    Attributes:
        tests: the folder of the tests.
        logs: the folder of their output, `gpu-tests-<op>-<number>.log`.
    """

    op: str
    number: int
    count: int
    tests: Path
    logs: Path

    @property
    def path(self) -> Path:
        return self.tests / f"test_{self.op}.py"

    @property
    def log(self) -> Path:
        return self.logs / f"gpu-tests-{self.op}-{self.number}.log"

    @property
    def report(self) -> Path:
        return self.log.with_suffix(".xml")

    def start(self, environment: dict[str, str]) -> subprocess.Popen:
        self.report.unlink(missing_ok=True)
        command = [*PYTEST, str(self.path), "-x", f"--junitxml={self.report}"]
        environment = environment | {"VOT_GPU_TESTS_SHARD": f"{self.number}/{self.count}"}
        with self.log.open("w") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def judge(self, status: int) -> str:
        """Return "passed", or why this shard did not pass, from pytest's exit status and its JUnit report."""
        if status == 5 or not self.path.exists():
            return NONE
        if status != 0:
            return "failed" if status == 1 else f"pytest ended with status {status}"
        suites = list(ElementTree.parse(self.report).getroot().iter("testsuite"))
        total = {
            key: sum(int(suite.get(key, 0)) for suite in suites)
            for key in ("tests", "skipped", "failures", "errors")
        }
        if total["failures"] or total["errors"]:
            return "failed"
        return PASSED if total["tests"] > total["skipped"] else SKIPPED


def judge_op(shards: Sequence[str]) -> str:
    """Return the first bad state of the shards, else "passed" if a test of any of them ran."""
    bad = [state for state in shards if state not in GOOD]
    return (bad or [state for state in GOOD if state in shards])[0]


class Pool:
    """A pool that runs the shards in `waiting`, at most `jobs` at a time, in their order, for at most `seconds`.

    It is a context manager: no process outlives it.
    """

    def __init__(self, jobs: int, seconds: float):
        self.waiting: list[Shard] = []
        self.running: dict[Shard, subprocess.Popen] = {}
        self.jobs, self.seconds, self.deadline = jobs, seconds, time.monotonic() + seconds
        self.environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})  # they share the cores

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop({shard.op for shard in self.running})

    def __iter__(self) -> Iterator[tuple[Shard, str]]:
        """Yield every shard that is not dropped meanwhile, and its state, as soon as it is known."""
        late = f"not finished in {self.seconds:.0f} s"
        while self.waiting or self.running:
            over = time.monotonic() >= self.deadline
            while self.waiting and not over and len(self.running) < self.jobs:
                shard = self.waiting.pop(0)
                self.running[shard] = shard.start(self.environment)
            for shard, process in list(self.running.items()):
                status = process.poll()
                if shard in self.running and (over or status is not None):
                    self._end(shard)
                    yield shard, late if status is None else shard.judge(status)
            while self.waiting and over:
                yield self.waiting.pop(0), late
            time.sleep(0.02)

    def drop(self, ops: Collection[str]) -> None:
        """Forget these ops, and end their running shards."""
        self.waiting = [shard for shard in self.waiting if shard.op not in ops]
        for shard in [shard for shard in self.running if shard.op in ops]:
            self._end(shard)

    def _end(self, shard: Shard) -> None:
        process = self.running.pop(shard)
        process.kill()
        process.wait()


def count_tests(ops: Sequence[str], seconds: float, tests: Path = TESTS) -> dict[str, int]:
    """Return how many tests each op has, for the ops whose tests can be collected within `seconds`."""
    paths = [str(path) for op in ops if (path := tests / f"test_{op}.py").exists()]
    command = [*PYTEST, *paths, "--collect-only", "-qq"]
    environment = os.environ | {"VOT_GPU_TESTS_SHARD": "1/1"}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {}
    return {op: int(count) for op, count in re.findall(r"\btest_(\w+)\.py: (\d+)$", run.stdout, re.MULTILINE)}


def divide(ops: Sequence[str], counts: dict[str, int], jobs: int, tests: Path, logs: Path) -> list[Shard]:
    """Return the shards of all ops: up to `jobs` for each, unless it has few tests."""
    shards = []
    for op in ops:
        count = max(1, min(jobs, counts.get(op, 0) // FEWEST))
        shards += [Shard(op, number, count, tests, logs) for number in range(1, count + 1)]
    for shard in shards:
        shard.log.unlink(missing_ok=True)  # that of an earlier run
    return shards


def run_gate(
    out: Path,
    jobs: int,
    seconds: float,
    keep_going: bool = False,
    ops: Sequence[str] = TARGETS,
    tests: Path = TESTS,
) -> dict[str, str]:
    """Return the state of the tests of every op; `out` is rewritten whenever one of them becomes known.

    Without `keep_going` a red op ends the ops after it; ops before it and shards that have passed still count.
    """
    results, states = dict.fromkeys(ops, "not run"), {op: list[str]() for op in ops}
    started = time.monotonic()
    with Pool(jobs, seconds) as pool:
        counts = count_tests(ops, seconds, tests) if jobs > 1 else {}
        pool.waiting = divide(ops, counts, jobs, tests, out.parent)
        for shard, state in pool:
            op = shard.op
            states[op].append(state)
            if state in GOOD and len(states[op]) < shard.count:
                continue
            results[op] = judge_op(states[op])
            with atomic_write(out) as path:
                path.write_text(json.dumps({"source": source_hash(), "ops": results}, indent=2) + "\n")
            print(f"{op:<24} {results[op]:<24} after {time.monotonic() - started:6.1f} s", flush=True)
            if results[op] == PASSED:
                continue
            if shard.log.exists():
                print("\n".join(shard.log.read_text().splitlines()[-40:]))
            pool.drop([op] if keep_going else ops[ops.index(op) :])
            if not keep_going:
                print(
                    f"stopped at {op}: what is not done after it is left (--keep-going tests it too)",
                    flush=True,
                )
    return results


def source_hash(root: Path = ROOT, besides: str = "tests/gpu") -> str:
    """Return SHA-256 over the package, the kernels and the folder `besides`: results hold only for this source."""
    digest = hashlib.sha256()
    for part in (*SOURCES, besides):
        for path in sorted([root / part, *(root / part).rglob("*")]):
            if path.suffix in (".py", ".json") and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_gate(path: Path) -> Gate:
    """Return the gate that a results file defines.

    Raises:
        ValueError: the file cannot be read, or was made with another source.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results, source = content["ops"], content["source"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of python -m benchmarks.gate ({error}).") from None
    if source != source_hash():
        raise ValueError(f"{path} was made with other sources; run python -m benchmarks.gate {path} again.")

    def gate(op: str) -> str | None:
        state = results.get(op, "not run")
        return None if state == PASSED else f"GPU tests of {op}: {state}"

    return gate


def positive(text: str) -> int:
    """Parse a number of processes, for argparse."""
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main() -> int:
    """Return exit status 0 if every op is green."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the results go; logs lie beside it")
    parser.add_argument("--seconds", type=float, default=600, help="for all tests together (default 600)")
    jobs = min(os.cpu_count() or 1, MOST)
    parser.add_argument("--jobs", type=positive, default=jobs, help=f"processes at a time (default {jobs})")
    parser.add_argument("--keep-going", action="store_true", help="test the other ops too after a red one")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = run_gate(options.out, options.jobs, options.seconds, options.keep_going)
    return 0 if all(state == PASSED for state in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
