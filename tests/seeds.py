"""`python -m tests.seeds --seeds 0-19 tests/ops`: the tests under other random numbers, threads and CPU instructions.

Each seed is two runs of pytest, as in `make test`, in one of twelve environments. A finished run is written to a
file at once and not repeated: interrupt at any time, and delete the file (or a line of it) to run again.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

THREADS = [{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}]
INSTRUCTIONS = [{}, {"VOT_CPU_ISA": "avx2"}]  # of the C++ kernels; the first is the best there is
CAPABILITIES = [{}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"}]  # of PyTorch
ENVIRONMENTS = [
    THREADS[i % 2] | INSTRUCTIONS[i // 2 % 2] | CAPABILITIES[i % 3]  # neighbours differ, and no two are equal
    for i in range(12)
]
CHOSEN_HERE = ("OMP_NUM_THREADS", "VOT_CPU_ISA", "ATEN_CPU_CAPABILITY", "VOT_TEST_SEED", "TRITON_INTERPRET")


def seeds(text: str) -> list[int]:
    """Parse `3` or `0-19`, the last one included."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def environment(seed: int, interpreted: bool) -> dict[str, str]:
    """Return what a run adds to the environment; twelve seeds in a row cover all of ENVIRONMENTS."""
    added = {"VOT_TEST_SEED": str(seed)} | ENVIRONMENTS[seed % len(ENVIRONMENTS)]
    return added | ({"TRITON_INTERPRET": "1"} if interpreted else {})


def failures(added: dict[str, str], marks: str, paths: list[str]) -> list[str]:
    """Return the ids of the tests that fail in this environment, or else how pytest ended."""
    base = {name: value for name, value in os.environ.items() if name not in CHOSEN_HERE}
    kind = "interpreter" if "TRITON_INTERPRET" in added else "not interpreter"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--tb=no",
        "-rfE",
        "-m",
        f"{kind} and not gpu and ({marks})",
        *paths,
    ]
    ended = subprocess.run(command, env=base | added, stdout=subprocess.PIPE, text=True)
    lines = ended.stdout.splitlines()
    found = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if ended.returncode not in (0, 1, 5):  # all passed, some failed, none was chosen
        found.append(f"pytest ended with status {ended.returncode}: {' '.join(lines[-1:])}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=["tests"])
    parser.add_argument("--seeds", type=seeds, default=seeds("0-19"), help="3, or 0-19")
    parser.add_argument("--marks", default="not slow", help="as pytest's -m")
    parser.add_argument("--kind", choices=["interpreter", "torch"], help="one of the two runs alone")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds.jsonl"), help="the runs that ended")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    ended = [json.loads(line) for line in options.out.read_text().splitlines()]
    total = 0
    for seed, kind in product(options.seeds, [options.kind] if options.kind else ["torch", "interpreter"]):
        run = {
            "environment": environment(seed, kind == "interpreter"),
            "marks": options.marks,
            "paths": options.paths,
        }
        found = next((line["failures"] for line in ended if line | run == line), None)
        if found is None:
            found = failures(run["environment"], options.marks, options.paths)
            with options.out.open("a") as file:
                file.write(json.dumps(run | {"failures": found}) + "\n")
        total += len(found)
        print(
            " ".join(f"{name}={value}" for name, value in run["environment"].items()),
            *found,
            sep="\n  ",
            flush=True,
        )
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
