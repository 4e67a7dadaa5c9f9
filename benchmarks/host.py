"""`python -m benchmarks.host [--rounds N] [--json FILE]`: what the CPU does for a call that launches GPU kernels.

The launches are recorded and not made, so no GPU is needed: what is left are the checks, PyTorch's dispatch, and the
arguments of the kernels. Short of tokens, a GPU waits for this. The first call on a layout also launches what is kept
with the layout afterwards, the second is recorded, and later ones repeat it. Triton's own launch code is not in the
figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from vot_kernels import PackedLayout, aoe, hybrid_attention, linear_attention, packed_attention
from vot_kernels.files import atomic_write
from vot_kernels.ops.launch import record_launches

ARCH = "sm_90"
# Few tokens: what the CPU does is the same for any number of them, but for the pages of its own memory.
TOKENS, HEADS, HEAD_DIM, GROUP = 256, 16, 64, 16
_NEW_LAYOUTS = 20


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        call: the op and the direction.
        first_launches: launches of the first call on a layout.
        launches: launches of each later one.
        first_us, second_us: host time of the first two calls on a layout, in microseconds, medians over layouts.
        median_us, least_us: that of a later one.
    """

    call: str
    first_launches: int
    launches: int
    first_us: float
    second_us: float
    median_us: float
    least_us: float


def calls() -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Yield names, and functions that make a call on a new layout; the call may be repeated."""
    sizes = (TOKENS, HEADS, HEAD_DIM)

    def attention(op: Callable[..., torch.Tensor], backward: bool, **options: object) -> Callable[[], object]:
        layout = PackedLayout.from_lengths((TOKENS,), group_size=GROUP)
        q, k, v = (torch.empty(sizes, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3))
        d_out = torch.empty(sizes, dtype=torch.bfloat16)

        def forward() -> torch.Tensor:
            return op(q, k, v, layout, backend="triton", **options)

        return (lambda: torch.autograd.grad(forward(), (q, k, v), d_out)) if backward else forward

    def experts() -> Callable[[], object]:
        count, rank, hidden, dim = 8, 256, 3840, 768
        shapes = ((TOKENS, dim), (count, rank, dim), (count, hidden, rank), *[(count, hidden, dim)] * 2)
        tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        return lambda: aoe(*tensors, 2, backend="triton")

    hybrid = {"window": (2, 1), "beta": torch.zeros(HEADS)}
    ops = {"packed_attention": (packed_attention, {}), "hybrid_attention": (hybrid_attention, hybrid)}
    for name, (op, options) in {**ops, "linear_attention": (linear_attention, {})}.items():
        yield f"{name} forward", lambda op=op, options=options: attention(op, False, **options)
        yield f"{name} forward and backward", lambda op=op, options=options: attention(op, True, **options)
    yield "aoe forward", experts


def measure(rounds: int) -> list[Cost]:
    """Return the cost of every call; all calls take turns, so that a disturbance hits all of them."""
    makes = dict(calls())
    made = {name: make() for name, make in makes.items()}
    first, later, times = {}, {}, {name: list[float]() for name in made}
    on_new_layouts = {name: ([], []) for name in made}
    with record_launches(ARCH, checked=False) as launches:
        for name, call in made.items():
            for counts in (first, later):
                launches.clear()
                _run(name, call)
                counts[name] = len(launches)
        for _ in range(rounds):
            for name, call in made.items():
                launches.clear()
                times[name].append(_run(name, call))
        for _ in range(_NEW_LAYOUTS):
            for name, make in makes.items():
                call = make()
                for found in on_new_layouts[name]:
                    launches.clear()
                    found.append(_run(name, call))
    return [
        Cost(
            name,
            first[name],
            later[name],
            *map(median, on_new_layouts[name]),
            median(times[name]),
            min(times[name]),
        )
        for name in made
    ]


def _run(name: str, call: Callable[[], object]) -> float:
    """Call it and return the microseconds that it took."""
    with torch.set_grad_enabled("backward" in name):
        started = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the costs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=(__doc__ or "").split(":")[1]
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the costs to FILE too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    costs = measure(options.rounds)
    for cost in costs:
        launches = f"{cost.launches} launches, {cost.first_launches} on a new layout"
        new = f"{cost.first_us:.0f} and {cost.second_us:.0f} us"
        print(
            f"{cost.call:40} {cost.median_us:6.0f} us, least {cost.least_us:6.0f} us, {new} at first; {launches}"
        )
    if options.json:
        with atomic_write(options.json) as path:
            path.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
