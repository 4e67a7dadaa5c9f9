"""Packed attention: exact softmax within segments, against the reference and PyTorch's own attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp
from tests.rounding import nearly_equal
from tests.threads import differing
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.packed_attention import packed_attention, reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    poison_segment,
    spread,
    uninitialized_is_nan,
    with_slack,
)

on_each_backend = pytest.mark.parametrize("backend", COMPUTING)


def check(layout, inputs, backend="torch", **options):
    roundings = 4.0 if inputs[0].dtype.itemsize < 4 else 16.0  # the fused CPU kernel's exp: up to 20 ulp
    check_against_reference(
        lambda q, k, v: packed_attention(q, k, v, layout, return_lse=True, backend=backend, **options),
        lambda q, k, v: reference.packed_attention(q, k, v, layout, **options),
        inputs,
        roundings=roundings,
        names=["out", "lse"],
    )


@on_each_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal, backend):
    with uninitialized_is_nan():
        check(
            PackedLayout.from_lengths(lengths), make_qkv(sum(lengths), 4, kv_heads=2), backend, causal=causal
        )


@on_each_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, causal, backend):
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, dtype=dtype), backend, causal=causal)


@on_each_backend
@pytest.mark.parametrize("head_dim", [3, 16, 24, 40, 72, 80, 130])
def test_head_dims(head_dim, backend):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, 2, head_dim), backend)


@on_each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch_per_segment(causal, backend):
    lengths = (33, 0, 8, 70)
    layout = PackedLayout.from_lengths(lengths)
    q, k, v = make_qkv(sum(lengths), 4, kv_heads=2)
    out, begin = packed_attention(q, k, v, layout, causal=causal, backend=backend), 0
    for length in lengths:
        heads_first = [x[None, begin : begin + length].transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, enable_gqa=True
        )
        assert nearly_equal(out[begin : begin + length], expected[0].transpose(0, 1))
        begin += length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", [*COMPUTING, "reference"])
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


@on_each_backend
def test_slack_rows_are_never_read(backend):
    layout = PackedLayout.from_lengths((9, 14))
    q, k, v = (with_slack(x, 2) for x in make_qkv(23))
    out, lse = packed_attention(q, k, v, layout, return_lse=True, backend=backend)
    assert (out[23:] == 0).all() and (lse[23:] == -torch.inf).all() and out[:23].isfinite().all()


@on_each_backend
@pytest.mark.parametrize("scale", [-0.7, 0.0, 40.0])
def test_any_scale(scale, backend):
    """Scores of hundreds are known to as many roundings."""
    layout = PackedLayout.from_lengths((30, 20))
    q, k, v = make_qkv(50, 2)
    largest = 1 + float(torch.einsum("ihd,jhd->hij", q, k).abs().max()) * abs(scale)
    check_against_reference(
        lambda q, k, v: packed_attention(q, k, v, layout, scale=scale, return_lse=True, backend=backend),
        lambda q, k, v: reference.packed_attention(q, k, v, layout, scale=scale),
        [q, k, v],
        roundings=16 * largest,
    )


@on_each_backend
def test_a_nan_score_makes_its_row_nan(backend):
    layout = PackedLayout.from_lengths((40, 30))
    q, k, v = make_qkv(70, 2)
    expected = packed_attention(q, k, v, layout, backend=backend)
    q[7, 1, 3] = torch.nan
    out, lse = packed_attention(q, k, v, layout, return_lse=True, backend=backend)
    assert out[7, 1].isnan().all() and lse[7, 1].isnan()
    out[7, 1] = expected[7, 1]
    assert torch.equal(out, expected)


@cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(causal, dtype):
    """Nor does where its segment lies: blocks of keys are counted from the segment's first."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1000, 4, kv_heads=2, dtype=dtype))
    grad = make_tensor(1000, 4, 16, dtype=dtype)

    def run(lengths, rows):
        some = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
        layout = PackedLayout.from_lengths(lengths)
        out = packed_attention(*some, layout, causal=causal, backend="cpp")
        return out, *torch.autograd.grad(out, some, grad[rows])

    alone = run((700,), slice(77, 777))
    for together, expected in zip(run((77, 700, 223), slice(0, 1000)), alone, strict=True):
        assert torch.equal(together[77:777], expected)


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 97, 129]), min_size=1, max_size=4)


@cpp
@given(LENGTHS, st.integers(1, 90), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_kernels_serve_any_packing(lengths, head_dim, kv_heads, causal, strided):
    """With any remainder of rows, keys and columns, in numbers that lie one after the other or apart."""
    inputs = make_qkv(sum(lengths), 4, head_dim, kv_heads=kv_heads)
    inputs = [spread(x) for x in inputs] if strided else inputs
    with uninitialized_is_nan():
        check(PackedLayout.from_lengths(lengths), inputs, "cpp", causal=causal)


@cpp
@given(
    LENGTHS, st.integers(1, 90), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([0.3, 0.0, -0.4])
)
@settings(max_examples=25)
def test_kernels_serve_any_packing_in_bfloat16(lengths, head_dim, kv_heads, causal, scale):
    """Some processors multiply bfloat16 in tiles of 16 x 32, which a remainder does not fill."""
    inputs = make_qkv(sum(lengths), 4, head_dim, kv_heads=kv_heads, dtype=torch.bfloat16)
    with uninitialized_is_nan():
        check(PackedLayout.from_lengths(lengths), inputs, "cpp", causal=causal, scale=scale)


@cpp
@given(
    LENGTHS,
    st.integers(1, 90),
    st.booleans(),
    st.sampled_from([torch.nan, torch.inf]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
@settings(max_examples=25)
def test_kernels_keep_segments_apart(lengths, head_dim, causal, poison, dtype, data):
    """NaN or infinity in one segment and in the rows past the last changes no bit of another, forward or backward."""
    layout = PackedLayout.from_lengths(lengths)
    chosen = data.draw(st.integers(0, len(lengths) - 1), label="poisoned segment")
    begin, end = layout.host_cu_seqlens[chosen : chosen + 2].tolist()
    inputs = [with_slack(x, 3, 0.0) for x in make_qkv(sum(lengths), 2, head_dim, dtype=dtype)]
    poisoned = [with_slack(poison_segment(x, layout, chosen, poison)[:-3], 3, poison) for x in inputs]
    grad = make_tensor(*inputs[0].shape, dtype=dtype)
    clean, other = (
        packed_with_gradients([x.requires_grad_() for x in some], layout, grad, causal)
        for some in (inputs, poisoned)
    )
    for a, b in zip(clean, other, strict=True):
        assert torch.equal(a[:begin], b[:begin]) and torch.equal(a[end:], b[end:])


def packed_with_gradients(inputs, layout, grad, causal):
    out, lse = packed_attention(*inputs, layout, causal=causal, return_lse=True, backend="cpp")
    seen = lse[: layout.host_cu_seqlens[-1]]
    return out, lse, *torch.autograd.grad((out * grad).sum() + (seen * seen.detach().cos()).sum(), inputs)


@cpp
@given(LENGTHS, st.integers(1, 90), st.booleans())
@settings(max_examples=25)
def test_kernels_give_the_gradient_of_lse_alone(lengths, head_dim, causal):
    layout = PackedLayout.from_lengths(lengths)
    check_against_reference(
        lambda *qkv: packed_attention(*qkv, layout, causal=causal, return_lse=True, backend="cpp")[1:],
        lambda *qkv: reference.packed_attention(*qkv, layout, causal=causal)[1:],
        make_qkv(sum(lengths), 4, head_dim, kv_heads=2),
        roundings=16.0,
        names=["lse"],
    )


@cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = [x.requires_grad_() for x in make_qkv(1400, 4, kv_heads=2, dtype=dtype)]
    layout, grad = PackedLayout.from_lengths((1200, 0, 150, 50)), make_tensor(1400, 4, 16, dtype=dtype)

    def run():
        out, lse = packed_attention(*inputs, layout, return_lse=True, backend="cpp")
        return out, lse, *torch.autograd.grad((out * grad).sum() + lse.sum(), inputs)

    assert differing(run) == []


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_a_single_key_weighs_one_however_large_its_score(size, dtype, backend):
    """A score of 1e6 is rounded to steps of 0.06: its weight is 1 only if it equals the maximum to the bit."""
    q, k, v = make_qkv(64, 4, 72, kv_heads=2, dtype=dtype)
    out = packed_attention(size * q, size * k, v, PackedLayout.from_lengths([1] * 64), backend=backend)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


@on_each_backend
def test_a_key_far_above_the_others_decides(backend):
    q, k, v = (300 * x if n < 2 else x for n, x in enumerate(make_qkv(100, 2, 128, dtype=torch.bfloat16)))
    out = packed_attention(q, k, v, PackedLayout.from_lengths([100]), backend=backend)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * 128**-0.5
    best, second = scores.topk(2).values.unbind(-1)
    alone = (best - second > 300).T  # in steps of the largest score's rounding, too
    assert alone.float().mean() > 0.9
    assert torch.equal(
        out[alone], v.transpose(0, 1).take_along_dim(scores.argmax(-1)[..., None], 1).transpose(0, 1)[alone]
    )


@on_each_backend
def test_heads_of_one_product_are_read_where_they_lie(backend):
    """Views of one qkv product give the same bits as copies."""
    layout, qkv = PackedLayout.from_lengths((33, 17)), make_tensor(50, 3, 4, 24)

    def run(q, k, v):
        out = packed_attention(q, k, v, layout, backend=backend)
        return out, *torch.autograd.grad(out, (q, k, v), make_tensor(24, 4, 50).permute(2, 1, 0))

    views = run(*(x.requires_grad_() for x in qkv.unbind(1)))
    copies = run(*(x.clone().requires_grad_() for x in qkv.unbind(1)))
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


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
