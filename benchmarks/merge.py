"""`python -m benchmarks.merge OUT.json PART.json ...`: merge the parts of one run on one device into one result.

A GPU run has a process for every suite, so that a peer that breaks the device's context breaks only its own suite. A
part that is missing or broken is left out, and the whole is then incomplete.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.runs import BrokenResult, read_result
from vot_kernels.files import atomic_write


def merge(parts: Sequence[dict[str, Any]], *, command: str = "") -> dict[str, Any]:
    """Join benchmarks and outcomes; machine, versions and ceilings come from the first part."""
    facts = [part["vot_kernels"] for part in parts]
    products: dict[str, float] = {}
    for fact in reversed(facts):
        products |= fact["ceilings"].get("matmul_flops_per_s", {})
    whole = {
        **facts[0],
        "command": command or facts[0]["command"],
        "ceilings": {**facts[0]["ceilings"], "matmul_flops_per_s": products},
        "complete": all(fact["complete"] for fact in facts),
        "outcomes": [outcome for fact in facts for outcome in fact["outcomes"]],
    }
    benchmarks = [benchmark for part in parts for benchmark in part["benchmarks"]]
    return {**parts[0], "benchmarks": benchmarks, "vot_kernels": whole}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit status 0 if all parts were there and complete, 1 if not, 2 if there was none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--command", default="", help="what to call the whole run in its report")
    options = parser.parse_args(arguments)
    found = []
    for path in options.parts:
        try:
            read_result(path)
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except BrokenResult as error:
            print(error, file=sys.stderr)
    if not found:
        return 2
    whole = merge(found, command=options.command)
    whole["vot_kernels"]["complete"] &= len(found) == len(options.parts)
    with atomic_write(options.out) as path:
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0 if whole["vot_kernels"]["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
