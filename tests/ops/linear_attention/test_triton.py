"""The Triton kernels of linear attention: on the interpreter against the reference, and what they launch.

On the interpreter a tile has 32 rows, a block 16 rows and 64 columns, see the configs.
"""

import math
from dataclasses import fields

import pytest
import torch

from tests.marks import compiled, interpreted
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.ops.dispatch import CAPABILITIES, Inputs, select
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.linear_attention import linear_attention, reference
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

pytest.importorskip("triton")

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
MODES = pytest.mark.parametrize("mode", ["bidirectional", "causal", "decay"])


def check(lengths, inputs, *, log_decay=None, **options):
    """Output and gradients obey the tolerance rule; gaps in what the kernels write show as NaN."""
    layout = PackedLayout.from_lengths(lengths)
    with uninitialized_is_nan():
        check_against_reference(
            lambda q, k, v, d: [linear_attention(q, k, v, layout, backend="triton", log_decay=d, **options)],
            lambda q, k, v, d: reference.linear_attention(q, k, v, layout, log_decay=d, **options)[:1],
            (*inputs, log_decay),
            floor=4.0,  # that of do.v - do.o, equal terms of about sqrt(head_dim) where a token sees itself alone
        )


def log_decays(*decays, dtype=torch.float32):
    return torch.tensor(decays, dtype=torch.float64).log().to(dtype)


def mode_options(mode, heads=1):
    """Options of the op: "decay" has one that reaches over several blocks."""
    if mode == "decay":
        return {"causal": True, "log_decay": log_decays(*[0.9, 0.97, 0.5][:heads])}
    return {"causal": mode == "causal"}


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
@pytest.mark.parametrize(("name", "mode"), [("softmax", "causal"), ("elu", "decay")])
def test_wide_float32_heads(name, mode):
    """From 129 on, products of rows are computed in parts of the columns; two query heads share one of keys."""
    inputs = make_qkv(35, 2, 160, kv_heads=1)
    check((35,), inputs, feature_map=name, **mode_options(mode, heads=2))


@interpreted
def test_float16_does_not_overflow():
    """Sums over the segment go past 65504, their quotient does not."""
    q, k, v = (x.half() for x in make_qkv(40, 1))
    check((40,), [q, k.fill_(2000), v], feature_map="relu")


@interpreted
@MODES
def test_a_subnormal_normaliser_gives_finite_results(mode):
    """Softmax features are e^-95, and the inverse of Z is bounded."""
    q, k, v = make_qkv(1, 1)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 1] = 95, 95
    layout = PackedLayout.from_lengths((1,))
    results = gradients(layout, (q, k, v), make_tensor(1, 1, 16), **mode_options(mode))
    assert all(x.isfinite().all() for x in results)


@interpreted
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_decay_on_packings(lengths):
    check(lengths, make_qkv(sum(lengths), 1), causal=True, log_decay=log_decays(0.9))


@interpreted
@pytest.mark.parametrize(
    ("head_dim", "name"), [(16, "relu"), (24, "elu"), (72, "softmax")], ids=["relu", "elu 24", "softmax 72"]
)
def test_decay_with_feature_maps_and_head_dims(head_dim, name):
    inputs = make_qkv(50, 1, head_dim)
    check((50,), inputs, feature_map=name, causal=True, log_decay=log_decays(0.95))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decays_of_heads_that_share_a_key(dtype):
    """The decays go from none to one that leaves a token almost alone, over a short segment and several tiles."""
    inputs = make_qkv(46, 4, kv_heads=2, dtype=dtype)
    check((5, 41), inputs, causal=True, log_decay=log_decays(1.0, 0.97, 0.6, 1e-9, dtype=dtype))


@interpreted
def test_decay_over_many_tiles():
    """Two blocks of the scan and half of one, and pairs of tiles that are not neighbours."""
    check((140,), make_qkv(140, 1), causal=True, log_decay=log_decays(0.995))


def decayed_gradients(layout, inputs, log_decay, grad, **options):
    """Output, gradients of q, k and v, and that of log_decay."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, log_decay)]
    out = linear_attention(*leaves[:3], layout, causal=True, log_decay=leaves[3], backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@interpreted
@pytest.mark.parametrize("log_decay", [-20.0, -300.0, -math.inf])
def test_total_decay_leaves_the_token_itself(log_decay):
    """Where inverse powers of the decay over a tile would overflow."""
    inputs, grad = make_qkv(49, 1), make_tensor(49, 1, 16)
    layout = PackedLayout.from_lengths((40, 9))
    with uninitialized_is_nan():
        out, dq, dk, dv, d_decay = decayed_gradients(layout, inputs, torch.full((1,), log_decay), grad)
    assert max_error(out, inputs[2]) < 1e-5 and max_error(dv, grad) < 1e-5
    assert float(torch.cat([dq, dk]).abs().max()) < 1e-5 and abs(d_decay.item()) < 1e-5


@interpreted
def test_no_decay_is_a_decay_of_one():
    layout = PackedLayout.from_lengths((40, 3))
    inputs, grad = make_qkv(43, 1), make_tensor(43, 1, 16)
    *found, d_decay = decayed_gradients(layout, inputs, torch.zeros(1), grad)
    expected = gradients(layout, inputs, grad, causal=True)
    assert all(max_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)) and d_decay != 0


@interpreted
def test_gradient_of_decay_does_not_cancel_on_long_segments():
    """With a short memory far from the segment's start, the sum is over distances, not over positions."""
    layout, length = PackedLayout.from_lengths((250,)), 250
    inputs, grad = make_qkv(length, 1), make_tensor(length, 1, 16)
    decay = log_decays(0.5, dtype=torch.float64).requires_grad_()
    doubles = [x.double() for x in inputs]
    out, _ = reference.linear_attention(*doubles, layout, feature_map="elu", causal=True, log_decay=decay)
    (expected,) = torch.autograd.grad(out, decay, grad.double())
    found = decayed_gradients(layout, inputs, decay.detach().float(), grad, feature_map="elu")[-1]
    assert max_error(found, expected) < 3e-5  # roundings of 250 terms of either sign, whatever their sum


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_decay_of_any_dtype(dtype):
    """Its gradient has its dtype, whatever that of the tokens; columns of it may lie apart."""
    layout = PackedLayout.from_lengths((18,))
    inputs, grad = make_qkv(18, 2), make_tensor(18, 2, 16)
    exact = log_decays(0.9, 0.5, dtype=dtype)
    apart = torch.stack([exact, exact], 1)[:, 0]
    assert apart.stride() == (2,)
    found = decayed_gradients(layout, inputs, apart, grad)
    expected = decayed_gradients(layout, inputs, exact.float(), grad)
    assert found[4].dtype == dtype and max_error(found[4], expected[4].to(dtype)) == 0
    assert all(torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True))


@interpreted
def test_slack_does_not_reach_the_gradient_of_decay():
    layout = PackedLayout.from_lengths((5, 40))
    inputs, grad, decay = make_qkv(45, 1), make_tensor(45, 1, 16), log_decays(0.9)
    with uninitialized_is_nan():
        slack = decayed_gradients(layout, [with_slack(x, 40) for x in inputs], decay, with_slack(grad, 40))
    clean = decayed_gradients(layout, inputs, decay, grad)
    assert torch.equal(slack[4], clean[4]) and slack[4].isfinite().all()
    assert all(
        torch.equal(a[:45], b) and (a[45:] == 0).all() for a, b in zip(slack[:4], clean[:4], strict=True)
    )


def gradients(layout, inputs, grad, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = linear_attention(*leaves, layout, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@interpreted
@MODES
def test_neighbours_and_slack_do_not_leak(mode):
    layout, options = PackedLayout.from_lengths((3, 33, 7)), mode_options(mode)
    clean, grad = make_qkv(43, 1), make_tensor(43, 1, 16)
    poisoned = [with_slack(poison_segment(x, layout, 1), 37) for x in clean]
    with uninitialized_is_nan():
        actual = gradients(layout, poisoned, with_slack(grad, 37), **options)
        expected = gradients(layout, clean, grad, **options)
    kept = [*range(3), *range(36, 43)]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[kept], b[kept]) and (a[43:] == 0).all()
    assert actual[0][3:36].isnan().all()


@interpreted
@MODES
def test_same_bits_again_and_alone(mode):
    layout, alone = PackedLayout.from_lengths((5, 66)), PackedLayout.from_lengths((66,))
    inputs, grad, options = make_qkv(71, 1), make_tensor(71, 1, 16), mode_options(mode)
    first, second = (gradients(layout, inputs, grad, **options) for _ in range(2))
    only = gradients(alone, [x[5:] for x in inputs], grad[5:], **options)
    for a, b, c in zip(first, second, only, strict=True):
        assert torch.equal(a, b) and torch.equal(a[5:], c)


@interpreted
@MODES
def test_strides(mode):
    """Heads first in memory, one tensor for all three, and columns apart give the same bits."""
    layout, options = PackedLayout.from_lengths((33,)), mode_options(mode, 2)
    inputs, grad = make_qkv(33, 2), make_tensor(33, 2, 16)
    expected = gradients(layout, inputs, grad, **options)
    q, k, v = inputs
    joint = torch.stack(inputs, 1)
    views = [q.transpose(0, 1).contiguous().transpose(0, 1), joint[:, 1], v.mT.contiguous().mT]
    assert [x.stride() for x in views] == [(16, 33 * 16, 1), (96, 16, 1), (32, 1, 2)]
    actual = gradients(layout, views, grad.transpose(0, 1).contiguous().transpose(0, 1), **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
@MODES
def test_every_argument_may_be_strided(mode):
    """This includes the bounds and the decay, whose strides the kernels do not take."""
    layout, options = PackedLayout.from_lengths((33, 0, 40)), mode_options(mode, 2)
    inputs, grad = make_qkv(73, 2, kv_heads=1), make_tensor(73, 2, 16)
    expected = gradients(layout, inputs, grad, **options)
    values = {x.name: getattr(layout, x.name) for x in fields(layout)}
    strided = PackedLayout(**{name: spread(x) if torch.is_tensor(x) else x for name, x in values.items()})
    options = {name: spread(x) if torch.is_tensor(x) else x for name, x in options.items()}
    actual = gradients(strided, list(map(spread, inputs)), spread(grad), **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
@MODES
def test_rows_without_weight_are_zero_with_zero_gradients(mode):
    layout, options = PackedLayout.from_lengths((35,)), mode_options(mode)
    q, k, v = make_qkv(35, 1)
    q[4] = -q[4].abs()
    out, dq, dk, dv = gradients(layout, [q, k, v], torch.ones_like(q), feature_map="relu", **options)
    assert (out[4] == 0).all() and (dq[4] == 0).all() and (out[5] != 0).any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@interpreted
@MODES
def test_opcheck(mode):
    layout, options = PackedLayout.from_lengths((35, 0)), mode_options(mode)
    q, k, v = make_qkv(36, 1)
    bounds = (layout.cu_seqlens, layout.host_cu_seqlens)
    causal, decay = "token" if options["causal"] else None, options.get("log_decay")
    arguments = (q, k, v, decay, *bounds, causal, "elu", "triton")
    out, inverse = torch.ops.vot_kernels.linear_attention_fwd(*arguments)
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.vot_kernels.linear_attention_bwd.default
    given = (torch.ones_like(out), out, inverse, *arguments, decay is not None)
    torch.library.opcheck(backward, given, test_utils=tests)
    torch.library.opcheck(torch.ops.vot_kernels.linear_attention_fwd.default, arguments, test_utils=tests)


@interpreted
def test_compiles_with_a_decay():
    """Into one graph, with the results of eager code."""
    layout = PackedLayout.from_lengths((18, 2))
    inputs = [x.requires_grad_() for x in (*make_qkv(20, 2, kv_heads=1), log_decays(0.9, 0.5))]

    def run(q, k, v, d):
        return linear_attention(q, k, v, layout, causal=True, log_decay=d, backend="triton")

    outs = [run(*inputs), torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)]
    results = [[out, *torch.autograd.grad(out, inputs, torch.ones_like(out))] for out in outs]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_auto_leaves_the_interpreter_to_tests():
    q = make_qkv(1)[0]
    assert select("linear_attention", "triton", q) == "triton"
    assert select("linear_attention", "auto", q) == ("torch" if why_not_cpp("cpu") else "cpp")


def recorded(lengths, heads=4, kv_heads=2, dtype=torch.bfloat16, slack=0, **options):
    layout = PackedLayout.from_lengths(lengths)
    q, k, v = make_qkv(sum(lengths) + slack, heads, 64, kv_heads=kv_heads, dtype=dtype, requires_grad=True)
    with record_launches("sm_90") as launches:
        linear_attention(q, k, v, layout, backend="triton", **options).sum().backward()
    return launches


def names_of(launches):
    return [x.kernel.__name__.removeprefix("_").removesuffix("_kernel") for x in launches]


@compiled
@pytest.mark.parametrize(
    ("lengths", "causal", "expected"),
    [
        (
            (3000, 9),
            False,
            ["group_states", "reduce_states", "linear_apply"]
            + ["group_states", "reduce_states", "linear_feature_grad"]
            + ["group_states", "reduce_states", "linear_apply", "linear_feature_grad"],
        ),
        (
            (3000, 9),
            True,
            ["group_states", "scan_states", "linear_apply"]
            + ["group_states", "scan_states", "linear_feature_grad"]
            + ["group_states", "scan_states", "linear_apply", "linear_feature_grad"],
        ),
        ((40, 9), False, ["linear_apply", "linear_feature_grad", "linear_apply", "linear_feature_grad"]),
        ((40, 9), True, ["linear_apply", "linear_feature_grad", "linear_apply", "linear_feature_grad"]),
    ],
)
def test_recorded_launches(lengths, causal, expected):
    """Segments of one tile need no states; each launch names every argument of its kernel."""
    launches = recorded(lengths, causal=causal)
    assert names_of(launches) == expected
    for found in launches:
        assert set(found.arguments) == set(found.kernel.arg_names)
        assert len(found.grid) == 1 and found.grid[0] > 0
        assert found.config.blocks.items() <= found.arguments.items()


@compiled
@pytest.mark.parametrize(
    ("lengths", "last"), [((3000, 9), ["decay_pairs", "decay_states"]), ((40, 9), ["decay_pairs"])]
)
def test_recorded_launches_with_a_decay(lengths, last):
    """The launches are those of causal attention with the decay, and those for its gradient, if requested."""
    plain = recorded(lengths, causal=True)
    assert all(x.arguments["log_decay_ptr"] is None and x.arguments.get("shared", 1) == 1 for x in plain)
    for learned in (False, True):
        launches = recorded(lengths, causal=True, log_decay=torch.zeros(4, requires_grad=learned))
        assert names_of(launches) == names_of(plain) + (last if learned else [])
        for found in launches:
            assert set(found.arguments) == set(found.kernel.arg_names)
            assert found.arguments["log_decay_ptr"].shape == (4,)


@compiled
@MODES
def test_packings_of_any_lengths_share_their_kernels(mode):
    """Only what may change without compiling again differs between two packings."""
    options = {"causal": mode != "bidirectional"}
    if mode == "decay":
        options["log_decay"] = torch.zeros(4, requires_grad=True)
    first, second = (recorded(*x, **options) for x in [((3000, 9),), ((1, 0, 5000, 77), 4, 2)])
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
