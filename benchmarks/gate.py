"""`python -m benchmarks.gate OUT.json [--seconds N] [--keep-going]`: the GPU tests, op by op.

Writes what became of every op's tests, and stops at the first that is not green. `pytest benchmarks/ --gate
OUT.json` obeys it: an op of ours gets a figure only if its own tests passed, on this very source. What did not
run, was skipped or has no tests is not green.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from vot_kernels.data.files import atomic_write
from vot_kernels.ops.dispatch import OPS

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "gpu"
TARGETS = (*OPS, "encoder")  # the encoder is all ops together
PASSED = "passed"
Gate = Callable[[str], str | None]
"""Why an op may not be timed, None if it may."""


def run_tests(op: str, log: Path, seconds: float, tests: Path = TESTS) -> str:
    """ "passed", or why the tests of `op` do not count as passed; their output goes to `log`."""
    path = tests / f"test_{op}.py"
    if not path.exists():
        return "there are none"
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "-x", f"--junitxml={report}"]
    try:
        with log.open("w") as output:
            status = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    return judge(status, report)


def judge(status: int, report: Path) -> str:
    """From pytest's exit status and its JUnit report: all skipped is not passed."""
    if status != 0:
        return "failed" if status == 1 else f"pytest ended with status {status}"
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "skipped", "failures", "errors")
    }
    if total["failures"] or total["errors"]:
        return "failed"
    return PASSED if total["tests"] > total["skipped"] else "all skipped"


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over the package, the kernels and the GPU tests: results hold for this source alone."""
    digest = hashlib.sha256()
    for folder in ("vot_kernels/ops", "vot_kernels/tuning", "vot_kernels/reference", "kernels", "tests/gpu"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_gate(path: Path) -> Gate:
    """The gate that a results file stands for.

    Raises:
        ValueError: the file cannot be read, or is of another source.
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


def main() -> int:
    """Exit status 0 if every op is green."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the results go; logs lie beside it")
    parser.add_argument("--seconds", type=float, default=600, help="for all tests together (default 600)")
    parser.add_argument("--keep-going", action="store_true", help="test the other ops too after a red one")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    results = dict.fromkeys(TARGETS, "not run")
    for op in TARGETS:
        started = time.monotonic()
        log = options.out.parent / f"gpu-tests-{op}.log"
        results[op] = run_tests(op, log, max(1.0, deadline - started))
        with atomic_write(options.out) as path:
            path.write_text(json.dumps({"source": source_hash(), "ops": results}, indent=2) + "\n")
        print(f"{op:<24} {results[op]:<24} {time.monotonic() - started:6.1f} s", flush=True)
        if results[op] != PASSED:
            if log.exists():
                print("\n".join(log.read_text().splitlines()[-40:]))
            if not options.keep_going:
                print(f"stopped at {op}: no op after it gets a figure (--keep-going tests them too)")
                break
    return 0 if all(state == PASSED for state in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
