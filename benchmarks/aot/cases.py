"""Calls that together reach every kernel in every shipped config, forward and backward.

The launchers decide what a call compiles; see `vot_kernels.ops.launch.record_launches`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks.problems.attention import Attention
from benchmarks.problems.experts import AoE, MoE
from benchmarks.problems.fused import (
    DenseResidual,
    DenseResidualNorm,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)
from vot_kernels import (
    PackedLayout,
    aoe,
    dense_residual,
    hybrid_attention,
    linear_attention,
    moe,
    pack_patches,
    packed_attention,
    rope_qk_norm,
    size_aware_embedding,
    tuning,
)
from vot_kernels.ops.dispatch import OPS, describe_backends
from vot_kernels.ops.launch import record_launches

BFLOAT16 = torch.bfloat16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHTS = ("q_weight", "k_weight")
LONG = (8192, 4096, 2048, 1024, 1024)
SHORT = (64,) * 256  # every segment is one tile


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: a public op, or a launcher below one.
        name: unique within the op.
        run: calls the op and its backward with `backend="triton"` on CPU tensors, whose values do not matter.
        flops: multiplications and additions in matrix products that a kernel of that name must at least do.
        quick: whether it is part of the subset that the tests compile.
    """

    op: str
    name: str
    run: Callable[[], None]
    flops: Callable[[str], int] = lambda kernel: 0
    quick: bool = False


# Matrix products of a kernel, each with 2 * head_dim operations per query-key pair and head.
PAIR_PRODUCTS = {
    "_range_attention_fwd_kernel": 2,  # scores, output
    "_range_attention_gluon_fwd_kernel": 2,
    "_range_attention_dq_kernel": 3,  # scores, dp, dq
    "_range_attention_dkdv_kernel": 4,  # scores, dv, dp, dk
}
FUSED_PAIR_PRODUCTS = {
    **PAIR_PRODUCTS,
    "_range_attention_dq_kernel": 0,
    "_range_attention_dkdv_kernel": 5,  # scores, dv, dp, dk, dq
}
# Each has 2 * head_dim ** 2 operations per row and head; the small triangles of the causal form are not counted.
STATE_PRODUCTS = {
    "_group_states_kernel": 1,
    "_linear_apply_kernel": 1,
    "_linear_feature_grad_kernel": 1,
    "_decay_pairs_kernel": 1,
    "_decay_states_kernel": 1,
}
FAR_STATE_PRODUCTS = {**STATE_PRODUCTS, "_range_attention_dq_kernel": 1}  # when it leaves the keys out


def cases() -> list[Case]:
    """Return all calls of the public ops that reach a kernel through a Triton backend."""
    makers = {
        "linear_attention": _linear_attention,
        "packed_attention": _packed_attention,
        "hybrid_attention": _hybrid_attention,
        "aoe": _aoe,
        "moe": _moe,
        "dense_residual": _dense_residual,
        "rope_qk_norm": _rope_qk_norm,
        "size_aware_embedding": _size_aware_embedding,
        "pack_patches": _pack_patches,
    }
    return [case for op in kernel_ops() for case in makers[op]()]


def kernel_ops() -> list[str]:
    """Return the public ops with a Triton backend."""
    with record_launches("sm_90"):
        backends = describe_backends("cpu", BFLOAT16)
    return [op for op in OPS if not backends[op]["triton"]]


def _linear_attention() -> Iterator[Case]:
    base = Attention("linear_attention", LONG)
    decay: dict[str, Any] = {"causal": True, "log_decay": torch.zeros(base.heads, requires_grad=True)}
    for name, dtype, problem in _sizes(base):
        quick = name == "bf16 d64"
        yield _attention(linear_attention, name, dtype, problem, quick=quick)
        causal = replace(problem, causal=True)
        yield _attention(linear_attention, f"{name} causal", dtype, causal, quick=quick, causal=True)
        yield _attention(linear_attention, f"{name} decay", dtype, causal, quick=quick, **decay)
    for feature_map in ("elu", "relu"):
        yield _attention(linear_attention, f"bf16 d64 {feature_map}", BFLOAT16, base, feature_map=feature_map)
    elu = replace(base, causal=True)
    yield _attention(linear_attention, "bf16 d64 elu decay", BFLOAT16, elu, feature_map="elu", **decay)
    short = replace(base, lengths=SHORT)
    yield _attention(linear_attention, "bf16 d64 short", BFLOAT16, short)
    short = replace(short, causal=True)
    yield _attention(linear_attention, "bf16 d64 short causal", BFLOAT16, short, causal=True)
    yield _attention(linear_attention, "bf16 d64 short decay", BFLOAT16, short, **decay)


def _packed_attention() -> Iterator[Case]:
    base = Attention("packed_attention", LONG)
    for name, dtype, problem in _sizes(base):
        yield _attention(packed_attention, name, dtype, problem, quick=name == "bf16 d64")
    yield from _fused_backward(packed_attention, base)
    causal = replace(base, causal=True)
    yield _attention(packed_attention, "bf16 d64 causal", BFLOAT16, causal, causal=True)
    for head_dim in (64, 128):
        problem = replace(base, head_dim=head_dim)
        for variant in ("plain", "tma"):
            name = f"bf16 d{head_dim} {variant}"
            yield _attention(packed_attention, name, BFLOAT16, problem, _variant=variant)
        name, variant = f"bf16 d{head_dim} warp-specialized", "warp_specialized"
        quick = head_dim == 64
        yield _attention(packed_attention, name, BFLOAT16, problem, quick=quick, _variant=variant)
        yield _attention(
            packed_attention, f"bf16 d{head_dim} gluon", BFLOAT16, problem, quick=quick, _variant="gluon"
        )
    yield _inside(_deterministic, _attention(packed_attention, "bf16 d64 deterministic", BFLOAT16, base))
    yield _eight_warps(packed_attention, base)


def _hybrid_attention() -> Iterator[Case]:
    base = Attention("hybrid_attention", LONG)
    beta = torch.zeros(base.heads, requires_grad=True)
    for name, dtype, problem in _sizes(base):
        yield _attention(hybrid_attention, name, dtype, problem, quick=name == "bf16 d64", beta=beta)
    yield from _fused_backward(hybrid_attention, base, beta=beta)
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
        for variant in ("plain", "tma"):
            name = f"bf16 d{head_dim} {variant}"
            yield _attention(hybrid_attention, name, BFLOAT16, problem, _variant=variant)
    yield _eight_warps(hybrid_attention, base)


def _eight_warps(op: Callable[..., Any], problem: Attention) -> Case:
    case = _attention(op, "bf16 d64 eight warps", BFLOAT16, problem, _variant="plain")
    return _inside(lambda: tuning.preferring("eight_warps"), case)


def _inside(context: Callable[[], AbstractContextManager[None]], case: Case) -> Case:
    def run() -> None:
        with context():
            case.run()

    return replace(case, run=run)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _aoe() -> Iterator[Case]:
    """The shapes of the paper, one with small experts, one with unaligned rows, and all dtypes for some of them."""
    small = AoE(1024, dim=64, experts=4, top_k=2, rank=16, d_ffn=64)
    stored = AoE(1024, dim=64, experts=4, top_k=4, rank=256, d_ffn=256)
    shapes = {
        "d768 n8 r256": AoE(4096, dim=768, experts=8, top_k=2, rank=256, d_ffn=3072),
        "d1280 n8 r400": AoE(4096, dim=1280, experts=8, top_k=2, rank=400, d_ffn=5120),
        "d1536 n64 r512": AoE(4096, dim=1536, experts=64, top_k=8, rank=512, d_ffn=768),
        "d1536 n64 r128": AoE(4096, dim=1536, experts=64, top_k=8, rank=128, d_ffn=768),
        "d384 n8 r16": AoE(1024, dim=384, experts=8, top_k=2, rank=16, d_ffn=384),
        "d64 n4 r16": small,
        "d100 n8 r40": AoE(1024, dim=100, experts=8, top_k=2, rank=40, d_ffn=100),
        "d512 n512 r16": AoE(1024, dim=512, experts=512, top_k=16, rank=16, d_ffn=64),
        "d64 all chosen": stored,
    }
    for name, problem in shapes.items():
        yield _experts(f"bf16 {name}", problem, BFLOAT16, quick=problem is small)
    yield _experts("bf16 d64 all chosen forward", stored, BFLOAT16, quick=True, forward=True)
    for dtype in ("fp16", "fp32"):
        for name in ("d768 n8 r256", "d1280 n8 r400", "d64 n4 r16", "d100 n8 r40", "d64 all chosen"):
            yield _experts(f"{dtype} {name}", shapes[name], DTYPES[dtype])
    yield _experts("bf16 d64 n4 r16 softmax_topk", small, BFLOAT16, weighting="softmax_topk", forward=True)
    yield _experts("bf16 d64 n4 r16 bias", small, BFLOAT16, bias=torch.zeros(4))


def _moe() -> Iterator[Case]:
    """The experts of Qwen3-30B-A3B and Mixtral, small ones, and some with unaligned rows."""
    small = MoE(1024, dim=64, hidden=64, experts=4, top_k=2)
    shapes = {
        "d2048 h768 n128": MoE(4096, dim=2048, hidden=768, experts=128, top_k=8),
        "d2048 h4096 n8": MoE(4096, dim=2048, hidden=4096, experts=8, top_k=2),
        "d64 h64 n4": small,
        "d100 h70 n8": MoE(1024, dim=100, hidden=70, experts=8, top_k=2),
    }
    for dtype_name, dtype in DTYPES.items():
        for name, problem in shapes.items():
            quick = problem is small and dtype == BFLOAT16
            yield _experts(f"{dtype_name} {name}", problem, dtype, quick=quick)


def _dense_residual() -> Iterator[Case]:
    """Few states and many, in every dtype and variant."""
    for dtype_name, dtype in DTYPES.items():
        for count in (2, 24):
            problem = DenseResidual(1024, states=count)
            quick = dtype == BFLOAT16 and count == 2
            yield from _streaming(f"{dtype_name} {count} states", problem, dtype, _summed, quick)
    for dtype_name, dtype in DTYPES.items():
        for width in (256, 768, 1280, 4096) if dtype == BFLOAT16 else (768,):
            problem = DenseResidualNorm(1024, width)
            quick = dtype == BFLOAT16 and width == 768
            yield from _streaming(f"{dtype_name} {width} wide, normed", problem, dtype, _normed, quick)


def _summed(*inputs: torch.Tensor, backend: str) -> Any:
    return dense_residual(inputs[:-1], inputs[-1], backend=backend)


def _normed(*inputs: torch.Tensor, backend: str) -> Any:
    *states, weights, norm = inputs
    return dense_residual(states, weights, norm_weight=norm, backend=backend)


def _rope_qk_norm() -> Iterator[Case]:
    def run(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor, backend: str) -> Any:
        positions = torch.empty(q.shape[0], 3, dtype=torch.int64)
        return rope_qk_norm(q, k, positions, **dict(zip(WEIGHTS, weights, strict=False)), backend=backend)

    grid = ((4, 8, 16),)
    for dtype_name, dtype in DTYPES.items():
        for head_dim in (16, 64, 72, 128, 256) if dtype == BFLOAT16 else (64, 80):
            problem = RopeQkNorm(grid, kv_heads=4, head_dim=head_dim)
            quick = dtype == BFLOAT16 and head_dim == 64
            yield from _streaming(f"{dtype_name} d{head_dim}", problem, dtype, run, quick)
    plain = RopeQkNorm(grid)

    def turn(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor, backend: str) -> Any:
        return run(q, k, backend=backend)

    yield from _streaming("bf16 d64 without a norm", plain, BFLOAT16, turn)


def _size_aware_embedding() -> Iterator[Case]:
    layout = PackedLayout.from_grid_thw(((2, 16, 16), (1, 20, 20)))

    def run(x: torch.Tensor, *weights: torch.Tensor, backend: str) -> Any:
        return size_aware_embedding(x, layout, *weights, backend=backend)

    for dtype_name, dtype in DTYPES.items():
        for width in (100, 768) if dtype == BFLOAT16 else (768,):
            problem = SizeAwareEmbedding(((2, 16, 16), (1, 20, 20)), width)
            quick = dtype == BFLOAT16 and width == 768
            yield from _streaming(f"{dtype_name} {width} wide", problem, dtype, run, quick)


def _pack_patches() -> Iterator[Case]:
    colours = {"mean": [0.5] * 3, "std": [0.5] * 3}
    for dtype_name, dtype in {**DTYPES, "uint8": torch.uint8}.items():
        for patch_size, temporal in ((16, 1), (14, 2)) if dtype in (BFLOAT16, torch.uint8) else ((16, 1),):
            problem = PackPatches(((8 * patch_size, 12 * patch_size),) * 2, patch_size)
            for title, options in (("", {}), (" normalised", colours)):
                run = partial(_packed, patch_size, temporal_patch_size=temporal, **options)
                name = f"{dtype_name} {patch_size} x {temporal}{title}"
                yield from _streaming(name, problem, dtype, run, (patch_size, dtype) == (16, BFLOAT16))


def _packed(patch_size: int, *images: torch.Tensor, **options: Any) -> torch.Tensor:
    return pack_patches(images, patch_size, **options)[0]


@cache
def _shapes(problem: Any) -> list[torch.Size]:
    """Return the shapes of a problem's inputs; drawing their numbers for every variant and GPU would take long."""
    return [x.shape for x in problem.inputs(torch.float32, torch.device("cpu"))]


def _streaming(
    name: str, problem: Any, dtype: torch.dtype, op: Callable[..., Any], quick: bool = False
) -> Iterator[Case]:
    """Yield cases of a memory-bound op of tensors, in bfloat16 in every variant of its family."""

    def make(variant: str | None) -> Case:
        def run() -> None:
            inputs = [torch.empty(shape, dtype=dtype) for shape in _shapes(problem)]
            leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
            with tuning.preferring(*([] if variant is None else [variant])):
                out = op(*leaves, backend="triton")
                outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
                if outs:
                    grads = [torch.empty_like(x) for x in outs]
                    torch.autograd.grad(outs, leaves, grads, allow_unused=True)

        title = name if variant is None else f"{name} {variant}"
        return Case(problem.op, title, run, quick=quick and variant is None)

    yield from map(make, (None, *(tuning.variants(problem.op) if dtype == BFLOAT16 else ())))


def _experts(
    name: str,
    problem: AoE | MoE,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    forward: bool = False,
    **options: Any,
) -> Case:
    """Make a case of an op of tokens and experts; forward: without its backward."""

    def run() -> None:
        d, h, slots = problem.dim, problem.hidden, (problem.tokens, problem.top_k)
        sizes = [(problem.tokens, d)]
        if isinstance(problem, AoE):
            sizes += [(problem.rank, d), (h, problem.rank), (h, d), (h, d)]
        else:
            sizes += [(2 * h, d), (d, h)]
        shapes = sizes[:1] + [(problem.experts, *size) for size in sizes[1:]]
        leaves = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        if isinstance(problem, AoE):
            out, _ = aoe(*leaves, problem.top_k, backend="triton", return_aux=True, **options)
        else:
            leaves.append(torch.empty(slots, dtype=dtype, requires_grad=True))
            chosen = torch.empty(slots, dtype=torch.int64)
            out = moe(*leaves[:3], chosen, leaves[3], backend="triton")
        if not forward:
            torch.autograd.grad(out, leaves, torch.empty_like(out))

    return Case(problem.op, name, run, _expert_flops(problem), quick)


def _expert_flops(problem: AoE | MoE) -> Callable[[str], int]:
    """Return the operations of the smallest launch of each kernel; some multiply matrices of several shapes."""
    d, h = problem.dim, problem.hidden
    if isinstance(problem, AoE):
        r = problem.rank
        products = {"_expert_hidden_kernel": h * (d + r), "_expert_hidden_bwd_kernel": h * (d + r)}
        products |= {"_grouped_matmul_kernel": min(d, h) * r, "_weight_gradient_kernel": min(d, h) * r}
        products["_cache_norms_kernel"] = problem.experts * r * d // problem.top_k
    else:
        products = {"_expert_hidden_kernel": 2 * h * d, "_expert_hidden_bwd_kernel": h * d}
        products |= {"_grouped_matmul_kernel": h * d, "_weight_gradient_kernel": h * d}
    return lambda kernel: 2 * problem.tokens * problem.top_k * products.get(kernel, 0)


def _fused_backward(op: Callable[..., Any], base: Attention, **options: Any) -> Iterator[Case]:
    """Yield cases of the backward in which the kernel of dk and dv also adds to dq, at every size."""
    state_products = FAR_STATE_PRODUCTS if op is hybrid_attention else STATE_PRODUCTS
    for name, dtype, problem in _sizes(base):
        fused = {"_variant": "fused", **options}
        case = _attention(op, f"{name} fused", dtype, problem, quick=name == "bf16 d64", **fused)
        yield replace(case, flops=_attention_flops(problem, FUSED_PAIR_PRODUCTS, state_products))


def _attention(
    op: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
    problem: Attention,
    *,
    quick: bool = False,
    **options: Any,
) -> Case:
    """Make a case of an op of q, k, v and a layout."""

    def run() -> None:
        q, k, v = _qkv(problem, dtype)
        out = op(q, k, v, problem.layout(), backend="triton", **options)
        out = out if isinstance(out, tuple) else (out,)
        leaves = [q, k, v, *(x for x in options.values() if isinstance(x, torch.Tensor))]
        torch.autograd.grad(out, leaves, [torch.empty_like(x) for x in out])

    return Case(op.__name__, name, run, _attention_flops(problem), quick)


def _sizes(base: Attention) -> Iterator[tuple[str, torch.dtype, Attention]]:
    """Yield every dtype at the usual head dims, some others once, and fewer key heads than query heads."""
    for name, dtype in DTYPES.items():
        for head_dim in (16, 32, 64, 128, 256):
            yield f"{name} d{head_dim}", dtype, replace(base, head_dim=head_dim)
    for head_dim in (80, 96):
        yield f"bf16 d{head_dim}", BFLOAT16, replace(base, head_dim=head_dim)
    yield "bf16 d64 grouped", BFLOAT16, replace(base, kv_heads=4)


def _attention_flops(
    problem: Attention,
    pair_products: Mapping[str, int] = PAIR_PRODUCTS,
    state_products: Mapping[str, int] = STATE_PRODUCTS,
) -> Callable[[str], int]:
    pairs = problem.near_pairs() * problem.head_dim
    rows = problem.size * problem.head_dim**2

    def flops(kernel: str) -> int:
        products = pairs * pair_products.get(kernel, 0) + rows * state_products.get(kernel, 0)
        return 2 * problem.heads * products

    return flops


def _qkv(problem: Attention, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return uninitialized tensors, so that the large ones take no memory either."""
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    shapes = [(problem.size, count, problem.head_dim) for count in heads]
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
