"""Kernels use the memory of their arguments alone, and leave no outcome to the order of programs or threads."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from benchmarks.aot import build
from tests.marks import interpreted
from tests.memory import MemoryFault, checked_memory
from vot_kernels.ops.aoe import aoe
from vot_kernels.ops.dense_residual import dense_residual
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.moe import moe
from vot_kernels.ops.pack_patches import pack_patches
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.rope_qk_norm import rope_qk_norm
from vot_kernels.ops.size_aware_embedding import size_aware_embedding
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_experts, make_moe, make_qkv, make_tensor

pytestmark = interpreted

LAYOUT = PackedLayout.from_lengths((19, 0, 1, 37), group_size=5)
WITHOUT_INTERPRETER = {"_range_attention_gluon_fwd_kernel"}


def leaves(tensors):
    return [x.requires_grad_() if x.is_floating_point() else x for x in tensors]


def backward(*outs):
    sum((out * out).sum() for out in outs).backward()


def attention(function, **options):
    q, k, v = leaves(make_qkv(LAYOUT.num_tokens + 3, 2, kv_heads=1))
    out, lse = function(q, k, v, LAYOUT, backend="triton", return_lse=True, **options)
    backward(out, lse.masked_fill(lse.isinf(), 0))


def linear(**options):
    q, k, v = leaves(make_qkv(LAYOUT.num_tokens + 3, 2, kv_heads=1))
    backward(linear_attention(q, k, v, LAYOUT, backend="triton", **options))


def decayed():
    linear(causal=True, log_decay=(-torch.rand(2)).requires_grad_())


def experts(top_k=2, **sizes):
    backward(aoe(*leaves(make_experts(**sizes)), top_k, backend="triton"))


def mixture():
    backward(moe(*leaves(make_moe()), backend="triton"))


def rope():
    q, k, _ = leaves(make_qkv(LAYOUT.num_tokens, 2, kv_heads=1))
    positions = torch.randint(0, 9, (LAYOUT.num_tokens, 3))
    norms = leaves([make_tensor(16, seed=3), make_tensor(16, seed=4)])
    backward(*rope_qk_norm(q, k, positions, q_weight=norms[0], k_weight=norms[1], backend="triton"))


def residual(norm):
    states = leaves([make_tensor(21, 40, seed=i) for i in range(3)])
    weights, norm_weight = leaves([make_tensor(3, seed=3), make_tensor(40, seed=4)])
    given = {"norm_weight": norm_weight} if norm else {}
    outs = dense_residual(states, weights, backend="triton", **given)
    backward(*outs) if norm else backward(outs)


def embedding():
    layout = PackedLayout.from_grid_thw([[1, 4, 5], [2, 3, 3]])
    shapes = [(layout.num_tokens + 2, 24), (32, 48), (32,), (24, 32), (24,)]
    x, *weights = leaves([make_tensor(*shape, seed=i) for i, shape in enumerate(shapes)])
    backward(size_aware_embedding(x, layout, *weights, backend="triton"))


PACKED = "range_attention_fwd range_attention_dkdv range_attention_dq"
HYBRID = f"{PACKED} group_states far_states"
LINEAR = "group_states linear_apply linear_feature_grad"
HIDDEN = "expert_hidden expert_hidden_bwd grouped_matmul weight_gradient combine"
MOE = f"rank_slots place_slots mixing_backward {HIDDEN}"
AOE = f"cache_norms select_experts {MOE}"

CASES = {
    "packed": (lambda: attention(packed_attention), f"{PACKED} key_ranges"),
    "packed fused": (lambda: attention(packed_attention, _variant="fused"), PACKED),
    "packed causal": (lambda: attention(packed_attention, causal=True), f"{PACKED} key_ranges"),
    "hybrid": (lambda: attention(hybrid_attention), f"{HYBRID} key_ranges"),
    "hybrid fused": (lambda: attention(hybrid_attention, _variant="fused"), HYBRID),
    "hybrid causal groups": (lambda: attention(hybrid_attention, causal="group"), f"{HYBRID} key_ranges"),
    "hybrid causal tokens": (lambda: attention(hybrid_attention, causal="token"), f"{HYBRID} key_ranges"),
    "linear": (linear, f"{LINEAR} reduce_states"),
    "linear causal": (lambda: linear(causal=True), f"{LINEAR} scan_states"),
    "linear decay": (decayed, f"{LINEAR} scan_states decay_states decay_pairs"),
    "aoe": (experts, AOE),
    "aoe with most experts chosen": (lambda: experts(top_k=4), f"{AOE} gather_caches"),
    "aoe of a high rank": (lambda: experts(rank=140), f"{AOE} sum_spans"),
    "moe": (mixture, MOE),
    "rope_qk_norm": (rope, "rope_qk_norm rope_qk_norm_bwd"),
    "dense_residual": (lambda: residual(norm=False), "weighted_sum weighted_sum_bwd"),
    "dense_residual with norm": (lambda: residual(norm=True), "weighted_sum_norm weighted_sum_norm_bwd"),
    "size_aware_embedding": (embedding, "segment_add segment_add_bwd sum_tiles"),
}
"""Calls with gradients, and the kernels that they run."""

PACKING, UNPACKING = "_pack_patches_kernel", "_unpack_patches_kernel"


def full_names(kernels):
    return {f"_{kernel}_kernel" for kernel in kernels.split()}


@pytest.mark.parametrize("case", CASES)
def test_each_op(case):
    run, expected = CASES[case]
    with checked_memory() as kernels:
        run()
    assert kernels == full_names(expected)


def test_patches():
    images = leaves([make_tensor(3, 8, 12, seed=0), make_tensor(3, 4, 4, seed=1)])
    with checked_memory(*images) as kernels:
        values, _ = pack_patches(images, 4, backend="triton")
    assert kernels == {PACKING}
    with checked_memory(arguments=False) as kernels:  # a table holds the addresses of the gradients
        backward(values)
    assert kernels == {UNPACKING}


def test_no_kernel_is_left_out():
    checked = {PACKING, UNPACKING}.union(*(full_names(expected) for _, expected in CASES.values()))
    assert build.registered_kernels() - checked == WITHOUT_INTERPRETER


# Kernels with faults:


@triton.jit
def _copy_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place), place < count)


@triton.jit
def _overlap_kernel(x_ptr, out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place))


@triton.jit
def _next_kernel(x_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place + BLOCK))


@triton.jit
def _shift_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, place.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK + place, tl.load(x_ptr + (place + 1) % BLOCK))


@triton.jit
def _count_kernel(x_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    ones = tl.full([BLOCK], 1.0, tl.float32)
    if ATOMIC:
        tl.atomic_add(x_ptr + tl.arange(0, BLOCK), ones)
    else:
        tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)) + ones)


@triton.jit
def _lock_kernel(x_ptr, RELEASE: tl.constexpr):
    tl.atomic_cas(x_ptr, 0, 1)
    if RELEASE:
        tl.store(x_ptr, 0, tl.program_id(0) == 0)


@triton.jit
def _fold_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@pytest.mark.parametrize(
    ("launch", "fault"),
    [
        (
            lambda x: _copy_kernel[(2,)](x[:24], x[32:], 24, BLOCK=16),
            "loads 8 elements that are in no argument",
        ),
        (lambda x: _copy_kernel[(2,)](x[:32], x[32:48], 32, BLOCK=16), "stores 16 elements that are in no"),
        (lambda x: _overlap_kernel[(2,)](x[:32], x[32:], STEP=8, BLOCK=16), "store to the same address"),
        (lambda x: _next_kernel[(2,)](x, BLOCK=16), "load and store to the same address"),
        (
            lambda x: _shift_kernel[(1,)](x, BARRIER=False, BLOCK=16),
            "loads what it stored, without a barrier",
        ),
        (lambda x: _count_kernel[(2,)](x, ATOMIC=False, BLOCK=16), "store to the same address"),
        (lambda x: _fold_kernel[(1,)](x, BLOCK=16), "stores to one address twice"),
        (lambda x: _lock_kernel[(2,)](x.int(), RELEASE=True), "change and store to the same address"),
    ],
)
def test_faults_are_found(launch, fault):
    with pytest.raises((MemoryFault, InterpreterError), match=fault), checked_memory():
        launch(torch.zeros(64))


def test_what_a_gpu_allows_passes():
    x = torch.zeros(64)
    with checked_memory() as kernels:
        _copy_kernel[(2,)](x[:32], x[32:], 24, BLOCK=16)
        _shift_kernel[(1,)](x, BARRIER=True, BLOCK=16)
        _count_kernel[(3,)](x, ATOMIC=True, BLOCK=16)
        _lock_kernel[(2,)](torch.zeros(1, dtype=torch.int32), RELEASE=False)
    assert kernels == {"_copy_kernel", "_shift_kernel", "_count_kernel", "_lock_kernel"}
    assert x[:16].tolist() == [n + 3 for n in range(16)] and x[16:32].tolist() == [*range(1, 16), 0]


def test_nothing_is_checked_afterwards():
    with checked_memory():
        pass
    _overlap_kernel[(2,)](torch.zeros(64), torch.zeros(64), STEP=8, BLOCK=16)
