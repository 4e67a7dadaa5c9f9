"""Causal linear attention with a decay per head: the torch backend and the reference by the definition.

The Triton kernels with a decay are tested with the others, in `test_linear_attention_triton.py`.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.rounding import nearly_equal
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

BOTH = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 tokens, so that short segments have several."""
    monkeypatch.setattr(module, "_CHUNK", 8)
    forget_plans()
    yield
    forget_plans()


def log_decays(*decays, dtype=torch.float32):
    return torch.tensor(decays, dtype=torch.float64).log().to(dtype)


def check(lengths, inputs, **options):
    """Output and gradients, that of the decay among them, obey the tolerance rule."""
    layout = PackedLayout.from_lengths(lengths)
    with uninitialized_is_nan():
        check_against_reference(
            lambda q, k, v, d: [
                linear_attention(q, k, v, layout, causal=True, log_decay=d, backend="torch", **options)
            ],
            lambda q, k, v, d: reference.linear_attention(
                q, k, v, layout, causal=True, log_decay=d, **options
            )[:1],
            inputs,
            floor=1.0,  # terms of about 1 cancel in the gradients
        )


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_definition(backend):
    lengths, decays = (12, 0, 30), torch.tensor([0.5, 0.9], dtype=torch.float64)
    q, k, v = make_qkv(42, 2, kv_heads=1, dtype=torch.float64)
    layout, begin = PackedLayout.from_lengths(lengths), 0
    out = linear_attention(q, k, v, layout, causal=True, log_decay=decays.log(), backend=backend)
    for length in lengths:
        own = slice(begin, begin + length)
        for head, decay in enumerate(decays.tolist()):
            for i in range(begin, begin + length):
                phi = q[i, head].softmax(-1) @ k[begin : i + 1, 0].softmax(-1).T
                weights = phi * decay ** torch.arange(i - begin, -1, -1, dtype=torch.float64)
                expected = weights @ v[begin : i + 1, 0] / weights.sum()
                assert max_error(out[i, head], expected) < 1e-12
        begin = own.stop


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths):
    inputs = make_qkv(sum(lengths), 4, kv_heads=2)
    check(lengths, (*inputs, log_decays(1.0, 0.9, 0.5, 1e-6)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_feature_maps(dtype, name):
    inputs = make_qkv(50, dtype=dtype)
    check((18, 7, 25), (*inputs, log_decays(0.97, 0.7, dtype=dtype)), feature_map=name)


@pytest.mark.usefixtures("small_chunks")
def test_decay_in_float32_with_bfloat16_tokens():
    """Parameters are kept in float32; the gradient has this dtype and is not rounded to that of the tokens."""
    layout = PackedLayout.from_lengths((18, 7, 25))
    inputs = make_qkv(50, dtype=torch.bfloat16)
    decay = log_decays(0.97, 0.7).requires_grad_()
    exact = decay.detach().double().requires_grad_()
    out = linear_attention(*inputs, layout, causal=True, log_decay=decay, backend="torch")
    doubles = [x.double() for x in inputs]
    expected = linear_attention(*doubles, layout, causal=True, log_decay=exact, backend="reference")
    weights = make_tensor(*out.shape, dtype=torch.bfloat16)
    (actual,) = torch.autograd.grad(out, decay, weights)
    (expected,) = torch.autograd.grad(expected, exact, weights.double())
    assert out.dtype == torch.bfloat16 and actual.dtype == torch.float32
    assert max_error(actual, expected) < 0.02 * float(expected.abs().max())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
def test_gradcheck(name):
    layout = PackedLayout.from_lengths((19, 0, 3))
    inputs = make_qkv(22, 2, 3, kv_heads=1, dtype=torch.float64, requires_grad=True)
    decay = log_decays(0.99, 0.1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, d: linear_attention(
            q, k, v, layout, feature_map=name, causal=True, log_decay=d, backend="torch"
        ),
        (*inputs, decay),
    )


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_decay_of_one_is_no_decay(backend):
    layout = PackedLayout.from_lengths((40, 9))
    inputs, grad = make_qkv(49, dtype=torch.float64, requires_grad=True), make_tensor(49, 2, 16).double()
    results = []
    for decay in (None, torch.zeros(2)):
        out = linear_attention(*inputs, layout, causal=True, log_decay=decay, backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    assert all(max_error(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@BOTH
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("log_decay", [-300.0, -math.inf])
def test_total_decay_leaves_the_token_itself(log_decay, backend):
    """Where its inverse powers would overflow, results and gradients are those of one token alone."""
    layout = PackedLayout.from_lengths((40, 9))
    inputs = make_qkv(49, requires_grad=True)
    decay = torch.full((2,), log_decay, requires_grad=True)
    out = linear_attention(*inputs, layout, causal=True, log_decay=decay, backend=backend)
    grad = make_tensor(49, 2, 16)
    dq, dk, dv, d_decay = torch.autograd.grad(out, (*inputs, decay), grad)
    assert max_error(out, inputs[2]) < 1e-5 and max_error(dv, grad) < 1e-5
    assert float(torch.stack([dq, dk]).abs().max()) < 1e-5 and d_decay.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decay", [0.999, 1.0, 0.9])
def test_long_segment(decay):
    """float32 stays as close to float64 over thousands of tokens as dense float32 does."""
    check((2100,), (*make_qkv(2100, 1), log_decays(decay)))


def test_gradient_of_decay_does_not_cancel_on_long_segments():
    """With a short memory far from the segment's start, a sum of phi(k).dphi(k) times positions errs by 3e-6."""
    length, step = 6000, 1e-5
    layout = PackedLayout.from_lengths((length,))
    inputs, grad = make_qkv(length, 1), make_tensor(length, 1, 16)

    def attend(dtype, decay):
        options = {"feature_map": "elu", "causal": True, "log_decay": decay, "backend": "torch"}
        return linear_attention(*(x.to(dtype) for x in inputs), layout, **options)

    found = []
    for dtype in (torch.float32, torch.float64):
        decay = log_decays(0.5, dtype=torch.float64).to(dtype).requires_grad_()
        found += torch.autograd.grad(attend(dtype, decay), decay, grad.to(dtype))
    decay = log_decays(0.5, dtype=torch.float64)
    slope = (attend(torch.float64, decay + step) - attend(torch.float64, decay - step)) / (2 * step)
    terms = (slope * grad).sum((1, 2))  # their signs are random, so the sum may be small by chance
    assert torch.allclose(terms.sum(), found[1].sum(), rtol=1e-3, atol=1e-3 * float(terms.norm()))
    assert max_error(found[0], found[1]) < 1e-6 * float(terms.norm())


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_neighbours_and_slack_do_not_leak(backend):
    """Nothing passes from segment to segment; all share only the decay, and slack does not affect it."""
    layout = PackedLayout.from_lengths((9, 12, 20))
    clean, grad = make_qkv(41), make_tensor(41, 2, 16)
    grads, outs = [], []
    for q, k, v in (clean, [poison_segment(x, layout, 1) for x in clean]):
        leaves = [with_slack(x, 2).requires_grad_() for x in (q, k, v)]
        decay = log_decays(0.9, 0.5).requires_grad_()
        out = linear_attention(*leaves, layout, causal=True, log_decay=decay, backend=backend)
        outs.append(out)
        grads.append(torch.autograd.grad(out, (*leaves, decay), with_slack(grad, 2)))
    kept = [*range(9), *range(21, 41)]
    assert grads[0][3].isfinite().all() and (outs[0][41:] == 0).all()
    assert outs[1][9:21].isnan().all() and torch.equal(outs[0][kept], outs[1][kept])
    for a, b in zip(grads[0][:3], grads[1][:3], strict=True):
        assert torch.equal(a[kept], b[kept]) and (b[41:] == 0).all()


@pytest.mark.usefixtures("small_chunks")
def test_same_alone_as_packed():
    """Neighbours enter no sum: the two roundings come from PyTorch's products of other batch sizes."""
    inputs, grad = make_qkv(71, 2), make_tensor(71, 2, 16)
    results = []
    for begin, lengths in ((0, (5, 50, 0, 16)), (5, (50, 16))):
        leaves = [x[begin:].clone().requires_grad_() for x in inputs]
        layout = PackedLayout.from_lengths(lengths)
        out = linear_attention(*leaves, layout, causal=True, log_decay=log_decays(0.9, 0.5), backend="torch")
        results.append([out, *torch.autograd.grad(out, leaves, grad[begin:])])
    for packed, alone in zip(*results, strict=True):
        assert nearly_equal(packed[5:], alone)


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_rows_without_weight_are_zero_with_zero_gradients(backend):
    q, k, v = make_qkv(20)
    q[4] = -q[4].abs()
    inputs = [x.requires_grad_() for x in (q, k, v, log_decays(0.9, 0.5))]
    layout = PackedLayout.from_lengths((20,))
    out = linear_attention(
        *inputs[:3], layout, feature_map="relu", causal=True, log_decay=inputs[3], backend=backend
    )
    assert (out[4] == 0).all() and (out[5] != 0).any()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads) and (grads[0][4] == 0).all()


def test_a_decay_is_learned():
    """Gradient descent finds the decay that made the targets."""
    layout = PackedLayout.from_lengths((64, 64))
    q, k, v = make_qkv(128)
    wanted = log_decays(0.9, 0.6)
    target = linear_attention(q, k, v, layout, causal=True, log_decay=wanted)
    raw = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.1)
    for _ in range(150):
        out = linear_attention(q, k, v, layout, causal=True, log_decay=torch.nn.functional.logsigmoid(raw))
        optimiser.zero_grad()
        (out - target).square().sum().backward()
        optimiser.step()
    assert max_error(raw.detach().sigmoid(), wanted.exp()) < 0.01


@pytest.mark.usefixtures("small_chunks")
def test_opcheck():
    layout = PackedLayout.from_lengths((19, 0, 5))
    q, k, v = make_qkv(25, 2, 4, kv_heads=1)
    decay = log_decays(0.9, 0.5)
    arguments = (q, k, v, decay, layout.cu_seqlens, layout.host_cu_seqlens, "token", "elu", "torch")
    out, inverse = torch.ops.vot_kernels.linear_attention_fwd(*arguments)
    backward = torch.ops.vot_kernels.linear_attention_bwd.default
    for wanted in (False, True):
        torch.library.opcheck(backward, (torch.ones_like(out), out, inverse, *arguments, wanted))
    for x in (q, k, v, decay):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.vot_kernels.linear_attention_fwd.default, arguments)


@pytest.mark.usefixtures("small_chunks")
def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, backend=counter, fullgraph=True, dynamic=True)
    decay = log_decays(0.9, 0.5, 1.0, 0.99).requires_grad_()
    for lengths in [(5, 6, 20, 1, 2), (40,), (3, 0, 1, 9)]:
        layout = PackedLayout.from_lengths(lengths)
        inputs = (*make_qkv(sum(lengths), 4, requires_grad=True), decay)
        grad = make_tensor(sum(lengths), 4, 16)
        results = [
            torch.autograd.grad(
                function(*inputs[:3], layout, causal=True, log_decay=decay),
                inputs,
                grad,
            )
            for function in (compiled, linear_attention)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("small_chunks")
def test_a_fixed_decay_has_no_gradient():
    """The gradients of the tokens are bitwise equal."""
    layout, grad = PackedLayout.from_lengths((19, 5)), make_tensor(24, 2, 16)
    inputs = make_qkv(24, requires_grad=True)
    results = []
    for learned in (False, True):
        decay = log_decays(0.9, 0.5).requires_grad_(learned)
        out = linear_attention(*inputs, layout, causal=True, log_decay=decay, backend="torch")
        results.append(torch.autograd.grad(out, inputs, grad, retain_graph=True))
        if learned:
            assert (torch.autograd.grad(out, decay, grad)[0] != 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("given", "causal", "error", "message"),
    [
        (torch.zeros(2), False, ValueError, "log_decay needs causal=True, .* got causal=False"),
        (torch.zeros(3), True, ValueError, r"log_decay must have the shape \[2\], got \[3\]"),
        (
            torch.zeros(2, dtype=torch.int64),
            True,
            TypeError,
            "log_decay must be floating point, got torch.int64",
        ),
        (torch.tensor([-1.0, 0.5]), True, ValueError, "log_decay must be at most 0, got 0.5"),
        (0.5, True, TypeError, r"log_decay must be a tensor \[2\], got float"),
    ],
)
def test_malformed_inputs(given, causal, error, message):
    with pytest.raises(error, match=message) as caught:
        linear_attention(*make_qkv(6), PackedLayout.from_lengths((6,)), causal=causal, log_decay=given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
