"""`python -m tests.fuzz --calls 10000 --seed 0`: random calls of every op, with a summary of what failed."""

import argparse
import sys
import time
from collections import Counter

import torch

from tests.fuzz.broken import check_broken
from tests.fuzz.calls import MAKERS, Draw
from tests.fuzz.checks import check

BROKEN = "broken arguments"


def fuzz(seed: int, index: int, kinds: list[str]) -> str | None:
    """One call; what went wrong with it, if anything did."""
    draw = Draw(seed, index)
    kind = draw.pick(kinds)
    call = None
    try:
        if kind == BROKEN:
            check_broken(draw)
        else:
            call = MAKERS[kind](draw)
            check(call, draw)
    except Exception as error:
        return f"--seed {seed} --index {index}: {kind}: {type(error).__name__}: {error}\n    {call or ''}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="this call alone")
    parser.add_argument("--kind", action="append", choices=[*MAKERS, BROKEN], help="of these ops alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.kind or [*MAKERS, BROKEN, BROKEN, BROKEN]
    indices = range(options.calls) if options.index is None else [options.index]
    failures: Counter[str] = Counter()
    begun = time.monotonic()
    for count, index in enumerate(indices, 1):
        if (found := fuzz(options.seed, index, kinds)) is not None:
            failures[found.split(": ")[1]] += 1
            print(found, flush=True)
        if count % 500 == 0:
            print(
                f"{count} calls, {sum(failures.values())} failed, {time.monotonic() - begun:.0f} s",
                file=sys.stderr,
            )
    print(f"{len(indices)} calls, {sum(failures.values())} failed {dict(failures)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
