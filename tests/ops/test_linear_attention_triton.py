"""The Triton kernels of linear attention: on the interpreter against the reference, and what they launch.

Triton reads TRITON_INTERPRET when it is imported, so the numerical tests run in a process of their own: the first
test starts it. On the interpreter a tile has 32 rows, a block 16 rows and 64 columns, see the configs.
"""

import os
import subprocess
import sys

import pytest
import torch

from vot_kernels.ops._launch import INTERPRETING, record_launches
from vot_kernels.ops._linear_triton import Rows, group_states, scan_states
from vot_kernels.ops.dispatch import CAPABILITIES, Inputs, select
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.reference import attention as reference
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

pytest.importorskip("triton")

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETING, reason="not for the process with TRITON_INTERPRET=1")


@compiled
def test_on_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "--no-header", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def check(lengths, inputs, **options):
    """Output and gradients obey the tolerance rule; gaps in what the kernels write show as NaN."""
    layout = PackedLayout.from_lengths(lengths)
    with uninitialized_is_nan():
        check_against_reference(
            lambda q, k, v: [linear_attention(q, k, v, layout, backend="triton", **options)],
            lambda q, k, v: reference.linear_attention(q, k, v, layout, **options)[:1],
            inputs,
            floor=4.0,  # that of do.v - do.o, equal terms of about sqrt(head_dim) where a token sees itself alone
        )


@interpreted
@CAUSAL
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal):
    check(lengths, make_qkv(sum(lengths), 1), causal=causal)


@interpreted
@CAUSAL
@pytest.mark.parametrize("name", ["elu", "relu"])
def test_feature_maps(name, causal):
    check((35, 0, 2), make_qkv(37, 1), feature_map=name, causal=causal)


@interpreted
@pytest.mark.parametrize(
    ("head_dim", "name", "causal"),
    [
        (24, "elu", True),
        (72, "softmax", True),
        (72, "relu", False),
        (80, "softmax", False),
        (96, "elu", True),
    ],
)
def test_head_dims(head_dim, name, causal):
    """Padded to the next power of two, and from 65 on in two blocks of columns."""
    check((34,), make_qkv(34, 1, head_dim), feature_map=name, causal=causal)


@interpreted
@CAUSAL
def test_float16(causal):
    check((33, 5), make_qkv(38, 1, dtype=torch.float16), causal=causal)


@interpreted
@CAUSAL
def test_grouped_heads(causal):
    check((35,), make_qkv(35, 4, kv_heads=2), causal=causal)


@interpreted
def test_float16_does_not_overflow():
    """Sums over the segment go past 65504, their quotient does not."""
    q, k, v = (x.half() for x in make_qkv(40, 1))
    check((40,), [q, k.fill_(2000), v], feature_map="relu")


def gradients(layout, inputs, grad, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = linear_attention(*leaves, layout, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@interpreted
@CAUSAL
def test_neighbours_and_slack_do_not_leak(causal):
    layout = PackedLayout.from_lengths((3, 33, 7))
    clean, grad = make_qkv(43, 1), make_tensor(43, 1, 16)
    poisoned = [with_slack(poison_segment(x, layout, 1), 37) for x in clean]
    with uninitialized_is_nan():
        actual = gradients(layout, poisoned, with_slack(grad, 37), causal=causal)
        expected = gradients(layout, clean, grad, causal=causal)
    kept = [*range(3), *range(36, 43)]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[kept], b[kept]) and (a[43:] == 0).all()
    assert actual[0][3:36].isnan().all()


@interpreted
@CAUSAL
def test_same_bits_again_and_alone(causal):
    layout, alone = PackedLayout.from_lengths((5, 66)), PackedLayout.from_lengths((66,))
    inputs, grad = make_qkv(71, 1), make_tensor(71, 1, 16)
    first, second = (gradients(layout, inputs, grad, causal=causal) for _ in range(2))
    only = gradients(alone, [x[5:] for x in inputs], grad[5:], causal=causal)
    for a, b, c in zip(first, second, only, strict=True):
        assert torch.equal(a, b) and torch.equal(a[5:], c)


@interpreted
@CAUSAL
def test_strides(causal):
    """Heads first in memory, one tensor for all three, and columns apart give the same bits."""
    layout = PackedLayout.from_lengths((33,))
    inputs, grad = make_qkv(33, 2), make_tensor(33, 2, 16)
    expected = gradients(layout, inputs, grad, causal=causal)
    q, k, v = inputs
    joint = torch.stack(inputs, 1)
    views = [q.transpose(0, 1).contiguous().transpose(0, 1), joint[:, 1], v.mT.contiguous().mT]
    assert [x.stride() for x in views] == [(16, 33 * 16, 1), (96, 16, 1), (32, 1, 2)]
    actual = gradients(layout, views, grad.transpose(0, 1).contiguous().transpose(0, 1), causal=causal)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
@CAUSAL
def test_rows_without_weight_are_zero_with_zero_gradients(causal):
    layout = PackedLayout.from_lengths((35,))
    q, k, v = make_qkv(35, 1)
    q[4] = -q[4].abs()
    out, dq, dk, dv = gradients(layout, [q, k, v], torch.ones_like(q), feature_map="relu", causal=causal)
    assert (out[4] == 0).all() and (dq[4] == 0).all() and (out[5] != 0).any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@interpreted
@CAUSAL
def test_opcheck(causal):
    layout = PackedLayout.from_lengths((35, 0))
    q, k, v = make_qkv(36, 1)
    arguments = (q, k, v, layout.cu_seqlens, layout.host_cu_seqlens, "elu", causal, "triton")
    out, inverse = torch.ops.vot_kernels.linear_attention_fwd(*arguments)
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.vot_kernels.linear_attention_bwd.default
    torch.library.opcheck(backward, (torch.ones_like(out), out, inverse, *arguments), test_utils=tests)
    torch.library.opcheck(torch.ops.vot_kernels.linear_attention_fwd.default, arguments, test_utils=tests)


@interpreted
def test_states_of_given_features():
    """Any groups, features of another width than the values, weights, a last column, heads that add up."""
    bounds = torch.tensor([0, 5, 5, 75, 90], dtype=torch.int32)
    features, values = make_tensor(95, 4, 20).abs(), make_tensor(95, 4, 16, seed=1)
    weights, last = make_tensor(95, 4, seed=2), make_tensor(95, 4, seed=3)
    with uninitialized_is_nan():
        states = group_states(Rows(features, values, weights, last), bounds, 2, "none")
    assert states.shape == (4, 2, 20 * 17)
    columns = torch.cat([values, last[..., None]], -1)
    for group, (begin, end) in enumerate([(0, 5), (5, 5), (5, 75), (75, 90)]):
        rows = slice(begin, end)
        expected = torch.einsum("thf,th,thd->hfd", features[rows], weights[rows], columns[rows])
        expected = expected.unflatten(0, (2, 2)).sum(1)
        assert max_error(states[group, :, :320].unflatten(-1, (20, 16)), expected[..., :16]) < 1e-4
        assert max_error(states[group, :, 320:], expected[..., 16]) < 1e-4


@interpreted
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_sums_of_groups(lag):
    """Over the groups of each segment up to `lag` before, and, added to it, from `lag` after on."""
    states = make_tensor(9, 2, 5)
    bounds = torch.tensor([0, 6, 6, 7, 9], dtype=torch.int32)
    with uninitialized_is_nan():
        before = scan_states(states, bounds, lag=lag)
        both = scan_states(states, bounds, lag=lag, reverse=True, out=before.clone())
    for begin, end in [(0, 6), (6, 7), (7, 9)]:
        for i in range(begin, end):
            left = states[begin : max(begin, i - lag + 1)].sum(0)
            right = states[min(end, i + lag) : end].sum(0)
            assert max_error(before[i], left) < 1e-5 and max_error(both[i], left + right) < 1e-5


@interpreted
def test_auto_leaves_the_interpreter_to_tests():
    q = make_qkv(1)[0]
    assert select("linear_attention", "triton", q) == "triton"
    assert select("linear_attention", "auto", q) == "torch"


def recorded(lengths, heads=4, kv_heads=2, dtype=torch.bfloat16, causal=False, slack=0):
    layout = PackedLayout.from_lengths(lengths)
    q, k, v = make_qkv(sum(lengths) + slack, heads, 64, kv_heads=kv_heads, dtype=dtype, requires_grad=True)
    with record_launches("sm_90") as launches:
        linear_attention(q, k, v, layout, causal=causal, backend="triton").sum().backward()
    return launches


@compiled
@pytest.mark.parametrize(
    ("lengths", "causal", "expected"),
    [
        (
            (3000, 9),
            False,
            ["group_states", "reduce_states", "linear_values"]
            + ["group_states", "reduce_states", "linear_features"]
            + ["group_states", "reduce_states", "linear_values", "linear_features"],
        ),
        (
            (3000, 9),
            True,
            ["group_states", "scan_states", "linear_values"]
            + ["group_states", "scan_states", "linear_features"]
            + ["group_states", "scan_states", "linear_values", "linear_features"],
        ),
        ((40, 9), False, ["linear_values", "linear_features", "linear_values", "linear_features"]),
        ((40, 9), True, ["linear_values", "linear_features", "linear_values", "linear_features"]),
    ],
)
def test_recorded_launches(lengths, causal, expected):
    """Segments of one tile need no states; each launch names every argument of its kernel."""
    launches = recorded(lengths, causal=causal)
    assert [x.kernel.__name__.removeprefix("_").removesuffix("_kernel") for x in launches] == expected
    for found in launches:
        assert set(found.arguments) == set(found.kernel.arg_names)
        assert len(found.grid) == 1 and found.grid[0] > 0
        assert found.config.blocks.items() <= found.arguments.items()


@compiled
@CAUSAL
def test_packings_of_any_lengths_share_their_kernels(causal):
    """Only what may change without compiling again differs between two packings."""
    first, second = (recorded(*x, causal=causal) for x in [((3000, 9),), ((1, 0, 5000, 77), 4, 2)])
    for a, b in zip(first, second, strict=True):
        free = {"num_tokens", "num_segments", "num_groups"}
        assert all(p.do_not_specialize for p in a.kernel.params if p.name in free)
        for name, value in a.arguments.items():
            if name not in free and not isinstance(value, torch.Tensor):
                assert b.arguments[name] == value, name


@compiled
def test_partial_states_are_smaller_than_the_inputs():
    """At most a quarter of the bytes of k and v of 16 bits."""
    for head_dim in (16, 64, 128, 256):
        q, k, v = make_qkv(20000, 1, head_dim, dtype=torch.bfloat16)
        with record_launches("sm_90") as launches:
            linear_attention(q, k, v, PackedLayout.from_lengths((20000,)), backend="triton")
        partials = launches[0].arguments["partials_ptr"]
        assert partials.nbytes <= 0.27 * (k.nbytes + v.nbytes)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            r"triton \(no Triton kernel runs on CPU tensors, unless TRITON_INTERPRET=1 is set to test them\)",
        ),
        ({"dtype": torch.float64}, "; dtype torch.float64 is not one of float16, bfloat16, float32"),
        ({"head_dim": 8}, "; head_dim 8 is not from 16 to 256"),
        ({"head_dim": 257}, "; head_dim 257 is not from 16 to 256"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        linear_attention(*make_qkv(6, **change), PackedLayout.from_lengths((6,)), backend="triton")
    text = str(caught.value)
    assert text.startswith("No backend can serve linear_attention for these inputs") and text.endswith(".")
    assert "\n" not in text


def test_what_the_kernels_accept():
    accepts = CAPABILITIES["linear_attention"]["triton"]
    cuda = torch.device("cuda")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert accepts(Inputs(cuda, dtype)) == [] == accepts(Inputs(cuda, dtype, 72))
    assert accepts(Inputs(torch.device("mps"), torch.float32)) == ["no Triton kernel runs on mps tensors"]
    assert len(accepts(Inputs(cuda, torch.float64, 8))) == 2


@interpreted
def test_bfloat16_is_refused_by_the_interpreter():
    layout = PackedLayout.from_lengths((9,))
    q, k, v = make_qkv(9, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        linear_attention(q, k, v, layout, backend="triton")
