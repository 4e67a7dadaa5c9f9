"""Hybrid attention: backend torch against the reference, its limits, its gradients, its streams."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp
from tests.rounding import nearly_equal
from tests.threads import differing
from vot_kernels.ops.dispatch import BACKENDS, FUNCTIONS, describe_backends
from vot_kernels.ops.hybrid_attention import (
    HybridAttentionState,
    hybrid_attention,
    hybrid_attention_step,
    reference,
)
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_attention_reference
from vot_kernels.ops.parts.range_attention import blocks as _blocks
from vot_kernels.ops.parts.range_attention import torch as _range_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    ToleranceError,
    assert_close_to_exact,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CAUSAL = [None, "group", "token"]
BETA = torch.tensor([0.5, -1.0, -torch.inf, 2.0])


on_each_backend = pytest.mark.parametrize("backend", COMPUTING)


def check(layout, inputs, roundings=None, backend="torch", **options):
    """Outputs and gradients of a backend obey the tolerance rule; inputs are q, k, v, beta."""
    if roundings is None:  # PyTorch's fused CPU kernel has an exp of up to 20 ulp, which shows in float32;
        # in float64 the reference errs, too, where a normaliser is small
        roundings = {2: 4.0, 4: 16.0, 8: 64.0}[inputs[0].dtype.itemsize]

    def run(q, k, v, beta):
        return hybrid_attention(q, k, v, layout, beta=beta, return_lse=True, backend=backend, **options)

    def oracle(q, k, v, beta):
        return reference.hybrid_attention(q, k, v, layout, beta=beta, **options)

    check_against_reference(run, oracle, inputs, roundings=roundings, names=["out", "lse"])


def gradients(function, *inputs):
    out, lse = function(*inputs)
    lse = torch.where(lse.isfinite(), lse, 0)
    loss = (out * make_tensor(*out.shape, dtype=out.dtype)).sum() + (lse * lse.detach().cos()).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


@on_each_backend
@pytest.mark.parametrize("group_size", [1, 5])
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal, group_size, backend):
    layout = PackedLayout.from_lengths(lengths, group_size=group_size)
    inputs = make_qkv(sum(lengths), 4, 16)
    with uninitialized_is_nan():
        check(layout, [*inputs, BETA], backend=backend, causal=causal)


@on_each_backend
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("window", [0, 1, 2, 3, 9, (0, 2), (2, 0), (1, 3), None])
def test_windows(window, causal, backend):
    if causal and isinstance(window, tuple) and window[1]:
        pytest.skip("a causal window looks left only")
    layout = PackedLayout.from_lengths((20, 3, 33), group_size=5)
    check(layout, [*make_qkv(56, 4, 16), BETA], backend=backend, window=window, causal=causal)


@on_each_backend
@pytest.mark.parametrize("causal", CAUSAL)
def test_uneven_and_empty_groups(causal, backend):
    layout = PackedLayout.from_cu_seqlens([0, 17, 17, 30], [0, 2, 2, 9, 17, 17, 21, 22, 30])
    check(layout, [*make_qkv(30, 4, 16), BETA], backend=backend, causal=causal)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
def test_feature_maps_and_dtypes(name, causal, dtype, backend):
    layout = PackedLayout.from_lengths((18, 7, 25), group_size=4)
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    inputs = [*make_qkv(50, 4, 16, dtype=dtype), BETA.to(dtype)]
    check(layout, inputs, backend=backend, feature_map=name, causal=causal)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_normaliser_does_not_blow_up_the_rounding_of_the_output(dtype, backend):
    """Only far tokens count, with one feature: the output does not depend on q, and q times its gradient is 0."""
    q, k, v = make_qkv(64, head_dim=1, dtype=dtype)
    layout = PackedLayout.from_lengths([40, 24], group_size=4)
    options = {"window": 0, "feature_map": "relu", "beta": torch.full((2,), 60.0)}
    q, k = (0.01 * (q.abs() + 0.1)).requires_grad_(), k.abs() + 0.1
    out = hybrid_attention(q, k, v, layout, backend=backend, **options)
    (dq,) = torch.autograd.grad(out, q, make_tensor(*out.shape, dtype=dtype))
    assert (q * dq).float().abs().max() < 3e-5


@on_each_backend
@pytest.mark.parametrize("head_dim", [1, 16, 24, 40, 72, 80, 256])
def test_head_dims(head_dim, backend):
    layout = PackedLayout.from_lengths((18, 7, 25), group_size=4)
    check(layout, [*make_qkv(50, 4, head_dim), BETA], backend=backend)


@on_each_backend
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("causal", CAUSAL)
def test_grouped_query_heads(kv_heads, causal, backend):
    layout = PackedLayout.from_lengths((18, 7, 25), group_size=4)
    check(layout, [*make_qkv(50, 4, 16, kv_heads=kv_heads), BETA], backend=backend, causal=causal)


@on_each_backend
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("zeros", [False, True])
def test_given_features(causal, zeros, backend):
    layout = PackedLayout.from_lengths((18, 7, 25), group_size=4)
    q, k, v = make_qkv(50, 4, 16, kv_heads=2)
    q_features, k_features = make_tensor(50, 4, 6, seed=8).abs(), make_tensor(50, 2, 6, seed=9).abs()
    if zeros:  # orthogonal features: weights of 0 whose gradient is not 0
        q_features[:, :, 3:], k_features[::2, :, :3] = 0, 0

    def run(q, k, v, q_features, k_features, beta):
        options = {"q_features": q_features, "k_features": k_features, "causal": causal, "beta": beta}
        return hybrid_attention(q, k, v, layout, return_lse=True, backend=backend, **options)

    def oracle(q, k, v, q_features, k_features, beta):
        options = {"q_features": q_features, "k_features": k_features, "causal": causal, "beta": beta}
        return reference.hybrid_attention(q, k, v, layout, **options)

    check_against_reference(run, oracle, [q, k, v, q_features, k_features, BETA], roundings=16)


def test_beta_none_is_zero_and_scale_is_used():
    layout = PackedLayout.from_lengths((18, 7), group_size=4)
    q, k, v = make_qkv(25)
    out = hybrid_attention(q, k, v, layout)
    assert torch.equal(out, hybrid_attention(q, k, v, layout, beta=torch.zeros(2)))
    assert torch.equal(out, hybrid_attention(q, k, v, layout, scale=0.25))
    assert max_error(out, hybrid_attention(q, k, v, layout, scale=1.0)) > 0.01
    check(layout, [q, k, v, None], scale=1.0)


def check_far_weight(weight, backend, roundings=16.0, **options):
    """The weight and its log give the same results; only the weight has a gradient at 0."""
    layout = PackedLayout.from_lengths((20, 3, 33), group_size=5)

    def run(q, k, v, weight, backend=backend):
        given = {"far_weight": weight, "return_lse": True, "backend": backend}
        return hybrid_attention(q, k, v, layout, **given, **options)

    def oracle(q, k, v, weight):
        return reference.hybrid_attention(q, k, v, layout, far_weight=weight, **options)

    inputs = [*make_qkv(56, 4, 16, kv_heads=2, dtype=weight.dtype), weight]
    check_against_reference(run, oracle, inputs, roundings=roundings, names=["out", "lse"])
    out, lse = run(*inputs)
    same = {"beta": weight.to(lse.dtype).log(), "return_lse": True, "backend": backend}
    others = hybrid_attention(*inputs[:3], layout, **same, **options)
    for one, other in zip((out, lse), others, strict=True):
        # The reference multiplies by the weight, so a log of it may differ by roundings.
        distance = 64 * torch.finfo(one.dtype).eps * one.abs().max() if backend == "reference" else 0.0
        assert max_error(one, other) <= distance
    leaf = weight.clone().requires_grad_()
    run(*inputs[:3], leaf)[0].square().sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad != 0).all()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("weight", [[0.0, 0.3, 0.0, 2.0], [0.0] * 4])
@pytest.mark.parametrize("backend", [*COMPUTING, "reference"])
def test_far_weight(weight, causal, backend):
    check_far_weight(torch.tensor(weight), backend, causal=causal)


@pytest.mark.parametrize(
    ("dtype", "roundings"), [(torch.float16, 4.0), (torch.bfloat16, 4.0), (torch.float64, 64.0)]
)
@on_each_backend
def test_far_weight_of_any_dtype(dtype, roundings, backend):
    """In float64 the smallest weight is exp(-54), and exp errs by as many roundings."""
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    check_far_weight(torch.tensor([0.0, 0.25, 0.0, 2.0], dtype=dtype), backend, roundings=roundings)


@on_each_backend
def test_a_far_weight_of_zero_enters_no_other_gradient_however_small_the_near_part_is(backend):
    """Near scores of -40 and large features: whatever stands for a weight of 0 is far below either."""
    layout = PackedLayout.from_lengths((24, 9), group_size=3)
    q, k, v = make_qkv(33, 2, 16, dtype=torch.float16)
    q, k = q.abs() + 1, k.abs() + 1
    options = {"window": 0, "feature_map": "elu", "scale": -1.0}

    def run(q, k, v, weight):
        return hybrid_attention(
            q, k, v, layout, far_weight=weight, **options, return_lse=True, backend=backend
        )

    def oracle(q, k, v, weight):
        return reference.hybrid_attention(q, k, v, layout, far_weight=weight, **options)

    inputs = [q, k, v, torch.tensor([0.0, 1e-20])]
    assert run(*inputs)[1].max() < -20
    check_against_reference(run, oracle, inputs, roundings=4.0, names=["out", "lse"])


def test_the_derivative_at_a_far_weight_of_zero_is_the_limit_of_differences():
    layout = PackedLayout.from_lengths((20, 33), group_size=5)
    qkv = make_qkv(53, 2, 16, dtype=torch.float64)
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = hybrid_attention(*qkv, layout, far_weight=weight)
    [found] = torch.autograd.grad(out[:, :, 0].sum(), weight)
    moved = hybrid_attention(*qkv, layout, far_weight=torch.full_like(weight, 1e-7).detach())
    expected = (moved - out)[:, :, 0].sum(0) / 1e-7
    assert max_error(found, expected.detach()) < 1e-4 * expected.abs().max()


def test_far_weight_and_beta_are_one():
    layout = PackedLayout.from_lengths((18, 7), group_size=4)
    with pytest.raises(ValueError, match="either beta or far_weight"):
        hybrid_attention(*make_qkv(25), layout, beta=BETA[:2], far_weight=BETA[:2])
    with pytest.raises(ValueError, match="far_weight"):
        hybrid_attention(*make_qkv(25), layout, far_weight=BETA)


def test_the_check_itself_notices_a_wrong_beta():
    layout = PackedLayout.from_lengths((18, 7), group_size=4)
    q, k, v = make_qkv(25, 4)
    with pytest.raises(ToleranceError):
        check_against_reference(
            lambda q: [hybrid_attention(q, k, v, layout, beta=BETA)],
            lambda q: [reference.hybrid_attention(q, k, v, layout, beta=BETA + 0.01)[0]],
            [q],
        )


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
def test_gradcheck(name, causal):
    layout = PackedLayout.from_lengths((7, 0, 2, 5), group_size=2)
    inputs = [x.requires_grad_() for x in (*make_qkv(14, 2, 3, kv_heads=1, dtype=torch.float64),)]
    beta = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, beta):
        options = {"beta": beta, "feature_map": name, "causal": causal, "backend": "torch"}
        return hybrid_attention(q, k, v, layout, return_lse=True, **options)

    assert torch.autograd.gradcheck(run, (*inputs, beta), fast_mode=True)


@on_each_backend
def test_gradient_of_lse_alone(backend):
    layout = PackedLayout.from_lengths((20, 6), group_size=4)
    check_against_reference(
        lambda q, k, b: hybrid_attention(q, k, k, layout, beta=b, return_lse=True, backend=backend)[1:],
        lambda q, k, b: reference.hybrid_attention(q, k, k, layout, beta=b)[1:],
        [*make_qkv(26, 4)[:2], BETA],
        roundings=16,
    )


def test_results_over_disjoint_keys_merge_by_lse():
    """The far part is the difference between window attention (beta = -inf) and hybrid attention."""
    layout = PackedLayout.from_lengths((24,), group_size=4)
    q, k, v = make_qkv(24, 2, dtype=torch.float64)
    near, near_lse = hybrid_attention(q, k, v, layout, beta=torch.full((2,), -torch.inf), return_lse=True)
    far, far_lse = hybrid_attention(q, k, v, layout, beta=torch.full((2,), 100.0), return_lse=True)
    joint = torch.logaddexp(near_lse, far_lse - 100)[..., None]
    merged = near * (near_lse[..., None] - joint).exp() + far * (far_lse[..., None] - 100 - joint).exp()
    assert max_error(merged, hybrid_attention(q, k, v, layout)) < 1e-12


@on_each_backend
@pytest.mark.parametrize("window", [3, 4, None, (3, 3)])
def test_window_over_all_groups_is_exact_attention(window, backend):
    layout = PackedLayout.from_lengths((16, 9), group_size=4)
    q, k, v = make_qkv(25, 2)
    options = {"window": window, "beta": torch.tensor([9.0, -3.0]), "backend": backend}
    out = hybrid_attention(q, k, v, layout, **options)
    for begin, end in ((0, 16), (16, 25)):
        heads_first = [x[None, begin:end].transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first)
        assert nearly_equal(out[begin:end], expected[0].transpose(0, 1))


@on_each_backend
def test_beta_of_minus_infinity_is_window_attention(backend):
    layout = PackedLayout.from_lengths((24,), group_size=4)
    q, k, v = make_qkv(24, 2)
    out = hybrid_attention(q, k, v, layout, beta=torch.full((2,), -torch.inf), backend=backend)
    groups = layout.token_groups
    mask = (groups[:, None] - groups[None, :]).abs() <= 1
    heads_first = [x[None].transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    assert nearly_equal(out, expected[0].transpose(0, 1))


def test_near_of_no_weight_leaves_linear_attention_whatever_beta():
    """A window has at least the own group, so near fades as beta grows, and the limit is linear attention."""
    layout = PackedLayout.from_lengths((12,), group_size=4)
    q, k, v = make_qkv(12, 2, dtype=torch.float64)
    results = [
        hybrid_attention(q, k, v, layout, window=0, beta=torch.full((2,), beta)) for beta in (60.0, 90.0)
    ]
    weights = torch.einsum("ihd,jhd->hij", q.softmax(-1), k.softmax(-1))
    groups = layout.token_groups
    weights = weights * (groups[:, None] != groups[None, :])
    expected = torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v)
    for out in results:
        assert max_error(out, expected) < 1e-12


@pytest.mark.parametrize("backend", [*COMPUTING, "reference"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_slack_rows_are_never_read(backend, causal):
    layout = PackedLayout.from_lengths((9, 0, 14), group_size=4)
    clean = [x.requires_grad_() for x in make_qkv(23, 4)]
    poisoned = [with_slack(x.detach(), 3).requires_grad_() for x in clean]

    def run(q, k, v):
        options = {"beta": BETA, "causal": causal, "return_lse": True, "backend": backend}
        return hybrid_attention(q, k, v, layout, **options)

    out, lse = run(*poisoned)
    assert (out[23:] == 0).all() and (lse[23:] == -torch.inf).all()
    assert torch.equal(out[:23], run(*clean)[0])
    grad = torch.full_like(out, torch.nan)
    grad[:23] = make_tensor(23, 4, 16)
    dirty = torch.autograd.grad(out, poisoned, grad)
    expected = torch.autograd.grad(run(*clean)[0], clean, grad[:23])
    for a, b in zip(dirty, expected, strict=True):
        assert (a[23:] == 0).all() and torch.equal(a[:23], b)


@pytest.mark.parametrize("backend", [*COMPUTING, "reference"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_nan_stays_in_its_segment(backend, causal):
    layout = PackedLayout.from_lengths((9, 12, 14), group_size=4)
    clean = [x.requires_grad_() for x in make_qkv(35, 4)]
    poisoned = [poison_segment(x.detach(), layout, 1).requires_grad_() for x in clean]

    def run(q, k, v):
        options = {"beta": BETA, "causal": causal, "return_lse": True, "backend": backend}
        out, lse = hybrid_attention(q, k, v, layout, **options)
        return out, lse

    expected, actual = run(*clean), run(*poisoned)
    assert actual[0][9:21].isnan().all()
    kept = [*range(9), *range(21, 35)]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[kept], b[kept])
    grad = make_tensor(35, 4, 16)
    for a, b in zip(
        torch.autograd.grad(actual[0], poisoned, grad),
        torch.autograd.grad(expected[0], clean, grad),
        strict=True,
    ):
        assert torch.equal(a[kept], b[kept])


@on_each_backend
@pytest.mark.parametrize("causal", CAUSAL)
def test_packed_equals_unpacked(causal, backend):
    lengths = (24, 7, 24, 33)
    layout = PackedLayout.from_lengths(lengths, group_size=4)
    q, k, v = make_qkv(sum(lengths), 4)
    options = {"beta": BETA, "causal": causal, "backend": backend}
    packed, begin = hybrid_attention(q, k, v, layout, **options), 0
    for length in lengths:
        own = slice(begin, begin + length)
        alone = PackedLayout.from_lengths((length,), group_size=4)
        out = hybrid_attention(q[own], k[own], v[own], alone, **options)
        assert nearly_equal(packed[own], out)
        begin += length


@on_each_backend
def test_repeats_bitwise(backend):
    layout = PackedLayout.from_lengths((31, 8, 50), group_size=4)
    inputs = [x.requires_grad_() for x in (*make_qkv(89, 4), BETA.clone())]

    def run():
        return gradients(
            lambda q, k, v, b: hybrid_attention(q, k, v, layout, beta=b, return_lse=True, backend=backend),
            *inputs,
        )

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@on_each_backend
def test_large_scores_stay_finite(backend):
    """Near scores of -300 without a far part: exp(beta - lse) alone would overflow and 0 * inf is NaN."""
    layout = PackedLayout.from_lengths((4, 12), group_size=4)
    q, k, v = make_qkv(16, 4)
    k = (-q * 300 / (q * q).sum(-1, keepdim=True) / 16**-0.5).detach()
    k[4:] = make_tensor(12, 4, 16)
    largest = (
        float(torch.einsum("ihd,jhd->hij", q[:4], k[:4]).abs().max()) * 16**-0.5
    )  # with another's q, above 300
    for factor, beta in ((1, None), (3, BETA)):  # a score of 300 is known to 300 eps
        check(layout, [q * factor, k, v, beta], roundings=largest * factor, backend=backend)


@on_each_backend
@pytest.mark.parametrize("causal", CAUSAL)
def test_weights_sum_to_one_however_large_the_scores(causal, backend):
    """An lse of 1,000 is rounded to 3e-5; parts merged only by it would have weights with that error."""
    layout = PackedLayout.from_lengths([300, 24], group_size=20)
    q, k = (30 * x for x in make_qkv(324)[:2])
    beta = torch.full((2,), 1000.0)
    out = hybrid_attention(q, k, torch.ones_like(k), layout, beta=beta, causal=causal, backend=backend)
    assert (out - 1).abs().max() < 2e-6


@cpp
@pytest.mark.parametrize("causal", CAUSAL)
def test_any_number_of_threads_gives_the_same_bits(causal):
    layout = PackedLayout.from_lengths(
        (1500, 3, 900), group_size=200
    )  # the first segment's keys are in two parts
    inputs = [x.requires_grad_() for x in (*make_qkv(2403, 4, 16, kv_heads=2), BETA.clone())]

    def run(q, k, v, beta):
        options = {"beta": beta, "causal": causal, "return_lse": True, "backend": "cpp"}
        return hybrid_attention(q, k, v, layout, **options)

    assert differing(lambda: [*run(*inputs), *gradients(run, *inputs)]) == []


@cpp
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("causal", CAUSAL)
def test_small_groups_in_blocks(causal, name):
    """Segments without states, with states beside pairs, and in parts of dq."""
    for lengths, group_size, head_dim in (((64, 9, 0, 1), 1, 64), ((150, 300), 3, 16), ((1500, 40), 8, 8)):
        layout = PackedLayout.from_lengths(lengths, group_size=group_size)
        inputs = [*make_qkv(sum(lengths), 4, head_dim, kv_heads=2), BETA]
        for window in (0, 5) if sum(lengths) < 1000 else (2,):
            with uninitialized_is_nan():
                check(layout, inputs, backend="cpp", window=window, causal=causal, feature_map=name)


@cpp
@pytest.mark.parametrize("causal", CAUSAL)
def test_small_groups_in_blocks_with_given_features(causal):
    for lengths, group_size in (((64, 9, 0, 1), 1), ((1500, 40), 8)):
        layout, tokens = PackedLayout.from_lengths(lengths, group_size=group_size), sum(lengths)
        features = [make_tensor(tokens, heads, 12, seed=heads).abs() for heads in (4, 2)]
        options = {"window": 2, "causal": causal}

        def run(q, k, v, beta, x, y, layout=layout, options=options):
            given = {"q_features": x, "k_features": y, "return_lse": True, "backend": "cpp"}
            return hybrid_attention(q, k, v, layout, beta=beta, **given, **options)

        def oracle(q, k, v, beta, x, y, layout=layout, options=options):
            given = {"q_features": x, "k_features": y}
            return reference.hybrid_attention(q, k, v, layout, beta=beta, **given, **options)

        inputs = [*make_qkv(tokens, 4, 16, kv_heads=2), BETA, *features]
        with uninitialized_is_nan():
            check_against_reference(run, oracle, inputs, roundings=16.0, names=["out", "lse"])


@cpp
@pytest.mark.parametrize("causal", CAUSAL)
def test_small_groups_give_the_same_bits_with_any_number_of_threads(causal):
    layout = PackedLayout.from_lengths((1500, 3, 200, 40), group_size=3)
    inputs = [x.requires_grad_() for x in (*make_qkv(1743, 4, 16, kv_heads=2), BETA.clone())]

    def run(q, k, v, beta):
        options = {"beta": beta, "causal": causal, "window": 4, "return_lse": True, "backend": "cpp"}
        return hybrid_attention(q, k, v, layout, **options)

    assert differing(lambda: [*run(*inputs), *gradients(run, *inputs)]) == []


@cpp
@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("causal", CAUSAL)
def test_long_segments_in_parts(window, causal):
    """Segments of several tasks, blocks of keys and parts of dq."""
    layout = PackedLayout.from_lengths((2100, 40, 1100), group_size=300)
    inputs = [*make_qkv(3240, 2, 8, kv_heads=1), torch.tensor([0.5, -1.0])]
    with uninitialized_is_nan():
        check(layout, inputs, backend="cpp", window=window, causal=causal)


def test_tokens_that_see_nothing_get_zero():
    layout = PackedLayout.from_lengths((8,), group_size=4)
    q, k, v = make_qkv(8, 1, 4)
    out, total = linear_attention_reference(-q.abs(), k, v, layout, feature_map="relu")
    assert (out == 0).all() and (total == -torch.inf).all()


@given(
    lengths=st.lists(st.integers(0, 20), max_size=5),
    group_size=st.sampled_from([20, 1, 3, 8]),
    causal=st.sampled_from(CAUSAL),
    window=st.one_of(st.none(), st.integers(0, 4)),
    name=st.sampled_from(["softmax", "elu", "relu"]),
)
@settings(max_examples=25)
def test_any_packing(lengths, group_size, causal, window, name):
    layout = PackedLayout.from_lengths(lengths, group_size=group_size)
    inputs = [x.requires_grad_() for x in make_qkv(sum(lengths), 4, 8, kv_heads=2, dtype=torch.float64)]
    inputs.append(BETA.double().requires_grad_())
    options = {"window": window, "causal": causal, "feature_map": name, "return_lse": True}
    runs = [
        lambda q, k, v, b, backend=backend: hybrid_attention(
            q, k, v, layout, beta=b, backend=backend, **options
        )
        for backend in ("torch", "reference")
    ]
    for a, b in zip(runs[0](*inputs), runs[1](*inputs), strict=True):
        assert max_error(a, b) < 1e-12
    for a, b in zip(gradients(runs[0], *inputs), gradients(runs[1], *inputs), strict=True):
        assert max_error(a, b) < 1e-11


@cpp
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 97]), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 3, 8, 16, 17]),
    head_dim=st.integers(1, 80),
    causal=st.sampled_from(CAUSAL),
    window=st.one_of(st.none(), st.integers(0, 4)),
    name=st.sampled_from(["softmax", "elu", "relu"]),
)
@settings(max_examples=25)
def test_kernels_serve_any_packing(lengths, group_size, head_dim, causal, window, name):
    layout = PackedLayout.from_lengths(lengths, group_size=group_size)
    inputs = [*make_qkv(sum(lengths), 4, head_dim, kv_heads=2), BETA]
    options = {"window": window, "causal": causal, "feature_map": name}
    with uninitialized_is_nan():
        check(layout, inputs, backend="cpp", **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_matmul_path_equals_the_fused_kernel(monkeypatch, causal, budget):
    """The path of devices without the fused CPU kernel, with tiles down to one row."""
    monkeypatch.setattr(_range_attention, "_MAX_SCORES", budget)
    q, k, v = (make_tensor(3, 2, 7, 8, seed=i, dtype=torch.float64) for i in range(3))
    k, v = (k, v) if causal else (torch.cat([x, x.roll(1)], 2) for x in (k, v))
    fused = _range_attention._attend(q, k, v, causal, 0.3)
    tiled = _range_attention._attend_matmul(q, k, v, causal, 0.3)
    grad = make_tensor(3, 2, 7, 8, seed=5, dtype=torch.float64)
    arguments = (grad, q, k, v, *fused, causal, 0.3)
    for a, b in zip(
        [*fused, *_range_attention._attend_backward(*arguments)],
        [*tiled, *_range_attention._attend_matmul_backward(*arguments)],
        strict=True,
    ):
        assert max_error(a, b) < 1e-12


def op_arguments(causal=None, given=False, weighs=False, backend="torch"):
    layout = PackedLayout.from_lengths((9, 0, 5), group_size=2)
    q, k, v = make_qkv(15, 2, 4, kv_heads=1)  # one slack row
    features = (make_tensor(15, 2, 3).abs(), make_tensor(15, 1, 3).abs()) if given else (None, None)
    tensors = [layout.cu_seqlens, layout.cu_groups, layout.segment_groups]
    tensors += [layout.host_cu_seqlens, layout.host_cu_groups, layout.host_segment_groups]
    beta = torch.tensor([0.5, 0.0]) if weighs else BETA[:2]
    return (q, k, v, beta, *features, *tensors, 1, 0, causal, "softmax", 0.5, weighs, None, backend)


@on_each_backend
@pytest.mark.parametrize(("given_features", "weighs"), [(False, False), (True, False), (False, True)])
def test_opcheck(given_features, weighs, backend):
    arguments = op_arguments("group", given_features, weighs, backend)
    forward = torch.ops.vot_kernels.hybrid_attention_fwd.default
    out, lse = forward(*arguments)
    backward = torch.ops.vot_kernels.hybrid_attention_bwd.default
    for grad_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward, (torch.ones_like(out), grad_lse, out, lse, *arguments))
    inputs = [
        x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
    ]
    torch.library.opcheck(forward, tuple(inputs))


def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, v, layout, beta):
        return hybrid_attention(q, k, v, layout, beta=beta, return_lse=True)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    # PyTorch takes sizes that are equal in the first call to be equal always: here heads, segments + 1,
    # groups + 1, tokens and head_dim all differ.
    for lengths in [(5, 6, 20, 1, 2), (40,), (3, 0, 1, 9), (1, 2, 3, 4, 5, 6), (2,) * 11]:
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = [x.requires_grad_() for x in (*make_qkv(sum(lengths), 4), BETA.clone())]
        actual = gradients(lambda q, k, v, b, layout=layout: compiled(q, k, v, layout, b), *inputs)
        expected = gradients(lambda q, k, v, b, layout=layout: step(q, k, v, layout, b), *inputs)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_sizes_that_are_equal_by_chance_cost_one_more_compilation():
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, v, layout):
        return hybrid_attention(q, k, v, layout)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for lengths in [(2, 3), (4,), (20, 30), (7, 9, 12), (13,)]:  # first: as many groups as segments
        layout = PackedLayout.from_lengths(lengths, group_size=4)
        inputs = make_qkv(sum(lengths))
        assert torch.equal(compiled(*inputs, layout), step(*inputs, layout))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("window", [0, 1, 2, (1, 0)])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", COMPUTING)
def test_streaming_equals_the_whole_segment(backend, window, kv_heads, given):
    layout = PackedLayout.from_cu_seqlens([0, 41], [0, 7, 7, 15, 18, 25, 29, 41])
    q, k, v = make_qkv(41, 4, kv_heads=kv_heads)
    features = {}
    if given:
        features["q_features"] = make_tensor(41, 4, 5, seed=7).abs()
        features["k_features"] = make_tensor(41, kv_heads, 5, seed=8).abs()
    options = {"window": window, "beta": BETA}
    whole = hybrid_attention(q, k, v, layout, causal="group", backend="reference", **options, **features)
    state, outputs, begin = None, [], 0
    for length in layout.group_lengths:
        own = slice(begin, begin + length)
        pieces = {name: x[own] for name, x in features.items()}
        options["backend"] = backend
        out, state = hybrid_attention_step(q[own], k[own], v[own], state, **options, **pieces)
        outputs.append(out)
        begin += length
    assert nearly_equal(torch.cat(outputs), whole)


@cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_a_step_of_strided_half_precision_on_either_backend(dtype, feature_map):
    """Steps may change the backend: both keep the same state."""
    lengths = [5, 1, 40, 17, 3, 9]
    layout = PackedLayout.from_cu_seqlens([0, sum(lengths)], [0, *itertools.accumulate(lengths)])
    qkv = make_tensor(sum(lengths), 3, 4, 72, seed=3).to(dtype)
    q, k, v = qkv[:, 0], qkv[:, 1, ::2], qkv[:, 2, ::2]
    wide = (x.double() for x in (q, k, v))
    options = {"window": 1, "beta": BETA, "feature_map": feature_map}
    expected = hybrid_attention(*wide, layout, causal="group", backend="reference", **options)
    state, begin = None, 0
    for i, length in enumerate(lengths):
        own = slice(begin, begin + length)
        backend = ("cpp", "cpp", "torch")[i % 3]
        out, state = hybrid_attention_step(q[own], k[own], v[own], state, backend=backend, **options)
        assert out.dtype == dtype and (state.far is None or state.far.dtype == torch.float32)
        tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
        assert (out.double() - expected[own]).abs().max() <= tolerance
        begin += length


@cpp
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=6),
    repeats=st.sampled_from([1, 2, 4]),
    head_dim=st.integers(1, 80),
    window=st.integers(0, 3),
    name=st.sampled_from(["softmax", "elu", "relu"]),
    dtype=st.sampled_from(DTYPES[:3]),
    width=st.sampled_from([None, 1, 5, 16, 19]),
)
@settings(max_examples=40)
def test_kernels_serve_any_stream(lengths, repeats, head_dim, window, name, dtype, width):
    """Views of one product; what lies between their heads is NaN. Features are given if they have a `width`."""
    tokens, bounds = sum(lengths), [0, *itertools.accumulate(lengths)]
    layout = PackedLayout.from_cu_seqlens([0, tokens], bounds)
    qkv = make_tensor(tokens, 3, 4, head_dim, dtype=dtype)
    unread = [h for h in range(4) if h % repeats]
    qkv[:, 1:, unread] = torch.nan
    inputs = [qkv[:, 0], qkv[:, 1, ::repeats], qkv[:, 2, ::repeats]]
    if width is not None:
        inputs += [make_tensor(tokens, x.shape[1], width, seed=7, dtype=dtype).abs() for x in inputs[:2]]
    options = {"window": window, "beta": BETA, "feature_map": name}

    def run(*inputs):
        state, outputs = None, []
        for begin, end in itertools.pairwise(bounds):
            q, k, v, *features = (x[begin:end] for x in inputs)
            named = dict(zip(("q_features", "k_features"), features, strict=False))
            out, state = hybrid_attention_step(q, k, v, state, backend="cpp", **options, **named)
            outputs.append(out)
        return [torch.cat(outputs)]

    def oracle(q, k, v, *features):
        named = dict(zip(("q_features", "k_features"), features, strict=False))
        return reference.hybrid_attention(q, k, v, layout, causal="group", **options, **named)[:1]

    with uninitialized_is_nan():
        check_against_reference(run, oracle, inputs, roundings=16, gradients=False)


@cpp
def test_a_step_has_the_same_bits_with_any_number_of_threads():
    groups = [make_qkv(70, 4, 64, seed=i) for i in range(4)]

    def stream():
        state, results = None, []
        for group in groups:
            out, state = hybrid_attention_step(*group, state, backend="cpp")
            results.append(out)
        return [*results, state.far]

    assert not differing(stream)


def test_a_step_names_the_backends_that_it_has():
    group = make_qkv(5)
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match=f"No backend can serve hybrid_attention_step.*{backend}"):
            hybrid_attention_step(*group, backend=backend)
    with pytest.raises(ValueError, match="backend must be one of"):
        hybrid_attention_step(*group, backend="cuda")
    out, state = hybrid_attention_step(*make_qkv(0), backend="auto")
    assert out.shape[0] == 0 and isinstance(state, HybridAttentionState)


def test_streaming_state_keeps_its_size():
    state, sizes = None, []
    for i in range(30):
        _, state = hybrid_attention_step(*make_qkv(5, seed=i), state, window=2)
        sizes.append(state.num_bytes)
    assert len(set(sizes[3:])) == 1 and state.far.dtype == torch.float32


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=cpp), "torch"])
def test_a_state_without_groups_belongs_to_its_stream(backend):
    """With a window of 0 there is only the sum over the groups."""
    options = {"window": 0, "backend": backend}
    _, state = hybrid_attention_step(*make_qkv(5, 4, 16), **options)
    for other in (make_qkv(5, 4, 32), make_qkv(5, 4, 16, kv_heads=2)):
        with pytest.raises(ValueError, match="earlier groups: their state has the shape"):
            hybrid_attention_step(*other, state, **options)
    q, k, v = make_qkv(5, 4, 16)
    features = {"q_features": q[..., :3].abs(), "k_features": k[..., :3].abs()}
    with pytest.raises(ValueError, match="these make one of"):
        hybrid_attention_step(q, k, v, state, **features, **options)
    with pytest.raises(TypeError, match="float32, and k in torch.float64"):
        hybrid_attention_step(q.double(), k.double(), v.double(), state, window=0, backend="torch")
    with pytest.raises(ValueError, match="on the device"):
        hybrid_attention_step(*(x.to("meta") for x in (q, k, v)), state, window=0, backend="torch")
    hybrid_attention_step(q, k, v, state, **options)


def test_streaming_errors():
    group = make_qkv(5)
    _, state = hybrid_attention_step(*group)
    with pytest.raises(ValueError, match="window .* None"):
        hybrid_attention_step(*group, window=None)
    with pytest.raises(ValueError, match="looks left"):
        hybrid_attention_step(*group, window=(1, 1))
    with pytest.raises(ValueError, match="earlier groups"):
        hybrid_attention_step(*make_qkv(5, 2, 8), state)
    with pytest.raises(TypeError, match="dtype"):
        hybrid_attention_step(*make_qkv(5, dtype=torch.float64), state)
    with pytest.raises(TypeError, match="HybridAttentionState"):
        hybrid_attention_step(*group, (state,))
    with pytest.raises(RuntimeError, match="inference"):
        hybrid_attention_step(*make_qkv(5, requires_grad=True))
    assert isinstance(state, HybridAttentionState)


def bad(**changes):
    q, k, v = make_qkv(12, 4)
    arguments = {"q": q, "k": k, "v": v, "layout": PackedLayout.from_lengths((12,), group_size=4)}
    return hybrid_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            ValueError,
            r"q must have the shape \[tokens, heads, head_dim\], got \[12, 64\]",
            {"q": torch.zeros(12, 64)},
        ),
        (TypeError, "q must be a tensor", {"q": [1.0]}),
        (
            TypeError,
            "q must be float16, .* got torch.int64",
            {"q": torch.zeros(12, 4, 16, dtype=torch.int64)},
        ),
        (TypeError, "k must have the dtype of q, torch.float32", {"k": torch.zeros(12, 4, 16).half()}),
        (
            ValueError,
            "v must be on the device of q, cpu, got meta",
            {"v": torch.zeros(12, 4, 16, device="meta")},
        ),
        (
            ValueError,
            "agree in tokens and head_dim",
            {"k": torch.zeros(12, 4, 8), "v": torch.zeros(12, 4, 8)},
        ),
        (ValueError, "agree in tokens and head_dim", {"v": torch.zeros(11, 4, 16)}),
        (ValueError, "4 heads of q must be a multiple of the 3", dict.fromkeys("kv", torch.zeros(12, 3, 16))),
        (ValueError, "head_dim must be at least 1", dict.fromkeys("qkv", torch.zeros(12, 4, 0))),
        (TypeError, "layout must be a PackedLayout, as .* got list", {"layout": [0, 12]}),
        (ValueError, "12 rows, fewer than the 13 tokens", {"layout": PackedLayout.from_lengths([13])}),
        (
            ValueError,
            "layout is on meta but q on cpu",
            {"layout": PackedLayout.from_lengths([12], device="meta")},
        ),
        (
            ValueError,
            "feature_map must be one of 'softmax', 'elu', 'relu', got 'exp'",
            {"feature_map": "exp"},
        ),
        (
            ValueError,
            "causal must be one of None, 'group', 'token', False, True, got 'frame'",
            {"causal": "frame"},
        ),
        (ValueError, "backend must be one of 'auto', .* got 'cuda'", {"backend": "cuda"}),
        (ValueError, "no Triton kernel runs on CPU tensors", {"backend": "triton"}),
        (ValueError, "window must be an int >= 0.* got -1", {"window": -1}),
        (ValueError, r"window must be .* got \(1, -2\)", {"window": (1, -2)}),
        (ValueError, "window must be .* got True", {"window": True}),
        (ValueError, "window must be .* got 1.5", {"window": 1.5}),
        (ValueError, "causal window looks left only", {"window": (1, 1), "causal": "group"}),
        (ValueError, r"beta must have the shape \[4\], got \[3\]", {"beta": torch.zeros(3)}),
        (TypeError, "beta must be floating point", {"beta": torch.zeros(4, dtype=torch.int32)}),
        (ValueError, "given together", {"q_features": torch.ones(12, 4, 5)}),
        (
            ValueError,
            r"k_features must have the shape \[12, 4, 5\], got \[12, 4, 6\]",
            {"q_features": torch.ones(12, 4, 5), "k_features": torch.ones(12, 4, 6)},
        ),
    ],
)
def test_malformed_inputs_get_one_sentence(error, message, changes):
    with pytest.raises(error, match=message) as caught:
        bad(**changes)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text


def test_dispatch_lists_every_reason():
    described = describe_backends("cpu")
    assert set(described) == set(FUNCTIONS)
    for op, backends in described.items():
        assert list(backends) == list(BACKENDS)
        assert backends["triton"] and not backends["torch"], op
        assert bool(backends["reference"]) == (op == "hybrid_attention_step"), op
    refused = describe_backends("cpu", torch.int32)["hybrid_attention"]
    assert all(refused[name] for name in BACKENDS)


def test_group_boundaries_matter():
    """The same tokens under other groups give another result: the test above would notice ignored groups."""
    q, k, v = make_qkv(24, 2)
    by_four, by_six = (PackedLayout.from_lengths((24,), group_size=n) for n in (4, 6))
    assert max_error(hybrid_attention(q, k, v, by_four), hybrid_attention(q, k, v, by_six)) > 0.01


def test_many_segments_in_few_batches(monkeypatch):
    """300 segments of 4 lengths are a handful of batches, not 300."""
    calls = itertools.count()
    attend = _range_attention._attend
    monkeypatch.setattr(_range_attention, "_attend", lambda *a: (next(calls), attend(*a))[1])
    layout = PackedLayout.from_lengths((3, 5, 7, 2) * 75, group_size=2)
    q, k, v = make_qkv(layout.num_tokens, 1, 4)
    out = hybrid_attention(q, k, v, layout)
    assert next(calls) <= 12
    expected = reference.hybrid_attention(q, k, v, layout)[0]
    assert_close_to_exact(out, expected, expected.double())


@pytest.mark.gpu
@pytest.mark.parametrize("causal", CAUSAL)
def test_cuda(causal):
    layout = PackedLayout.from_lengths((40, 0, 7, 90), group_size=16, device="cuda")
    inputs = [x.cuda() for x in (*make_qkv(137, 4), BETA)]
    check(layout, inputs, causal=causal, roundings=16)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_heads_in_chunks(monkeypatch, kv_heads):
    """With no memory to spare every key head is worked on alone, and the results are the same."""
    layout = PackedLayout.from_lengths((18, 7, 25), group_size=4)
    inputs = [*make_qkv(51, 4, 16, kv_heads=kv_heads), BETA]  # one slack row
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run():
        return gradients(
            lambda q, k, v, b: hybrid_attention(q, k, v, layout, beta=b, return_lse=True), *leaves
        )

    at_once = run()
    monkeypatch.setitem(_blocks._CHUNK_BYTES, "cpu", 1)
    q, k = inputs[:2]
    assert len(_blocks.head_chunks(q, k, 0)) == kv_heads
    for a, b in zip(at_once, run(), strict=True):
        assert nearly_equal(a, b)
    check(layout, inputs)
