"""Linear attention, bidirectional and causal: backend torch against the reference and the definition."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vot_kernels.ops.linear_attention import linear_attention, reference
from vot_kernels.ops.linear_attention import torch as module
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


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens, so that short segments have several."""
    monkeypatch.setattr(module, "_CHUNK", 8)
    forget_plans()
    yield
    forget_plans()


def check(layout, inputs, **options):
    check_against_reference(
        lambda q, k, v: [linear_attention(q, k, v, layout, backend="torch", **options)],
        lambda q, k, v: reference.linear_attention(q, k, v, layout, **options)[:1],
        inputs,
        roundings=4.0 if inputs[0].dtype.itemsize < 8 else 16.0,  # float64 has no finer yardstick
        floor=1.0,  # the gradient of a lone token is a difference of equal terms of about 1
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, name, causal):
    with uninitialized_is_nan():
        inputs = make_qkv(sum(lengths), 4, kv_heads=2)
        check(PackedLayout.from_lengths(lengths), inputs, feature_map=name, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, causal):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, dtype=dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [1, 24, 40, 72, 80])
def test_head_dims(head_dim):
    check(PackedLayout.from_lengths((18, 7, 25)), make_qkv(50, 2, head_dim), causal=True)


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


@pytest.mark.parametrize("backend", ["torch", "reference"])
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


@pytest.mark.parametrize("backend", ["torch", "reference"])
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


@pytest.mark.parametrize("causal", [None, "token"])
def test_opcheck(causal):
    layout = PackedLayout.from_lengths((19, 0, 5))
    q, k, v = make_qkv(25, 2, 4, kv_heads=1)
    arguments = (q, k, v, None, layout.cu_seqlens, layout.host_cu_seqlens, causal, "elu", "torch")
    out, total = torch.ops.vot_kernels.linear_attention_fwd(*arguments)
    backward = torch.ops.vot_kernels.linear_attention_bwd.default
    torch.library.opcheck(backward, (torch.ones_like(out), out, total, *arguments, False))
    for x in (q, k, v):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.vot_kernels.linear_attention_fwd.default, arguments)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_once_for_all_packings(causal):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, backend=counter, fullgraph=True, dynamic=True)
    for lengths in [(5, 6, 20, 1, 2), (40,), (3, 0, 1, 9)]:
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = make_qkv(sum(lengths), 4, requires_grad=True)
        grad = make_tensor(sum(lengths), 4, 16)
        actual = torch.autograd.grad(compiled(*inputs, layout, causal=causal), inputs, grad)
        expected = torch.autograd.grad(linear_attention(*inputs, layout, causal=causal), inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_token_and_true_are_one_and_so_are_none_and_false(backend):
    layout, inputs = PackedLayout.from_lengths((19, 4)), make_qkv(23)
    for causal, mode in ((True, "token"), (False, None)):
        out = linear_attention(*inputs, layout, causal=causal, backend=backend)
        assert torch.equal(linear_attention(*inputs, layout, causal=mode, backend=backend), out)


def test_malformed_inputs():
    layout = PackedLayout.from_lengths((6,))
    q, k, v = make_qkv(6)
    with pytest.raises(ValueError, match="feature_map must be one of .* got 'exp'"):
        linear_attention(q, k, v, layout, feature_map="exp")
    with pytest.raises(ValueError, match="causal must be one of None, 'token', False, True, got 'group'"):
        linear_attention(q, k, v, layout, causal="group")
    with pytest.raises(ValueError, match="linear_attention .*no Triton kernel"):
        linear_attention(q, k, v, layout, backend="triton")
