"""Softmax, linear and hybrid attention."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.core import DIRECTIONS, Workload
from benchmarks.problems.attention import Attention
from benchmarks.workloads.packings import long_among_short, qwen_vl, ragged, uniform, zipf

K = 1024
SERIES = (1, 2, 4, 8, 16, 32)  # thousands of tokens in one segment, for the plots; 64 comes first

# 1,024 near tokens: the token's own group, two on the left, one on the right.
_hybrid = partial(Attention, "hybrid_attention", group_size=256, window=(2, 1))
_softmax = partial(Attention, "packed_attention")
_linear = partial(Attention, "linear_attention")

FORWARD = ("forward",)
TRAINING = ("forward", "both")


def workloads(device: str) -> Iterator[Workload]:
    """Yield the workloads of all three suites."""
    return _cuda() if device == "cuda" else _cpu()


def _cuda() -> Iterator[Workload]:
    """16 heads, 64k tokens: the sizes of the roofline table."""
    total = 64 * K
    yield from _on_cuda(
        "hybrid",
        ("64k-d64", _hybrid((total,)), DIRECTIONS),
        ("64k-d128", _hybrid((total,), head_dim=128), TRAINING),
        ("ragged-64k-d64", _hybrid(ragged(total)), TRAINING),
        # 64 frames of 32 x 32 tokens, each a group: the neighbouring frames are near.
        ("clip-64k-d64", _hybrid((total,), group_size=K, window=1), TRAINING),
        ("images-64k-d64", _hybrid(qwen_vl(total)), TRAINING),
        *((f"{n}k-d64", _hybrid((n * K,)), TRAINING) for n in SERIES),
        ("64k-gqa-d128", _hybrid((total,), head_dim=128, kv_heads=4), TRAINING),
        ("64k-d64-fp16", _hybrid((total,)), FORWARD),
        ("zipf-64k-d64", _hybrid(zipf(total, 8 * K)), TRAINING),
        ("long-64k-d64", _hybrid(long_among_short(total)), TRAINING),
        ("256k-d64", _hybrid((256 * K,)), FORWARD),
    )
    yield from _on_cuda(
        "softmax",
        ("ragged-64k-d64", _softmax(ragged(total)), DIRECTIONS),
        ("ragged-64k-d128", _softmax(ragged(total), head_dim=128), DIRECTIONS),
        ("64k-d64", _softmax((total,)), FORWARD),
        ("64k-d128", _softmax((total,), head_dim=128), FORWARD),
        ("16k-d128", _softmax((16 * K,), head_dim=128), TRAINING),
        ("images-64k-d64", _softmax(qwen_vl(total)), TRAINING),
        ("ragged-64k-causal-d128", _softmax(ragged(total), head_dim=128, causal=True), TRAINING),
        ("ragged-64k-gqa-d128", _softmax(ragged(total), head_dim=128, kv_heads=4), TRAINING),
        ("ragged-64k-d64-fp16", _softmax(ragged(total)), TRAINING),
        *((f"ragged-64k-d{d}", _softmax(ragged(total), head_dim=d), TRAINING) for d in (72, 80)),
        ("uniform-64x1k-d64", _softmax(uniform(total, 64)), TRAINING),
        ("long-64k-d64", _softmax(long_among_short(total)), TRAINING),
        ("zipf-64k-d64", _softmax(zipf(total, 8 * K)), TRAINING),
        *((f"{n}k-d64", _softmax((n * K,)), TRAINING) for n in SERIES),
    )
    yield from _on_cuda(
        "linear",
        ("64k-d64", _linear((total,)), DIRECTIONS),
        ("64k-d128", _linear((total,), head_dim=128), TRAINING),
        ("ragged-64k-d64", _linear(ragged(total)), TRAINING),
        ("uniform-256x256-d64", _linear(uniform(total, 256)), TRAINING),
        ("64k-causal-d64", _linear((total,), causal=True), TRAINING),
        ("64k-gqa-d128", _linear((total,), head_dim=128, kv_heads=4), TRAINING),
        ("64k-d64-fp16", _linear((total,)), FORWARD),
        ("images-64k-d64", _linear(qwen_vl(total)), TRAINING),
        *((f"{n}k-d64", _linear((n * K,)), TRAINING) for n in SERIES),
    )


def _on_cuda(suite: str, *cases: tuple[str, Attention, tuple[str, ...]]) -> Iterator[Workload]:
    for name, problem, directions in cases:
        dtype = torch.float16 if name.endswith("fp16") else torch.bfloat16
        yield Workload(suite, name, problem, dtype, "cuda", directions)


# Segments of 64 to 2,048 tokens, in no order.
MIXED = (2048, 1024, 256, 256, 640, 96, 1400, 64)


def _cpu() -> Iterator[Workload]:
    """8 heads of 64, float32 where no other dtype is named, with a window of 1 on both sides."""
    heads = {"heads": 8, "kv_heads": 8}
    hybrid, softmax, linear = (
        partial(kind, **heads) for kind in (partial(_hybrid, window=1), _softmax, _linear)
    )
    yield from _on_cpu(
        "hybrid",
        ("8k-d64", hybrid((8 * K,)), TRAINING, FORWARD),
        ("4k-d64", hybrid((4 * K,)), TRAINING, TRAINING),
        ("2k-d64", hybrid((2 * K,)), TRAINING, FORWARD),
        ("1k-d64", hybrid((K,)), FORWARD, FORWARD),
        # Groups of one token in short segments: a state for each would be larger than its rows.
        ("short-2k-d64", hybrid(uniform(2 * K, 32), group_size=1, window=4), TRAINING, TRAINING),
        ("16k-d64", hybrid((16 * K,)), FORWARD, FORWARD),
        ("images-8k-d64", hybrid(qwen_vl(8 * K)), TRAINING, ()),
        ("4k-gqa-d64", hybrid((4 * K,), kv_heads=2), TRAINING, ()),
    )
    yield from _on_cpu(
        "softmax",
        ("mixed-5784-d64", softmax(MIXED), TRAINING, FORWARD),
        ("ragged-2k-d64", softmax(ragged(2 * K)), TRAINING, TRAINING),
        ("mixed-5784-d64-bf16", softmax(MIXED), TRAINING, FORWARD),
        ("ragged-2k-d64-bf16", softmax(ragged(2 * K)), TRAINING, TRAINING),
        ("images-8k-d64", softmax(qwen_vl(8 * K)), FORWARD, ()),
        ("long-4k-d64", softmax(long_among_short(4 * K, 64)), TRAINING, ()),
        ("zipf-4k-d64", softmax(zipf(4 * K, K)), TRAINING, ()),
        ("uniform-16x256-d64", softmax(uniform(4 * K, 16)), TRAINING, ()),
        ("mixed-5784-causal-d64", softmax(MIXED, causal=True), TRAINING, ()),
        ("mixed-5784-gqa-d64", softmax(MIXED, kv_heads=2), TRAINING, ()),
        *((f"{n}k-d64", softmax((n * K,)), FORWARD, ()) for n in (1, 2, 4)),
    )
    yield from _on_cpu(
        "linear",
        ("8k-d64", linear((8 * K,)), TRAINING, FORWARD),
        ("2k-d64", linear((2 * K,)), TRAINING, TRAINING),
        ("4k-d64", linear((4 * K,)), TRAINING, ()),
        ("16k-d64", linear((16 * K,)), FORWARD, ()),
        ("16k-causal-d64", linear((16 * K,), causal=True), FORWARD, ()),
        ("mixed-5784-d64", linear(MIXED), TRAINING, ()),
        *((f"{n}k-d64", linear((n * K,)), FORWARD, ()) for n in (1,)),
    )


def _on_cpu(
    suite: str, *cases: tuple[str, Attention, tuple[str, ...], tuple[str, ...]]
) -> Iterator[Workload]:
    for name, problem, directions, quick in cases:
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        yield Workload(suite, name, problem, dtype, "cpu", directions, quick)
