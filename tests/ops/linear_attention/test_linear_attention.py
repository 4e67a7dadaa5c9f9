"""Linear attention, bidirectional and causal: the backends on the CPU against the reference and the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp
from tests.threads import differing
from vot_kernels.ops.hybrid_attention import reference as hybrid_reference
from vot_kernels.ops.linear_attention import linear_attention, reference
from vot_kernels.ops.linear_attention import torch as module
from vot_kernels.ops.parts.group_states.torch import feature_map
from vot_kernels.ops.parts.plans import forget_plans
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)

MAPS = ["softmax", "elu", "relu"]
BACKENDS = [*COMPUTING, "reference"]
on_each = pytest.mark.parametrize("backend", COMPUTING)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens, so that short segments have several."""
    monkeypatch.setattr(module, "_CHUNK", 8)
    forget_plans()
    yield
    forget_plans()


def check(layout, inputs, backend, **options):
    check_against_reference(
        lambda q, k, v: [linear_attention(q, k, v, layout, backend=backend, **options)],
        lambda q, k, v: reference.linear_attention(q, k, v, layout, **options)[:1],
        inputs,
        floor=1.0,  # the gradient of a lone token is a difference of equal terms of about 1
    )


@on_each
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, name, causal, backend):
    with uninitialized_is_nan():
        inputs = make_qkv(sum(lengths), 4, kv_heads=2)
        check(PackedLayout.from_lengths(lengths), inputs, backend, feature_map=name, causal=causal)


@on_each
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, causal, backend):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, dtype=dtype), backend, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_float64(causal):
    layout = PackedLayout.from_lengths((18, 7, 25))
    check(layout, make_qkv(50, dtype=torch.float64), "torch", causal=causal)


@pytest.mark.parametrize(
    ("log_decay", "backend"), [(-0.1, "torch"), (None, "torch"), pytest.param(None, "cpp", marks=cpp)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_normaliser_does_not_blow_up_the_rounding_of_the_output(dtype, log_decay, backend):
    """With one feature the output does not depend on q: do.(v - o) cancels, and 1 / Z multiplies what is left."""
    q, k, v = make_qkv(50, head_dim=1, dtype=dtype)
    decay = {} if log_decay is None else {"log_decay": torch.full((2,), log_decay)}
    inputs = 0.01 * (q.abs() + 0.1), k.abs() + 0.1, v
    check(
        PackedLayout.from_lengths((18, 7, 25)),
        inputs,
        backend,
        feature_map="relu",
        causal=log_decay is not None,
        **decay,
    )


@on_each
@pytest.mark.parametrize("head_dim", [1, 24, 40, 72, 80])
def test_head_dims(head_dim, backend):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, 2, head_dim), backend, causal=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_definition(causal, backend):
    lengths = (12, 30)
    q, k, v = make_qkv(42, dtype=torch.float64)
    out, begin = (
        linear_attention(q, k, v, PackedLayout.from_lengths(lengths), causal=causal, backend=backend),
        0,
    )
    for length in lengths:
        own = slice(begin, begin + length)
        weights = torch.einsum("ihd,jhd->hij", q[own].softmax(-1), k[own].softmax(-1))
        weights = weights.tril() if causal else weights
        expected = torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v[own])
        assert max_error(out[own], expected) < 1e-12
        begin += length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_gradcheck(name, causal):
    layout = PackedLayout.from_lengths((11, 0, 3))
    inputs = make_qkv(14, 2, 3, kv_heads=1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v: linear_attention(q, k, v, layout, feature_map=name, causal=causal, backend="torch"),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_weight_are_zero_with_zero_gradients(causal, backend):
    layout = PackedLayout.from_lengths((9,))
    q, k, v = make_qkv(9)
    q[4] = -q[4].abs()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*inputs, layout, feature_map="relu", causal=causal, backend=backend)
    assert (out[4] == 0).all() and (out[5] != 0).any()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads) and (grads[0][4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_lone_token_sees_itself_however_little_it_weighs(causal, backend):
    """Softmax features of e^-95 make Z a subnormal number, whose inverse overflows."""
    q, k, v = make_qkv(1, 1)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 1] = 95, 95
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*inputs, PackedLayout.from_lengths((1,)), causal=causal, backend=backend)
    grad = make_tensor(1, 1, 16)
    dq, dk, dv = torch.autograd.grad(out, inputs, grad)
    assert max_error(out, v) < 2e-6 and max_error(dv, grad) < 2e-6  # a few roundings
    assert float(torch.stack([dq, dk]).abs().max()) < 1e-5


@pytest.mark.parametrize("phi", [feature_map, hybrid_reference.feature_map], ids=["torch", "reference"])
def test_elu_features_keep_their_digits(phi):
    """Relative to each: exp(x) - 1 + 1 errs by 5e-4 at x = -12."""
    x = torch.tensor([-80.0, -12.0, -1e-4, 0.0, 1e-4, 3.0])
    expected = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert max_error(phi(x, "elu").double() / expected, torch.ones(6)) < 1e-6
    assert phi(torch.tensor([torch.nan]), "elu").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_elu_of_very_negative_inputs(backend):
    """Small features weigh as much as large ones in a mean: output and gradients are those of float64."""
    layout = PackedLayout.from_lengths((18, 7, 25))
    q, k, v = make_qkv(50)
    grad, found = make_tensor(50, 2, 16), []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q - 12, k - 12, v)]
        computing = backend if dtype == torch.float32 else "reference"
        out = linear_attention(*inputs, layout, feature_map="elu", causal=True, backend=computing)
        found.append((out, *torch.autograd.grad(out, inputs, grad.to(dtype))))
    for actual, exact in zip(*found, strict=True):
        assert max_error(actual, exact) < 1e-5


@pytest.mark.parametrize(
    ("log_decay", "backend"), [(-3.0, "torch"), (None, "torch"), pytest.param(None, "cpp", marks=cpp)]
)
@pytest.mark.parametrize("size", [50.0, 95.0])
@pytest.mark.parametrize("name", MAPS)
def test_large_inputs_give_finite_results(name, size, log_decay, backend):
    q, k, v = make_qkv(106)
    inputs = [x.requires_grad_() for x in (size * q, size * k, v)]
    decay = None if log_decay is None else torch.full((2,), log_decay)
    layout = PackedLayout.from_lengths((37, 0, 64, 5))
    out = linear_attention(*inputs, layout, feature_map=name, causal=True, log_decay=decay, backend=backend)
    grads = torch.autograd.grad(out, inputs, make_tensor(106, 2, 16))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert out.abs().amax() <= v.abs().amax() * (1 + 1e-5)  # a weighted mean


def test_normalisers_that_decay_to_zero():
    """All queries find the first key alone, whose weight passes those with an infinite reciprocal in float32."""
    q, k = torch.zeros(2, 80, 2, 4)
    q[:, :, 0], k[0, :, 0], k[1:, :, 1] = 200, 200, 200
    inputs = [x.requires_grad_() for x in (q, k, make_tensor(80, 2, 4))]
    layout, decay = PackedLayout.from_lengths([80]), torch.tensor([-3.0, -2.3])
    out = linear_attention(*inputs, layout, causal=True, log_decay=decay, backend="torch")
    grads = torch.autograd.grad(out, inputs, make_tensor(80, 2, 4, seed=1))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert (out[:30] - inputs[2][0]).abs().max() < 1e-5 and not out[79].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_and_slack_do_not_leak(causal, backend):
    layout = PackedLayout.from_lengths((9, 12, 20))
    clean = [x.requires_grad_() for x in make_qkv(41)]
    poisoned = [with_slack(poison_segment(x.detach(), layout, 1), 2).requires_grad_() for x in clean]
    options = {"causal": causal, "backend": backend}
    expected, actual = (linear_attention(*inputs, layout, **options) for inputs in (clean, poisoned))
    assert actual[9:21].isnan().all() and (actual[41:] == 0).all()
    kept = [*range(9), *range(21, 41)]
    assert torch.equal(actual[kept], expected[kept])
    grad = make_tensor(41, 2, 16)
    actual = torch.autograd.grad(actual, poisoned, with_slack(grad, 2))
    for a, b in zip(actual, torch.autograd.grad(expected, clean, grad), strict=True):
        assert torch.equal(a[kept], b[kept]) and (a[41:] == 0).all()


@on_each
@pytest.mark.parametrize("causal", [None, "token"])
def test_opcheck(causal, backend):
    layout = PackedLayout.from_lengths((19, 0, 5))
    q, k, v = make_qkv(25, 2, 4, kv_heads=1)
    arguments = (q, k, v, None, layout.cu_seqlens, layout.host_cu_seqlens, causal, "elu", backend)
    out, total = torch.ops.vot_kernels.linear_attention_fwd(*arguments)
    backward = torch.ops.vot_kernels.linear_attention_bwd.default
    torch.library.opcheck(backward, (torch.ones_like(out), out, total, *arguments, False))
    for x in (q, k, v):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.vot_kernels.linear_attention_fwd.default, arguments)


@on_each
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_once_for_all_packings(causal, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, backend=counter, fullgraph=True, dynamic=True)
    for lengths in [(5, 6, 20, 1, 2), (40,), (3, 0, 1, 9)]:
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = make_qkv(sum(lengths), 4, requires_grad=True)
        grad = make_tensor(sum(lengths), 4, 16)
        actual, expected = (
            torch.autograd.grad(compute(*inputs, layout, causal=causal, backend=backend), inputs, grad)
            for compute in (compiled, linear_attention)
        )
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_and_true_are_one_and_so_are_none_and_false(backend):
    layout, inputs = PackedLayout.from_lengths((19, 4)), make_qkv(23)
    for causal, mode in ((True, "token"), (False, None)):
        out = linear_attention(*inputs, layout, causal=causal, backend=backend)
        assert torch.equal(linear_attention(*inputs, layout, causal=mode, backend=backend), out)


@cpp
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_long_segments(causal):
    """Segments of several tiles, shared key heads, rows that end within a vector, and slack."""
    layout = PackedLayout.from_lengths((1100, 1, 0, 65, 130))
    check(layout, [with_slack(x, 3) for x in make_qkv(1296, 2, 20, kv_heads=1)], "cpp", causal=causal)


@cpp
@given(st.lists(st.integers(0, 140), max_size=4), st.integers(1, 40), st.sampled_from(MAPS), st.booleans())
def test_any_lengths_and_head_dim(lengths, head_dim, name, causal):
    """Views of one product, with NaN in the slack."""
    layout, tokens = PackedLayout.from_lengths(lengths), sum(lengths)
    qkv = make_tensor(tokens + 2, 8, head_dim)
    qkv[tokens:] = torch.nan
    check(layout, (qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]), "cpp", feature_map=name, causal=causal)


@cpp
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_threads_gives_the_same_bits(causal):
    layout, grad = PackedLayout.from_lengths((1200, 3, 70)), make_tensor(1273, 2, 16)
    inputs = make_qkv(1273, kv_heads=1, requires_grad=True)

    def results():
        out = linear_attention(*inputs, layout, causal=causal, backend="cpp")
        return out, *torch.autograd.grad(out, inputs, grad)

    assert differing(results) == []


@cpp
@pytest.mark.parametrize("causal", [False, True])
def test_a_segment_has_the_same_bits_in_any_packing(causal):
    q, k, v = make_qkv(1300)
    alone = PackedLayout.from_lengths((1100,)), [x[77:1177] for x in (q, k, v)]
    packed = PackedLayout.from_lengths((77, 1100, 123)), [q, k, v]
    grad, found = make_tensor(1300, 2, 16), []
    for (layout, inputs), own in ((alone, slice(77, 1177)), (packed, slice(None))):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = linear_attention(*inputs, layout, causal=causal, backend="cpp")
        found.append((out, *torch.autograd.grad(out, inputs, grad[own])))
    assert all(torch.equal(a, b[77:1177]) for a, b in zip(*found, strict=True))


@cpp
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_results_beyond_the_cache_have_the_same_bits(head_dim, causal):
    """Those of 4 MiB and more are written in another way; the first segment alone is less."""
    layout, short = PackedLayout.from_lengths([37, 4200]), slice(0, 37)
    inputs, d_out = make_qkv(4240, 4, head_dim=head_dim), make_tensor(4240, 4, head_dim)

    def run(layout, rows):
        leaves = [x[rows].detach().requires_grad_() for x in inputs]
        out = linear_attention(*leaves, layout, causal=causal, backend="cpp")
        assert out.numel() * 4 >= 1 << 22 or rows == short
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out[rows])]

    for found, alone in zip(
        run(layout, slice(None)), run(PackedLayout.from_lengths([37]), short), strict=True
    ):
        assert torch.equal(found[short], alone)
        assert not found[4237:].any()
    long = slice(37, 4237)
    exact = linear_attention(
        *(x[long].double() for x in inputs),
        PackedLayout.from_lengths([4200]),
        causal=causal,
        backend="torch",
    )
    assert max_error(run(layout, slice(None))[0][long].double(), exact) < 1e-5


@cpp
def test_the_cpp_backend_refuses_what_it_has_no_kernel_for():
    layout, inputs, decay = PackedLayout.from_lengths((6,)), make_qkv(6), torch.zeros(2)
    with pytest.raises(ValueError, match=r"cpp \(C\+\+ kernels take no log_decay\)"):
        linear_attention(*inputs, layout, causal=True, log_decay=decay, backend="cpp")
    linear_attention(*inputs, layout, causal=True, log_decay=decay)  # "auto" goes on to torch
    with pytest.raises(ValueError, match="head_dim 257 is not from 1 to 256"):
        linear_attention(*make_qkv(6, head_dim=257), layout, backend="cpp")


def test_malformed_inputs():
    layout = PackedLayout.from_lengths((6,))
    q, k, v = make_qkv(6)
    with pytest.raises(ValueError, match="feature_map must be one of .* got 'exp'"):
        linear_attention(q, k, v, layout, feature_map="exp")
    with pytest.raises(ValueError, match="causal must be one of None, 'token', False, True, got 'group'"):
        linear_attention(q, k, v, layout, causal="group")
    with pytest.raises(ValueError, match="linear_attention .*no Triton kernel"):
        linear_attention(q, k, v, layout, backend="triton")
