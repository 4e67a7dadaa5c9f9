"""The range attention kernels against the reference, on Triton's interpreter."""

import math

import pytest
import torch

from tests.marks import interpreted
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.hybrid_attention import triton as hybrid_triton
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention.triton import (
    KeyRanges,
    range_attention_backward,
    range_attention_forward,
)
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    ToleranceError,
    check_against_reference,
    make_qkv,
    make_tensor,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)


class RangeAttention(torch.autograd.Function):
    """out and lse of the kernels, with their gradients."""

    @staticmethod
    def forward(ctx, q, k, v, ranges, scale):
        out, lse = range_attention_forward(q, k, v, ranges, scale)
        ctx.save_for_backward(out, lse, q, k, v)
        ctx.set_materialize_grads(False)
        ctx.ranges, ctx.scale = ranges, scale
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        out, lse, q, k, v = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        grads = range_attention_backward(grad, grad_lse, out, lse, q, k, v, ctx.ranges, ctx.scale)
        return *grads, None, None


def near(layout, window=None, causal=None):
    return Geometry.of(layout, window, causal).key_ranges()


def run(layout, q, k, v, window=None, causal=None, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return RangeAttention.apply(q, k, v, near(layout, window, causal), scale)


def oracle(layout, q, k, v, window=None, causal=None, scale=None):
    beta = torch.full((q.shape[1],), -math.inf)
    return reference.hybrid_attention(
        q, k, v, layout, window=window, causal=causal, scale=scale, beta=beta.to(q.dtype)
    )


def check(layout, inputs, roundings=None, **options):
    """Outputs and gradients of the kernels obey the tolerance rule."""
    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: run(layout, *x, **options),
            lambda *x: oracle(layout, *x, **options),
            inputs,
            names=["out", "lse"],
            roundings=roundings,
        )


def results(layout, q, k, v, **options):
    """out, lse, dq, dk, dv for fixed gradients of out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with uninitialized_is_nan():
        out, lse = run(layout, *leaves, **options)
        grads = make_tensor(*out.shape, seed=7, dtype=out.dtype), make_tensor(*lse.shape, seed=8)
        return [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]


@interpreted
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths):
    layout = PackedLayout.from_lengths(lengths, group_size=7)
    check(layout, make_qkv(sum(lengths), 1, 16))


@interpreted
@pytest.mark.parametrize("causal", [None, "group", "token"])
@pytest.mark.parametrize("window", [None, 0, 1, (2, 0)])
def test_windows(window, causal):
    layout = PackedLayout.from_lengths((3, 0, 34), group_size=6)
    check(layout, make_qkv(37, 1, 16), window=window, causal=causal)


@interpreted
def test_a_window_that_looks_right():
    layout = PackedLayout.from_lengths((3, 41), group_size=6)
    check(layout, make_qkv(44, 1, 16), window=(0, 2))


@interpreted
def test_uneven_and_empty_groups():
    layout = PackedLayout.from_cu_seqlens([0, 17, 17, 30, 30], [0, 2, 2, 9, 17, 17, 21, 22, 30])
    check(layout, make_qkv(30, 1, 16), window=1, causal="group")


SIZES = [(torch.float32, d) for d in (64, 72, 80, 96)] + [(torch.float16, d) for d in (16, 72)]


@interpreted
@pytest.mark.parametrize("dtype, head_dim", SIZES)
def test_head_dims_and_dtypes(head_dim, dtype):
    layout = PackedLayout.from_lengths((18, 3), group_size=4)
    check(layout, make_qkv(21, 1, head_dim, dtype=dtype), window=2)


@interpreted
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads(kv_heads):
    layout = PackedLayout.from_lengths((19, 6), group_size=4)
    check(layout, make_qkv(25, 4, 16, kv_heads=kv_heads), window=1, causal="token")


@interpreted
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_scales(scale):
    layout = PackedLayout.from_lengths((19, 6), group_size=4)
    check(layout, make_qkv(25, 1, 16), window=1, scale=scale)


@interpreted
def test_scores_of_hundreds():
    layout = PackedLayout.from_lengths((19, 6), group_size=4)
    q, k, v = make_qkv(25, 1, 16)
    q, k = q * 20, k * 20
    largest = float(torch.einsum("ihd,jhd->hij", q, k).abs().max()) / 4
    # All probabilities of a row share the roundings of its lse.
    check(layout, (q, k, v), causal="token", roundings=2 * largest)


@interpreted
def test_the_check_itself_notices_a_wrong_window():
    layout = PackedLayout.from_lengths((19, 6), group_size=4)
    with pytest.raises(ToleranceError):
        check_against_reference(
            lambda *x: run(layout, *x, window=1),
            lambda *x: oracle(layout, *x, window=(1, 0)),
            make_qkv(25, 1, 16),
        )


@interpreted
@pytest.mark.parametrize("layout", ["qkv in one tensor", "heads first", "columns apart"])
def test_strides(layout):
    packing = PackedLayout.from_lengths((17, 2), group_size=7)
    if layout == "qkv in one tensor":
        inputs = make_tensor(19, 3, 2, 24).unbind(1)
    elif layout == "heads first":
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in make_qkv(19, 2, 24)]
    else:
        inputs = [x.mT.contiguous().mT for x in make_qkv(19, 2, 24)]
    expected = results(packing, *(x.contiguous() for x in inputs), window=1)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out, lse = run(packing, q, k, v, window=1)
    grad = make_tensor(19, 2, 24, seed=7).transpose(0, 1).contiguous().transpose(0, 1)
    grads = torch.autograd.grad((out, lse), (q, k, v), (grad, make_tensor(19, 2, seed=8)))
    for actual, wanted in zip([out, lse, *grads], expected, strict=True):
        assert torch.equal(actual, wanted)


@interpreted
def test_offsets_beyond_int32(tmp_path):
    rows, stride = 10, 2**28
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * rows * stride)
    far = torch.from_file(str(path), shared=True, size=rows * stride, dtype=torch.float16)
    inputs = make_qkv(rows, 1, 16, dtype=torch.float16)
    spread = [far.as_strided((rows, 1, 16), (stride, 16, 1), 16 * i) for i in range(3)]
    for x, values in zip(spread, inputs, strict=True):
        x.copy_(values)
    layout = PackedLayout.from_lengths((rows,))
    ranges = near(layout)
    expected = range_attention_forward(*inputs, ranges, 0.25)
    actual = range_attention_forward(*spread, ranges, 0.25)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    grads = (
        range_attention_backward(expected[0], None, *expected, *x, ranges, 0.25) for x in (inputs, spread)
    )
    for wanted, found in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


@interpreted
@pytest.mark.parametrize("causal", [None, "group", "token"])
def test_a_window_that_covers_all_is_exact_attention_bit_for_bit(causal):
    layout = PackedLayout.from_lengths((11, 33), group_size=5)
    inputs = make_qkv(44, 1, 16)
    covering = results(layout, *inputs, window=6, causal=causal)
    exact = results(layout, *inputs, window=None, causal=causal)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), covering, exact, strict=True):
        assert torch.equal(x, y), name


@interpreted
def test_repeats_and_packing_change_no_bit():
    layout = PackedLayout.from_lengths((20, 3, 17), group_size=6)
    inputs = make_qkv(40, 1, 16)
    packed = results(layout, *inputs, window=1, causal="token")
    for x, y in zip(packed, results(layout, *inputs, window=1, causal="token"), strict=True):
        assert torch.equal(x, y)
    for begin, end in ((0, 20), (20, 23), (23, 40)):
        alone = PackedLayout.from_lengths((end - begin,), group_size=6)
        leaves = [x[begin:end].clone().requires_grad_() for x in inputs]
        out, lse = run(alone, *leaves, window=1, causal="token")
        grads = make_tensor(40, 1, 16, seed=7)[begin:end], make_tensor(40, 1, seed=8)[begin:end]
        separate = [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]
        for x, y in zip(packed, separate, strict=True):
            assert torch.equal(x[begin:end], y)


@interpreted
def test_nan_in_a_neighbour_does_not_leak():
    layout = PackedLayout.from_lengths((18, 7, 20), group_size=6)
    inputs = make_qkv(45, 1, 16)
    clean = results(layout, *inputs, window=1)
    poisoned = results(layout, *(poison_segment(x, layout, 1) for x in inputs), window=1)
    for x, y in zip(clean, poisoned, strict=True):
        assert torch.equal(x[:18], y[:18]) and torch.equal(x[25:], y[25:])
        assert y[18:25].isnan().all()


@interpreted
@pytest.mark.parametrize("window", [1, None])
@pytest.mark.parametrize("lengths", [(), (0, 9), (16, 16), (40,)])
def test_slack_is_never_read_and_written_as_nothing(lengths, window):
    """(40,): the last tile holds slack rows, and blocks that all its own rows see are not masked."""
    layout = PackedLayout.from_lengths(lengths, group_size=6)
    tokens, slack = sum(lengths), 37
    inputs = make_qkv(tokens, 1, 16)
    expected = results(layout, *inputs, window=window)
    actual = results(layout, *(with_slack(x, slack) for x in inputs), window=window)
    grad_rows = slice(0, tokens)
    for i, (x, y) in enumerate(zip(expected, actual, strict=True)):
        if i < 2 or not tokens:  # the gradients were drawn for another shape
            assert torch.equal(x, y[grad_rows])
        assert torch.equal(y[tokens:], torch.full_like(y[tokens:], -math.inf if i == 1 else 0))


@interpreted
def test_a_gradient_of_slack_rows_is_ignored():
    layout = PackedLayout.from_lengths((17,), group_size=6)
    q, k, v = (with_slack(x, 5) for x in make_qkv(17, 1, 16))
    ranges = near(layout, 1)
    out, lse = range_attention_forward(q, k, v, ranges, 0.25)
    grad, grad_lse = with_slack(make_tensor(17, 1, 16), 5), with_slack(make_tensor(17, 1), 5)
    for x in range_attention_backward(grad, grad_lse, out, lse, q, k, v, ranges, 0.25):
        assert x[:17].isfinite().all() and torch.equal(x[17:], torch.zeros(5, 1, 16))


CROSS = {"more keys": ([3, 9], [5, 30]), "more rows": ([20, 4, 0], [7, 0, 3]), "one row": ([1], [37])}


@interpreted
@pytest.mark.parametrize("sides", [(None, 0), (4, 2)])
@pytest.mark.parametrize("lengths", CROSS.values(), ids=CROSS.keys())
def test_rows_and_keys_of_different_lengths(lengths, sides):
    """Counterparts are aligned at the end of each segment, as in FlashAttention: bottom-right."""
    cu_rows, cu_keys = (PackedLayout.from_lengths(n).cu_seqlens for n in lengths)
    rows, keys = int(cu_rows[-1]), int(cu_keys[-1])
    ranges = KeyRanges.of_segments(cu_rows, cu_keys, *sides)
    q = make_tensor(rows, 2, 16)
    k, v = make_tensor(keys, 1, 16, seed=1), make_tensor(keys, 1, 16, seed=2)

    def dense(q, k, v):
        seen = torch.zeros(rows, keys, dtype=torch.bool)
        for s in range(len(cu_rows) - 1):
            end_row, end_key = int(cu_rows[s + 1]), int(cu_keys[s + 1])
            row, key = int(cu_rows[s]), int(cu_keys[s])
            i, j = torch.arange(row, end_row), torch.arange(key, end_key)
            ahead = (j[None, :] - end_key) - (i[:, None] - end_row)
            left, right = (10**6 if side is None else side for side in sides)
            seen[row:end_row, key:end_key] = (ahead >= -left) & (ahead <= right)
        scores = (q.transpose(0, 1) @ k.transpose(0, 1).mT * 0.25).masked_fill(~seen, -torch.inf)
        pivot = scores.detach().amax(-1, keepdim=True)
        weights = (scores - pivot.masked_fill(pivot == -torch.inf, 0)).exp()
        total = weights.sum(-1, keepdim=True)
        lse = (pivot + torch.where(total == 0, 1, total).log())[..., 0].transpose(0, 1)
        out = weights @ v.transpose(0, 1) / torch.where(total == 0, 1, total)
        return out.transpose(0, 1), lse

    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: RangeAttention.apply(*x, ranges, 0.25), dense, [q, k, v], names=["out", "lse"]
        )


class HybridAttention(torch.autograd.Function):
    """Range attention with a far part, and all its gradients."""

    @staticmethod
    def forward(ctx, q, k, v, beta, q_features, k_features, geometry, feature_map):
        inputs, options = (
            Inputs(q, k, v, beta, q_features, k_features),
            Options(feature_map, q.shape[-1] ** -0.5),
        )
        out, lse = hybrid_triton.forward(inputs, geometry, options)
        ctx.save_for_backward(out, lse, *inputs)
        ctx.arguments = geometry, options
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        out, lse, *inputs = ctx.saved_tensors
        saved = Saved(Inputs(*inputs), out, lse)
        return *hybrid_triton.backward(saved, Grads(d_out, d_lse), *ctx.arguments), None, None


def hybrid(layout, *inputs, window, causal=None, feature_map="softmax"):
    return HybridAttention.apply(*inputs, Geometry.of(layout, window, causal), feature_map)


def check_hybrid(layout, inputs, **options):
    def wanted(q, k, v, beta, q_features, k_features):
        features = {"q_features": q_features, "k_features": k_features}
        return reference.hybrid_attention(q, k, v, layout, beta=beta, **features, **options)

    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: hybrid(layout, *x, **options), wanted, inputs, names=["out", "lse"], roundings=16
        )


BETA = torch.tensor([0.5, -math.inf])
FAR = {  # window, causal, feature map
    "both sides": ((0, 1), None, "softmax"),
    "causal over groups": (0, "group", "relu"),
    "causal over tokens": (1, "token", "elu"),
}


@interpreted
@pytest.mark.parametrize("window, causal, feature_map", FAR.values(), ids=FAR.keys())
def test_far_groups(window, causal, feature_map):
    """Head dimensions and groups are no multiples of the blocks, so that tiles hold parts of groups."""
    layout = PackedLayout.from_lengths((3, 0, 26), group_size=6)
    inputs = [*make_qkv(29, 2, 24, kv_heads=1), BETA, None, None]
    check_hybrid(layout, inputs, window=window, causal=causal, feature_map=feature_map)


@interpreted
def test_far_groups_of_uneven_sizes_and_half_precision():
    layout = PackedLayout.from_cu_seqlens([0, 17, 17, 22], [0, 2, 2, 9, 17, 17, 20, 22])
    inputs = make_qkv(22, 2, 16, dtype=torch.float16)
    check_hybrid(layout, [*inputs, BETA.half(), None, None], window=0)


@interpreted
def test_given_features_of_another_width():
    layout = PackedLayout.from_lengths((3, 26), group_size=6)
    features = make_tensor(29, 2, 20, seed=8).abs(), make_tensor(29, 1, 20, seed=9).abs()
    check_hybrid(layout, [*make_qkv(29, 2, 16, kv_heads=1), None, *features], window=0)


@interpreted
def test_far_part_with_slack_and_a_nan_neighbour():
    layout = PackedLayout.from_lengths((13, 3, 8), group_size=6)
    inputs = make_qkv(24, 1, 16)

    def run_hybrid(q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with uninitialized_is_nan():
            out, lse = hybrid(layout, *leaves, None, None, None, window=0)
            grads = make_tensor(35, 1, 16, seed=7)[: len(q)], make_tensor(35, 1, seed=8)[: len(q)]
            return [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]

    clean = run_hybrid(*inputs)
    poisoned = run_hybrid(*(with_slack(poison_segment(x, layout, 1), 11) for x in inputs))
    for i, (x, y) in enumerate(zip(clean, poisoned, strict=True)):
        assert torch.equal(x[:13], y[:13]) and torch.equal(x[16:], y[16:24])
        assert torch.equal(y[24:], torch.full_like(y[24:], -math.inf if i == 1 else 0))


@interpreted
def test_a_window_that_covers_all_leaves_no_far_part():
    layout = PackedLayout.from_lengths((11, 26), group_size=6)
    q, k, v = make_qkv(37, 1, 16)
    covering = hybrid(layout, q, k, v, None, None, None, window=4)
    for x, y in zip(covering, run(layout, q, k, v), strict=True):
        assert torch.equal(x, y)
