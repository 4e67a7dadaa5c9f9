"""hybrid_attention and packed_attention with backend="triton", as users call them, on Triton's interpreter.

The kernels' own tests are in tests/ops/parts/range_attention; this file tests what surrounds them: dispatch, options,
autograd, torch.compile, streams.
"""

import math
from dataclasses import fields

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import interpreted
from tests.rounding import nearly_equal
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.hybrid_attention import hybrid_attention, hybrid_attention_step, reference
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.packed_attention.reference import packed_attention as packed_attention_reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    ToleranceError,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    spread,
    uninitialized_is_nan,
    with_slack,
)

pytest.importorskip("triton")

CAUSAL = [None, "group", "token"]
BETA = torch.tensor([0.5, -math.inf])
LENGTHS = (9, 0, 2)  # groups of 4: three, none and one


def check(layout, inputs, **options):
    """out, lse and all gradients obey the tolerance rule; inputs are q, k, v, beta, q_features, k_features."""

    def arguments(q, k, v, beta, q_features=None, k_features=None):
        return (q, k, v, layout), {
            "beta": beta,
            "q_features": q_features,
            "k_features": k_features,
            **options,
        }

    def run(*tensors):
        given, named = arguments(*tensors)
        return hybrid_attention(*given, **named, return_lse=True, backend="triton")

    def oracle(*tensors):
        given, named = arguments(*tensors)
        return reference.hybrid_attention(*given, **named)

    with uninitialized_is_nan():
        check_against_reference(run, oracle, inputs, roundings=16, names=["out", "lse"])


@interpreted
@pytest.mark.parametrize("name", sorted(PACKINGS.keys() - {"equal", "around_blocks"}))
def test_packings(name):
    lengths = PACKINGS[name]
    layout = PackedLayout.from_lengths(lengths, group_size=14)
    check(layout, [*make_qkv(sum(lengths), 1), BETA[:1]], window=0)


@interpreted
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("window", [0, 1, None])
def test_windows(window, causal):
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    check(layout, [*make_qkv(11, 1), BETA[:1]], window=window, causal=causal)


@interpreted
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_without_beta(feature_map):
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    check(layout, [*make_qkv(11, 1), None], window=0, feature_map=feature_map, scale=0.5)


@interpreted
@pytest.mark.parametrize("causal", CAUSAL)
def test_given_features(causal):
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    features = make_tensor(11, 2, 20, seed=8).abs(), make_tensor(11, 1, 20, seed=9).abs()
    check(layout, [*make_qkv(11, 2, kv_heads=1), BETA, *features], window=0, causal=causal)


@interpreted
def test_features_and_beta_without_a_far_group_have_gradient_zero():
    layout = PackedLayout.from_lengths((4, 3), group_size=4)
    inputs = [*make_qkv(7, 1), BETA[:1], make_tensor(7, 1, 16).abs(), make_tensor(7, 1, 16).abs()]
    check(layout, inputs, window=0)


@interpreted
def test_the_check_itself_notices_a_wrong_beta():
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    q, k, v = make_qkv(11, 1)
    with pytest.raises(ToleranceError):
        check_against_reference(
            lambda q: [hybrid_attention(q, k, v, layout, window=0, beta=BETA[:1], backend="triton")],
            lambda q: [reference.hybrid_attention(q, k, v, layout, window=0, beta=BETA[:1] + 0.01)[0]],
            [q],
            gradients=False,
        )


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(), (0, 0), (17, 0, 1, 4)])
def test_packed_attention(lengths, causal):
    layout = PackedLayout.from_lengths(lengths, group_size=3)

    def run(q, k, v):
        return packed_attention(q, k, v, layout, causal=causal, return_lse=True, backend="triton")

    def oracle(q, k, v):
        return packed_attention_reference(q, k, v, layout, causal=causal)

    with uninitialized_is_nan():
        check_against_reference(run, oracle, make_qkv(sum(lengths), 2, kv_heads=1), names=["out", "lse"])


@interpreted
def test_half_precision_with_beta_in_float32():
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    inputs = [x.requires_grad_() for x in (*make_qkv(11, 2, dtype=torch.float16), BETA.clone())]
    found = gradients(layout, inputs, backend="triton", window=0)
    wanted = gradients(layout, inputs, backend="reference", window=0)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert max_error(a, b) <= 8 * torch.finfo(torch.float16).eps * max(1, float(b.abs().max()))


@interpreted
@pytest.mark.parametrize("given", [False, True])
def test_strides(given):
    """Columns are not contiguous, and the gradient is that of a sum, whose strides are all 0."""
    layout = PackedLayout.from_lengths((5, 1), group_size=3)
    inputs = [*make_qkv(6, 1)]
    inputs += [make_tensor(6, 1, 16, seed=s).abs() for s in (8, 9)] if given else []

    def results(tensors, expanded):
        q, k, v, *features = leaves = [x.requires_grad_() for x in tensors]
        options = dict(zip(("q_features", "k_features"), features, strict=False))
        out = hybrid_attention(q, k, v, layout, window=0, backend="triton", **options)
        grad = out.new_ones(()).expand_as(out) if expanded else torch.ones_like(out)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    expected = results([x.clone() for x in inputs], expanded=False)
    for a, b in zip(results([x.mT.contiguous().mT for x in inputs], expanded=True), expected, strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("given", [False, True])
def test_every_argument_may_be_strided(given):
    """This includes the bounds, beta and the gradient of lse, whose strides the kernels do not take."""
    layout = PackedLayout.from_lengths((7, 0, 5), group_size=3)
    inputs = [*make_qkv(12, 2, kv_heads=1), BETA.clone()]
    inputs += [make_tensor(12, heads, 16, seed=heads).abs() for heads in (2, 1)] if given else []
    grads = make_tensor(12, 2, 16, seed=7), make_tensor(12, 2, seed=8)

    def results(layout, inputs, grads):
        q, k, v, beta, *features = leaves = [x.requires_grad_() for x in inputs]
        options = dict(zip(("q_features", "k_features"), features, strict=False))
        options |= {"beta": beta, "window": 0, "return_lse": True, "backend": "triton"}
        out = hybrid_attention(q, k, v, layout, **options)
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    values = {x.name: getattr(layout, x.name) for x in fields(layout)}
    strided = PackedLayout(**{name: spread(x) if torch.is_tensor(x) else x for name, x in values.items()})
    expected = results(layout, [x.clone() for x in inputs], grads)
    actual = results(strided, list(map(spread, inputs)), list(map(spread, grads)))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@interpreted
def test_one_beta_for_all_heads():
    layout, (q, k, v) = PackedLayout.from_lengths((9,), group_size=3), make_qkv(9, 2, kv_heads=1)
    beta = torch.tensor([1.5])
    out, expected = (
        hybrid_attention(q, k, v, layout, window=0, beta=x, backend="triton")
        for x in (beta.expand(2), beta.repeat(2))
    )
    assert torch.equal(out, expected)


def gradients(layout, inputs, *, function=hybrid_attention, **options):
    """out, lse and the gradients of q, k, v and beta, for fixed gradients of both."""
    q, k, v, beta = inputs
    out, lse = function(q, k, v, layout, beta=beta, return_lse=True, **options)
    grads = make_tensor(*out.shape, seed=7, dtype=out.dtype), make_tensor(*lse.shape, seed=8)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, grads)]


@interpreted
@pytest.mark.parametrize("causal", [None, "token"])
def test_a_far_weight_of_zero_has_a_gradient(causal):
    layout = PackedLayout.from_lengths((9, 17), group_size=4)
    inputs = [*make_qkv(26, 2), torch.tensor([0.0, 0.5])]

    def run(q, k, v, weight, backend="triton"):
        return [
            hybrid_attention(q, k, v, layout, window=0, causal=causal, far_weight=weight, backend=backend)
        ]

    # The gradient of the weight is a sum over tokens of terms of about 8, each off by a rounding of its exponent.
    check_against_reference(run, lambda *x: run(*x, backend="reference"), inputs, roundings=48, floor=8.0)
    off = {"beta": torch.full([2], -torch.inf), "window": 0, "causal": causal, "backend": "triton"}
    [out] = run(*inputs[:3], torch.zeros(2))
    assert torch.equal(out, hybrid_attention(*inputs[:3], layout, **off))


def op_arguments(given):
    layout = PackedLayout.from_lengths((5, 0, 1), group_size=3)
    q, k, v = (with_slack(x, 1, value=0.0) for x in make_qkv(6, 1))
    features = (make_tensor(7, 1, 16).abs(), make_tensor(7, 1, 16).abs()) if given else (None, None)
    tensors = [layout.cu_seqlens, layout.cu_groups, layout.segment_groups]
    tensors += [layout.host_cu_seqlens, layout.host_cu_groups, layout.host_segment_groups]
    return (q, k, v, BETA[:1].clone(), *features, *tensors, 0, 0, None, "softmax", 0.5, False, None, "triton")


@interpreted
@pytest.mark.parametrize("given_features", [False, True])
def test_opcheck_backward(given_features):
    arguments = op_arguments(given_features)
    out, lse = torch.ops.vot_kernels.hybrid_attention_fwd(*arguments)
    backward = torch.ops.vot_kernels.hybrid_attention_bwd.default
    grad_lse = torch.ones_like(lse) if given_features else None
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (torch.ones_like(out), grad_lse, out, lse, *arguments), test_utils=tests)


@interpreted
def test_opcheck_forward():
    """With the gradients as torch.compile would have them."""
    inputs = [
        x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in op_arguments(True)
    ]
    torch.library.opcheck(torch.ops.vot_kernels.hybrid_attention_fwd.default, tuple(inputs))


@interpreted
def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")

    def step(*inputs, **options):
        return hybrid_attention(*inputs, window=0, backend="triton", **options)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    # PyTorch takes sizes that are equal in the first call to be equal always: here heads, segments + 1,
    # groups + 1, tokens and head_dim all differ.
    for lengths in [(5, 6, 1), (2, 0, 1, 5)]:
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = [x.requires_grad_() for x in (*make_qkv(sum(lengths), 2, kv_heads=1), BETA.clone())]
        actual = gradients(layout, inputs, function=compiled)
        for a, b in zip(actual, gradients(layout, inputs, function=step), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@interpreted
@pytest.mark.parametrize("given", [False, True])
def test_streaming_equals_the_whole_segment(given):
    layout = PackedLayout.from_cu_seqlens([0, 17], [0, 4, 4, 9, 10, 17])
    q, k, v = make_qkv(17, 2, kv_heads=1)
    features = {}
    if given:
        features["q_features"] = make_tensor(17, 2, 16, seed=7).abs()
        features["k_features"] = make_tensor(17, 1, 16, seed=8).abs()
    whole = hybrid_attention(q, k, v, layout, beta=BETA, causal="group", backend="triton", **features)
    state, outputs, begin = None, [], 0
    for length in layout.group_lengths:
        own = slice(begin, begin + length)
        pieces = {name: x[own] for name, x in features.items()}
        out, state = hybrid_attention_step(q[own], k[own], v[own], state, beta=BETA, **pieces)
        outputs.append(out)
        begin += length
    assert state.far is not None  # the window has been left
    assert nearly_equal(torch.cat(outputs), whole)


REFUSED = {
    "float64": (
        "dtype torch.float64 is not one of float16, bfloat16, float32",
        {"dtype": torch.float64},
        None,
    ),
    "head_dim 8": ("head_dim 8 is not from 16 to 256", {"head_dim": 8}, None),
    "head_dim 257": ("head_dim 257 is not from 16 to 256", {"head_dim": 257}, None),
    "width 8": ("feature width 8 is not from 16 to 256", {}, 8),
}


@interpreted
@pytest.mark.parametrize(("reason", "changes", "width"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_in_one_sentence(reason, changes, width):
    """The message says what the kernels cannot take, and "auto" uses the next backend."""
    layout = PackedLayout.from_lengths(LENGTHS, group_size=4)
    q, k, v = make_qkv(11, 1, **changes)
    features = {}
    if width is not None:
        features = {f"{name}_features": make_tensor(11, 1, width).abs() for name in "qk"}
    with pytest.raises(ValueError) as caught:
        hybrid_attention(q, k, v, layout, backend="triton", **features)
    message = f"No backend can serve hybrid_attention for these inputs: triton ({reason})."
    assert str(caught.value) == message
    following = select("hybrid_attention", "auto", q, features.get("q_features"))
    assert following in ("cpp", "torch")
    out = hybrid_attention(q, k, v, layout, **features)
    assert torch.equal(out, hybrid_attention(q, k, v, layout, backend=following, **features))


@interpreted
@pytest.mark.parametrize("op", ["hybrid_attention", "packed_attention"])
def test_auto_leaves_the_interpreter_to_tests(op):
    q = make_qkv(1)[0]
    following = "torch" if why_not_cpp("cpu") else "cpp"
    assert select(op, "triton", q) == "triton" and select(op, "auto", q) == following
