"""Calls that together reach every kernel in every shipped config, forward and backward.

The launchers decide what a call compiles; see `vot_kernels.ops._launch.record_launches`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.problems.attention import Attention
from vot_kernels import hybrid_attention, linear_attention, packed_attention
from vot_kernels.ops._launch import record_launches
from vot_kernels.ops._range_triton import prefer_tma
from vot_kernels.ops.dispatch import describe_backends

BFLOAT16 = torch.bfloat16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG = (8192, 4096, 2048, 1024, 1024)
SHORT = (64,) * 256  # every segment is one tile


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: a public op, or a launcher below one.
        name: unique within the op.
        run: calls it with `backend="triton"` on CPU tensors, and its backward; their values do not matter.
        flops: multiplications and additions in matrix products that a kernel of that name must do.
        quick: part of the subset that the tests compile.
    """

    op: str
    name: str
    run: Callable[[], None]
    flops: Callable[[str], int] = lambda kernel: 0
    quick: bool = False


# Matrix products of a kernel, each of 2 * head_dim operations per query-key pair and head.
PAIR_PRODUCTS = {
    "_range_attention_fwd_kernel": 2,  # scores, output
    "_range_attention_dq_kernel": 3,  # scores, dp, dq
    "_range_attention_dkdv_kernel": 4,  # scores, dv, dp, dk
}
# Each of 2 * head_dim ** 2 operations per row and head; the small triangles of the causal form are left out.
STATE_PRODUCTS = {"_group_states_kernel": 1, "_linear_values_kernel": 1, "_linear_features_kernel": 1}


def cases() -> list[Case]:
    """All of them: calls of the public ops that reach a kernel through a Triton backend."""
    makers = {
        "linear_attention": _linear_attention,
        "packed_attention": _packed_attention,
        "hybrid_attention": _hybrid_attention,
    }
    return [case for op in kernel_ops() for case in makers[op]()]


def kernel_ops() -> list[str]:
    """Public ops with a Triton backend."""
    with record_launches("sm_90"):
        backends = describe_backends("cpu", BFLOAT16)
    return [op for op, reasons in backends.items() if not reasons["triton"]]


def _linear_attention() -> Iterator[Case]:
    base = Attention("linear_attention", LONG)
    for name, dtype, problem in _sizes(base):
        quick = name == "bf16 d64"
        yield _attention(linear_attention, name, dtype, problem, quick=quick)
        causal = replace(problem, causal=True)
        yield _attention(linear_attention, f"{name} causal", dtype, causal, quick=quick, causal=True)
    for feature_map in ("elu", "relu"):
        yield _attention(linear_attention, f"bf16 d64 {feature_map}", BFLOAT16, base, feature_map=feature_map)
    short = replace(base, lengths=SHORT)
    yield _attention(linear_attention, "bf16 d64 short", BFLOAT16, short)
    short = replace(short, causal=True)
    yield _attention(linear_attention, "bf16 d64 short causal", BFLOAT16, short, causal=True)


def _packed_attention() -> Iterator[Case]:
    base = Attention("packed_attention", LONG)
    for name, dtype, problem in _sizes(base):
        yield _attention(packed_attention, name, dtype, problem, quick=name == "bf16 d64")
    causal = replace(base, causal=True)
    yield _attention(packed_attention, "bf16 d64 causal", BFLOAT16, causal, causal=True)
    for head_dim in (64, 128):
        problem = replace(base, head_dim=head_dim)
        yield _preferring_tma(_attention(packed_attention, f"bf16 d{head_dim} tma", BFLOAT16, problem))


def _hybrid_attention() -> Iterator[Case]:
    base = Attention("hybrid_attention", LONG)
    beta = torch.zeros(base.heads, requires_grad=True)
    for name, dtype, problem in _sizes(base):
        yield _attention(hybrid_attention, name, dtype, problem, quick=name == "bf16 d64", beta=beta)
    for causal in ("group", "token"):
        yield _attention(hybrid_attention, f"bf16 d64 {causal} causal", BFLOAT16, base, causal=causal)
    yield _attention(hybrid_attention, "bf16 d64 lse", BFLOAT16, base, beta=beta, return_lse=True)
    for feature_map in ("elu", "relu"):
        yield _attention(hybrid_attention, f"bf16 d64 {feature_map}", BFLOAT16, base, feature_map=feature_map)
    features = [torch.empty(base.size, base.heads, 32, dtype=BFLOAT16, requires_grad=True) for _ in range(2)]
    given: dict[str, Any] = dict(zip(("q_features", "k_features"), features, strict=True))
    yield _attention(hybrid_attention, "bf16 d64 features", BFLOAT16, base, **given)
    for head_dim in (64, 128):
        problem = replace(base, head_dim=head_dim)
        yield _preferring_tma(_attention(hybrid_attention, f"bf16 d{head_dim} tma", BFLOAT16, problem))


def _preferring_tma(case: Case) -> Case:
    """The same call, with tensor descriptors where the configs have an entry for them."""

    def run() -> None:
        with prefer_tma():
            case.run()

    return replace(case, run=run)


def _attention(
    op: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
    problem: Attention,
    *,
    quick: bool = False,
    **options: Any,
) -> Case:
    """A case of an op of q, k, v and a layout."""

    def run() -> None:
        q, k, v = _qkv(problem, dtype)
        out = op(q, k, v, problem.layout(), backend="triton", **options)
        out = out if isinstance(out, tuple) else (out,)
        leaves = [q, k, v, *(x for x in options.values() if isinstance(x, torch.Tensor))]
        torch.autograd.grad(out, leaves, [torch.empty_like(x) for x in out])

    return Case(op.__name__, name, run, _attention_flops(problem), quick)


def _sizes(base: Attention) -> Iterator[tuple[str, torch.dtype, Attention]]:
    """Every dtype at the usual head dims, some others once, and fewer key heads than query heads."""
    for name, dtype in DTYPES.items():
        for head_dim in (16, 32, 64, 128, 256):
            yield f"{name} d{head_dim}", dtype, replace(base, head_dim=head_dim)
    for head_dim in (80, 96):
        yield f"bf16 d{head_dim}", BFLOAT16, replace(base, head_dim=head_dim)
    yield "bf16 d64 grouped", BFLOAT16, replace(base, kv_heads=4)


def _attention_flops(problem: Attention) -> Callable[[str], int]:
    pairs = problem.near_pairs() * problem.head_dim
    rows = problem.size * problem.head_dim**2

    def flops(kernel: str) -> int:
        products = pairs * PAIR_PRODUCTS.get(kernel, 0) + rows * STATE_PRODUCTS.get(kernel, 0)
        return 2 * problem.heads * products

    return flops


def _qkv(problem: Attention, dtype: torch.dtype) -> list[torch.Tensor]:
    """Uninitialized, so that the large ones cost no memory either."""
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    shapes = [(problem.size, count, problem.head_dim) for count in heads]
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
