"""CPU benchmarks: `python benchmarks/bench_cpu.py --json out.json`.

Every provider is first compared with the reference on a small case of the same structure; a provider that is
wrong stops the benchmark and gets no time. Then all providers of a workload are timed in turns.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workloads_encoder, workloads_fused
from benchmarks.timing import Timing, describe_machine, time_interleaved
from benchmarks.workloads_aoe import PROVIDERS as AOE_PROVIDERS
from benchmarks.workloads_aoe import AoEWorkload
from vot_kernels.data.files import atomic_write
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.reference import attention as reference
from vot_kernels.reference.aoe import aoe as aoe_reference
from vot_kernels.testing import assert_close_to_exact, make_qkv, make_tensor

HEADS, HEAD_DIM = 8, 64
Results = Sequence[Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload.

    Attributes:
        name: shown in the table.
        run: what is timed; returns the results.
        oracle: the reference for `run` in a given dtype (float32 and float64 are asked for).
    """

    name: str
    run: Callable[[], Results]
    oracle: Callable[[torch.dtype], Results]


@dataclass(frozen=True)
class Workload:
    """Providers to be timed side by side; the first is ours, the others are what it is compared with.

    Attributes:
        name: of the workload.
        shape: what is computed, for the reader.
        build: the providers; build(False) is a small case of the same structure, to be verified.
        repeats: timed runs per provider.
    """

    name: str
    shape: str
    build: Callable[[bool], list[Provider]]
    repeats: int = 5


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention on `[tokens, heads, d]` or `[batch, tokens, heads, d]`."""
    inputs = (x.unsqueeze(0) if x.ndim == 3 else x for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def with_gradients(
    function: Callable[..., Tensor], inputs: Results, dtype: torch.dtype | None = None
) -> Results:
    """The output and the gradients of all inputs for a fixed gradient of the output."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = make_tensor(*out.shape[-3:], dtype=out.dtype, seed=9).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _hybrid(full: bool, backward: bool) -> list[Provider]:
    tokens, group = ((8192 if backward else 16384), 256) if full else (320, 32)
    layout = PackedLayout.from_lengths([tokens], group_size=group)
    inputs = make_qkv(tokens, HEADS, HEAD_DIM)

    def hybrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hybrid_attention(q, k, v, layout, window=1)

    def hybrid_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.hybrid_attention(q, k, v, layout, window=1)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v)[0]

    def dense_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.packed_attention(q, k, v, layout)[0]

    return [
        _provider("hybrid_attention", hybrid, hybrid_oracle, inputs, backward),
        _provider("dense scaled_dot_product_attention", dense, dense_oracle, inputs, backward),
    ]


def _ragged(full: bool, backward: bool) -> list[Provider]:
    lengths = [2048, 1024, 256, 256, 640, 96, 1400, 64] if full else [64, 32, 8, 8, 20, 3, 44, 2]
    layout = PackedLayout.from_lengths(lengths)
    inputs = make_qkv(layout.num_tokens, HEADS, HEAD_DIM)
    inside = torch.arange(layout.max_seqlen) < torch.tensor(lengths)[:, None]
    mask = inside[:, None, None, :]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = packed_attention(q, k, v, layout)
        assert isinstance(out, Tensor)
        return out

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.new_zeros(*inside.shape, HEADS, HEAD_DIM) for x in (q, k, v)]
        padded = [
            row.masked_scatter(inside[..., None, None], x) for row, x in zip(rows, (q, k, v), strict=True)
        ]
        return dense_attention(*padded, mask=mask)[inside]

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.packed_attention(q, k, v, layout)[0]

    return [
        _provider("packed_attention", packed, oracle, inputs, backward),
        _provider("padded scaled_dot_product_attention", padded, oracle, inputs, backward),
    ]


def _linear(full: bool, backward: bool, causal: bool) -> list[Provider]:
    tokens = 16384 if full else 300
    layout = PackedLayout.from_lengths([tokens])
    inputs = make_qkv(tokens, HEADS, HEAD_DIM)

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, layout, causal=causal)

    def linear_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v, layout, causal=causal)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out[0].transpose(0, 1)

    def dense_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.packed_attention(q, k, v, layout, causal=causal)[0]

    return [
        _provider("linear_attention", linear, linear_oracle, inputs, backward),
        _provider("dense scaled_dot_product_attention", dense, dense_oracle, inputs, backward),
    ]


def _aoe(full: bool, backward: bool) -> list[Provider]:
    size = AoEWorkload() if full else AoEWorkload(tokens=96, dim=32, experts=4, rank=8, d_ffn=48)
    inputs = size.inputs()

    def oracle(*inputs: Tensor) -> Tensor:
        return aoe_reference(*inputs, size.top_k)[0]

    return [
        _provider(name, provider(size), oracle, inputs, backward) for name, provider in AOE_PROVIDERS.items()
    ]


def _fused(full: bool, case: Callable[[bool], workloads_fused.Case]) -> list[Provider]:
    torch.manual_seed(0)
    ours, plain, inputs = case(full)
    return [
        _provider("vot_kernels", ours, plain, inputs, backward=False),
        _provider("plain PyTorch", plain, plain, inputs, backward=False),
    ]


def _encoder(full: bool) -> list[Provider]:
    grids = workloads_encoder.IMAGES if full else workloads_encoder.SMALL_IMAGES

    def provider(name: str, encode: Callable[..., Tensor]) -> Provider:
        batch = workloads_encoder.mixed_batch(grids, torch.float32)

        def oracle(dtype: torch.dtype) -> Results:
            return [workloads_encoder.encode_one_by_one(*workloads_encoder.mixed_batch(grids, dtype))]

        return Provider(name, lambda: [encode(*batch)], oracle)

    return [
        provider("packed encoder", workloads_encoder.encode_packed),
        provider("encoder on a padded batch", workloads_encoder.encode_padded),
    ]


def _provider(
    name: str,
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Results,
    backward: bool,
) -> Provider:
    def run() -> Results:
        if backward:
            return with_gradients(function, inputs)
        with torch.no_grad():
            return [function(*inputs)]

    def expected(dtype: torch.dtype) -> Results:
        if backward:
            return with_gradients(oracle, inputs, dtype)
        return [oracle(*(x.to(dtype) for x in inputs))]

    return Provider(name, run, expected)


WORKLOADS = [
    Workload(
        "hybrid forward",
        "16,384 tokens in groups of 256, window 1, 8 heads of 64, float32",
        partial(_hybrid, backward=False),
    ),
    Workload(
        "hybrid forward + backward",
        "8,192 tokens in groups of 256, window 1, 8 heads of 64, float32",
        partial(_hybrid, backward=True),
        repeats=3,
    ),
    Workload(
        "packed forward",
        "8 segments of 64 to 2,048 tokens (5,784), 8 heads of 64, float32",
        partial(_ragged, backward=False),
    ),
    Workload(
        "packed forward + backward",
        "8 segments of 64 to 2,048 tokens (5,784), 8 heads of 64, float32",
        partial(_ragged, backward=True),
        repeats=3,
    ),
    Workload(
        "linear forward",
        "16,384 tokens, 8 heads of 64, float32",
        partial(_linear, backward=False, causal=False),
        repeats=3,
    ),
    Workload(
        "causal linear forward",
        "16,384 tokens, 8 heads of 64, float32",
        partial(_linear, backward=False, causal=True),
        repeats=3,
    ),
    Workload(
        "encoder on mixed image sizes",
        "8 images of 80 × 48 to 288 × 224 pixels (3,656 patches), nano encoder, exact softmax, float32",
        _encoder,
    ),
    Workload(
        "AoE forward",
        "8,192 tokens, width 512, 16 experts of rank 64, top 2, float32",
        partial(_aoe, backward=False),
        repeats=3,
    ),
    Workload(
        "AoE forward + backward",
        "8,192 tokens, width 512, 16 experts of rank 64, top 2, float32",
        partial(_aoe, backward=True),
        repeats=3,
    ),
    *(
        Workload(f"{name} forward", shape, partial(_fused, case=case))
        for name, (shape, case) in workloads_fused.CASES.items()
    ),
]


def verify(workload: Workload) -> None:
    """Every provider agrees with its reference by the tolerance rule, or an error names it."""
    for provider in workload.build(False):
        results = zip(
            provider.run(), provider.oracle(torch.float32), provider.oracle(torch.float64), strict=True
        )
        for i, (actual, low, exact) in enumerate(results):
            label = f"{workload.name}, {provider.name}, result {i}"
            # PyTorch's fused CPU kernel has an exp of up to 20 ulp.
            assert_close_to_exact(actual, low, exact, roundings=16, name=label)


def run(workload: Workload, repeats: int | None = None) -> dict[str, Timing]:
    """Verify, then time; the first provider is ours."""
    verify(workload)
    providers = {provider.name: provider.run for provider in workload.build(True)}
    return time_interleaved(providers, repeats or workload.repeats)


def report(workload: Workload, timings: dict[str, Timing]) -> list[str]:
    """Lines for the terminal: median wall-clock and processor time, and how many times slower than ours."""
    ours = next(iter(timings.values())).median_s
    lines = [f"{workload.name}: {workload.shape}"]
    for name, timing in timings.items():
        cpu = statistics.median(timing.cpu_s)
        lines.append(
            f"  {name:<38} {timing.median_s * 1e3:>9.1f} ms {timing.median_s / ours:>6.1f} x"
            f"   (processor {cpu * 1e3:.1f} ms)"
        )
    return lines


def main() -> None:
    """Run the workloads whose names contain --only, print the medians and write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write machine, versions and every run here")
    parser.add_argument("--only", default="", help="run only workloads whose name contains this text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, help="timed runs per provider (default: the workload's own)")
    options = parser.parse_args()
    chosen = [w for w in WORKLOADS if options.only in w.name]
    if not chosen:
        parser.error(f"--only {options.only!r} fits none of: {', '.join(w.name for w in WORKLOADS)}.")
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    results = []
    for workload in chosen:
        timings = run(workload, options.repeats)
        print("\n".join(report(workload, timings)), flush=True)
        ours, *others = timings.values()
        results.append(
            {
                "workload": workload.name,
                "shape": workload.shape,
                "providers": {name: asdict(timing) for name, timing in timings.items()},
                "speedup": {
                    name: timing.median_s / ours.median_s
                    for name, timing in zip(list(timings)[1:], others, strict=True)
                },
            }
        )
    if options.json is not None:
        with atomic_write(options.json) as path:
            path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
