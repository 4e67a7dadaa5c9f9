"""Packed attention: exact softmax within segments, against the reference and PyTorch's own attention."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.packed_attention import packed_attention, reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    uninitialized_is_nan,
    with_slack,
)


def check(layout, inputs, **options):
    roundings = 4.0 if inputs[0].dtype.itemsize < 4 else 16.0  # the fused CPU kernel's exp: up to 20 ulp
    check_against_reference(
        lambda q, k, v: packed_attention(q, k, v, layout, return_lse=True, backend="torch", **options),
        lambda q, k, v: reference.packed_attention(q, k, v, layout, **options),
        inputs,
        roundings=roundings,
        names=["out", "lse"],
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal):
    with uninitialized_is_nan():
        check(PackedLayout.from_lengths(lengths), make_qkv(sum(lengths), 4, kv_heads=2), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, causal):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, dtype=dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [16, 24, 40, 72, 80])
def test_head_dims(head_dim):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, 2, head_dim))


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch_per_segment(causal):
    lengths = (33, 0, 8, 70)
    layout = PackedLayout.from_lengths(lengths)
    q, k, v = make_qkv(sum(lengths), 4, kv_heads=2)
    out, begin = packed_attention(q, k, v, layout, causal=causal), 0
    for length in lengths:
        heads_first = [x[None, begin : begin + length].transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, enable_gqa=True
        )
        assert max_error(out[begin : begin + length], expected[0].transpose(0, 1)) < 1e-6
        begin += length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_groups_play_no_part(causal, backend):
    q, k, v = make_qkv(30)
    results = [
        packed_attention(
            q, k, v, PackedLayout.from_lengths((18, 12), group_size=n), causal=causal, backend=backend
        )
        for n in (None, 1, 5)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_with_lse(causal):
    layout = PackedLayout.from_lengths((5, 0, 3))
    inputs = make_qkv(8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, layout, causal=causal, return_lse=True, backend="torch"),
        inputs,
    )


def test_slack_rows_are_never_read():
    layout = PackedLayout.from_lengths((9, 14))
    q, k, v = (with_slack(x, 2) for x in make_qkv(23))
    out, lse = packed_attention(q, k, v, layout, return_lse=True)
    assert (out[23:] == 0).all() and (lse[23:] == -torch.inf).all() and out[:23].isfinite().all()


def test_attention_over_parts_merges_by_lse():
    """The keys of two segments, merged by their lse, act as one longer segment."""
    q, k, v = make_qkv(20, dtype=torch.float64)
    whole = packed_attention(q, k, v, PackedLayout.from_lengths((20,)))
    layout = PackedLayout.from_lengths((20, 20))
    parts = []
    for keys in (slice(0, 10), slice(10, 20)):
        masked = torch.full_like(k, 0)
        masked[keys] = k[keys]
        # Keys elsewhere are zeroed and then taken back out of the sums: each weighs exp(0) = 1.
        out, lse = packed_attention(
            *(x.repeat(2, 1, 1) for x in (q, masked, torch.where(masked == 0, 0, v))), layout, return_lse=True
        )
        total = lse[:20].exp()
        parts.append((out[:20] * total[..., None], total - 10))
    merged = sum(p for p, _ in parts) / sum(t for _, t in parts)[..., None]
    assert max_error(merged, whole) < 1e-12


def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_attention, backend=counter, fullgraph=True, dynamic=True)
    for lengths in [(5, 6, 20, 1, 2), (40,), (3, 0, 1, 9), (2,) * 11]:
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = make_qkv(sum(lengths), 4, requires_grad=True)
        grad = make_tensor(sum(lengths), 4, 16)
        actual = torch.autograd.grad(compiled(*inputs, layout), inputs, grad)
        expected = torch.autograd.grad(packed_attention(*inputs, layout), inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


def test_token_and_true_are_one_and_so_are_none_and_false():
    layout = PackedLayout.from_lengths((9, 4), group_size=3)
    inputs = make_qkv(13, 2)
    for backend in ("torch", "reference"):
        for causal, mode in ((True, "token"), (False, None)):
            out = packed_attention(*inputs, layout, causal=causal, backend=backend)
            assert torch.equal(packed_attention(*inputs, layout, causal=mode, backend=backend), out)
            whole = hybrid_attention(*inputs, layout, window=None, causal=causal, backend=backend)
            assert torch.equal(whole, out)


def test_malformed_inputs():
    layout = PackedLayout.from_lengths((6,))
    q, k, v = make_qkv(6)
    with pytest.raises(ValueError, match="causal must be one of None, 'token', False, True, got 'group'"):
        packed_attention(q, k, v, layout, causal="group")
    with pytest.raises(ValueError, match="5 rows, fewer than the 6 tokens"):
        packed_attention(q[:5], k[:5], v[:5], layout)
    with pytest.raises(ValueError, match="packed_attention .*no Triton kernel"):
        packed_attention(q, k, v, layout, backend="triton")
