"""`python -m benchmarks.aot.counts`: what is counted rather than compiled into a main loop, for docs/gpu-static.md.

It writes the present figures into benchmarks/results/static-counts.json and keeps those of before.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.aot import compiler, sass
from benchmarks.aot.sass import Instruction
from benchmarks.problems.experts import MoE
from vot_kernels import PackedLayout, hybrid_attention, moe
from vot_kernels.files import atomic_write
from vot_kernels.ops.launch import Launch, record_launches

RESULTS = Path(__file__).parents[1] / "results" / "static-counts.json"
ARCH, TOKENS, HEADS, GROUP, WINDOW = "sm_90", 65536, 16, 256, (2, 1)
LEAST = 50  # instructions of a loop that computes; shorter ones search and copy
Counts = dict[str, float]


def state_gigabytes(head_dim: int) -> float:
    """Return what the kernels of the states move in a forward of hybrid attention, each tensor once per kernel."""
    launches = [one for one in _hybrid(head_dim) if "states" in one.kernel.__name__]
    return round(sum(compiler.traffic(one.arguments) for one in launches) / 1e9, 3)


def far_instructions(head_dim: int) -> int:
    """Return the instructions of one warp for a chunk of features in the far part of the forward."""
    [forward] = [one for one in _hybrid(head_dim) if one.kernel.__name__ == "_range_attention_fwd_kernel"]
    _, loops = _code(forward)
    near = max(place for place, loop in enumerate(loops) if _work(loop) == max(map(_work, loops)))
    return sum(len(loop) for loop in loops[near + 1 :] if len(loop) > LEAST)


def outside_of_loop() -> float:
    """Return the share of its instructions that a short product of experts executes before and after its loop."""
    problem = MoE(4096, dim=2048, hidden=768, experts=128, top_k=8)
    experts, dim, hidden = problem.experts, problem.dim, problem.hidden
    shapes = [(problem.tokens, dim), (experts, 2 * hidden, dim), (experts, dim, hidden)]
    inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    chosen = torch.zeros(problem.tokens, problem.top_k, dtype=torch.int64)
    with record_launches(ARCH) as launches:
        moe(*inputs, chosen, torch.empty(chosen.shape, dtype=torch.bfloat16), backend="triton")
    [product] = [one for one in launches if one.kernel.__name__ == "_grouped_matmul_kernel"]
    total, loops = _code(product)
    loop = len(max(loops, key=_work))
    executed = loop * hidden // product.config.blocks["BLOCK_K"]
    return round((total - loop) / (total - loop + executed), 3)


def present() -> Counts:
    """Return the figures of now by name."""
    return {
        **{f"states d{d}": state_gigabytes(d) for d in (64, 128)},
        "far d128": far_instructions(128),
        "short product": outside_of_loop(),
    }


def _code(launch: Launch) -> tuple[int, list[list[Instruction]]]:
    """Return how many instructions a kernel has, and its outermost loops in their order."""
    what = compiler.specialize(launch, ARCH)
    instructions, labels = sass.parse(sass.disassemble(compiler.machine_code(what)))
    loops = [sorted(loop) for loop in sass.loops_of(instructions, labels)]
    outermost = [one for one in loops if not any(set(one) < set(other) for other in loops)]
    return len(instructions), [[instructions[i] for i in loop] for loop in sorted(outermost)]


def _work(loop: list[Instruction]) -> int:
    return sum(one.macs for one in loop)


def _hybrid(head_dim: int) -> list[Launch]:
    layout = PackedLayout.from_lengths((TOKENS // 4,) * 4, group_size=GROUP)
    q, k, v = (torch.empty(TOKENS, HEADS, head_dim, dtype=torch.bfloat16) for _ in range(3))
    with record_launches(ARCH) as launches:
        hybrid_attention(q, k, v, layout, window=WINDOW, backend="triton")
    return list(launches)


def main() -> int:
    """Write the present figures; return the exit status."""
    document: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    document["now"] |= present()
    with atomic_write(RESULTS) as path:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
