"""A mixture of experts against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp
from tests.threads import differing
from vot_kernels.ops.moe import moe, op
from vot_kernels.ops.moe.reference import moe as reference
from vot_kernels.testing import (
    ToleranceError,
    check_against_reference,
    make_moe,
    make_tensor,
    spread,
    uninitialized_is_nan,
)


def check(inputs, run=moe):
    x, w_gate_up, w_down, idx, weights = inputs

    def with_ids(function):
        return lambda x, a, b, w: (function(x, a, b, idx, w),)

    check_against_reference(with_ids(run), with_ids(reference), (x, w_gate_up, w_down, weights))


@pytest.fixture(params=COMPUTING)
def on(request):
    """`moe` on each backend."""
    return partial(moe, backend=request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_outputs_and_gradients_match_the_reference(top_k, dtype):
    check(make_moe(top_k=top_k, dtype=dtype))


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_outputs_and_gradients_match_the_reference_in_float32(on, top_k):
    check(make_moe(top_k=top_k), on)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"experts": 1, "top_k": 1},
        {"dim": 7, "hidden": 13},
        {"hidden": 1},
        {"tokens": 257, "experts": 16, "top_k": 5},
        {"top_k": 0},
        {"tokens": 700, "experts": 2, "top_k": 1, "dim": 70, "hidden": 130},
    ],
)
def test_shapes(on, shape):
    check(make_moe(**shape), on)


@cpp
def test_one_expert_with_more_places_than_a_group():
    """The gradient of its weights is a sum over groups, and other experts have few places or none."""
    x, a, b, idx, w = make_moe(tokens=4500, dim=20, experts=4, hidden=17, top_k=2)
    idx[:, 0], idx[:, 1] = 1, torch.where(torch.arange(4500) % 100 == 0, 3, -1)
    check((x, a, b, idx, w), partial(moe, backend="cpp"))


@cpp
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_few_places_and_many(turned):
    """Experts with few places have products of their own, by rows of weights; `turned` weights have their columns in
    rows.
    """
    counts = torch.tensor([1, 2, 3, 4, 5, 7, 39, 40, 41, 64, 65])
    x, a, b, _, w = make_moe(tokens=int(counts.sum()), dim=75, experts=len(counts), hidden=52, top_k=1)
    if turned:
        a, b = (t.mT.contiguous().mT for t in (a, b))
    idx = torch.repeat_interleave(torch.arange(len(counts)), counts)[torch.randperm(len(x))]
    check((x, a, b, idx[:, None], w), partial(moe, backend="cpp"))


@cpp
@given(
    tokens=st.sampled_from([0, 1, 2, 17, 40, 70, 130]),
    experts=st.integers(1, 5),
    dim=st.integers(1, 50),
    hidden=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=30)
def test_kernels_serve_any_choices(tokens, experts, dim, hidden, data):
    """Of experts that may be none or all the same. Tokens that no expert takes are NaN."""
    top_k = data.draw(st.integers(0, experts))
    x, a, b, _, w = make_moe(tokens, dim, experts, hidden, top_k)
    low, high = data.draw(st.sampled_from([(0, experts), (0, 1), (-1, experts), (-2 * experts, experts + 1)]))
    idx = make_tensor(tokens, top_k, seed=9).erf().add(1).mul((high - low) / 2).add(low).floor()
    idx = idx.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    x[((idx < 0) | (idx >= experts)).all(1)] = torch.nan
    if data.draw(st.booleans()):
        x, a, b, idx, w = (spread(t) for t in (x, a.mT, b.mT, idx, w))
        a, b = a.mT, b.mT
    with uninitialized_is_nan():
        check((x, a, b, idx, w), partial(moe, backend="cpp"))


@cpp
def test_any_number_of_threads_gives_the_same_bits():
    x, a, b, idx, w = make_moe(tokens=600, dim=70, hidden=50)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]

    def results():
        y = moe(x, a, b, idx, w, backend="cpp")
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert differing(results) == []


def test_gradcheck():
    x, a, b, idx, w = make_moe(tokens=5, dim=4, experts=3, hidden=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]
    assert torch.autograd.gradcheck(lambda x, a, b, w: moe(x, a, b, idx, w, backend="torch"), leaves)


def test_ids_of_no_expert_add_nothing(on):
    """These are the ids of another rank's experts, and -1."""
    x, a, b, idx, w = make_moe()
    idx = idx.to(torch.int32)
    idx[::3, 0], idx[1::3, 1] = 6, -1
    check((x, a, b, idx, w), on)
    idx[:] = 99
    assert (on(x, a, b, idx, w) == 0).all()


def test_one_expert_twice_counts_twice(on):
    x, a, b, idx, w = make_moe()
    idx[:, 1] = idx[:, 0]
    check((x, a, b, idx, w), on)


def test_weights_of_another_dtype_and_non_contiguous_inputs():
    check_strided(torch.bfloat16, moe)


def test_non_contiguous_inputs(on):
    check_strided(torch.float32, on)


def check_strided(dtype, run):
    x, a, b, idx, w = make_moe(dtype=dtype)
    idx, w = (t.repeat(1, 2)[:, :2] for t in (idx, w.float()))
    strided = (x.T.contiguous().T, a.transpose(1, 2).contiguous().transpose(1, 2), b, idx, w)
    assert not strided[0].is_contiguous() and not idx.is_contiguous()
    check(strided, run)


def test_experts_without_tokens_get_zero_gradients(on):
    x, a, b, idx, w = make_moe()
    idx[:] = torch.tensor([1, 4])
    leaves = [t.requires_grad_() for t in (x, a, b, w)]
    grads = torch.autograd.grad(on(x, a, b, idx, w).square().sum(), leaves)
    for grad in grads[1:3]:
        assert (grad[[0, 2, 3, 5]] == 0).all() and (grad[[1, 4]] != 0).any()


def test_a_token_does_not_depend_on_the_others(on):
    x, a, b, idx, w = make_moe()
    y = on(x, a, b, idx, w)
    poisoned = x.clone()
    poisoned[7] = float("nan")
    found = on(poisoned, a, b, idx, w)
    assert found[7].isnan().all()
    kept = torch.arange(33) != 7
    torch.testing.assert_close(found[kept], y[kept])


def test_repeats_bitwise(on):
    x, a, b, idx, w = make_moe(tokens=200)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]

    def run():
        y = on(x, a, b, idx, w)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert all(torch.equal(p, q) for p, q in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save, tokens, backend):
    x, a, b, idx, w = make_moe(tokens=tokens)
    if save:
        x, a, b, w = (t.requires_grad_() for t in (x, a, b, w))
    torch.library.opcheck(op._moe_fwd.op, (x, a, b, idx, w, save, backend))


@pytest.mark.parametrize("backend", COMPUTING)
def test_opcheck_backward(backend):
    x, a, b, idx, w = make_moe()
    y, *saved = op._moe_fwd(x, a, b, idx, w, True, backend)
    arguments = (y, x, a, b, w, *saved, backend)
    torch.library.opcheck(op._moe_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_one_compiled_graph_for_any_number_of_tokens(on):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(on, backend=counter, fullgraph=True)
    for tokens in (5, 64, 17):
        x, a, b, idx, w = make_moe(tokens=tokens)
        for t in (x, idx, w):
            torch._dynamo.mark_dynamic(t, 0)
        leaves = [t.requires_grad_() for t in (x, a, b, w)]
        results = [f(x, a, b, idx, w) for f in (on, compiled)]
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in results]
        torch.testing.assert_close(results, results[:1] * 2)
        torch.testing.assert_close(grads[1], grads[0])
    assert counter.frame_count == 1


@pytest.mark.tested_on("axolotl#3805")
def test_autocast_casts_tokens_and_experts_and_does_not_reach_inside():
    x, w_gate_up, w_down, indices, weights = make_moe()
    leaves = [t.requires_grad_() for t in (x, w_gate_up, w_down, weights)]

    def run(*halves):
        y = moe(*halves, indices, weights)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    expected = run(*(t.bfloat16() for t in leaves[:3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(*leaves[:3])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == torch.bfloat16


def unweighted(x, a, b, idx, w):
    return moe(x, a, b, idx, torch.ones_like(w)) * w.mean()


def swapped_halves(x, a, b, idx, w):
    return moe(x, a.roll(a.shape[1] // 2, 1), b, idx, w)


def dropped_expert(x, a, b, idx, w):
    return moe(x, a, b, torch.where(idx == 5, -1, idx), w)


def zeros(x, a, b, idx, w):
    return moe(x, a, b, idx, w) * 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [unweighted, swapped_halves, dropped_expert, zeros])
def test_canary_the_comparison_rejects(wrong, dtype):
    with pytest.raises(ToleranceError):
        check(make_moe(dtype=dtype), run=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x must"),
        ({"x": torch.zeros(33, 24, dtype=torch.int64)}, "x must be float"),
        ({"w_gate_up": torch.zeros(6, 41, 24)}, "w_gate_up must"),
        ({"w_down": torch.zeros(6, 23, 20)}, "w_down must"),
        ({"w_down": torch.zeros(6, 24, 20, dtype=torch.float64)}, "w_down must have the dtype of x"),
        ({"topk_idx": torch.zeros(32, 2, dtype=torch.int64)}, "topk_idx must"),
        ({"topk_idx": torch.zeros(33, 2)}, "topk_idx must be int32 or int64"),
        ({"topk_weights": torch.zeros(33, 3)}, "topk_weights must"),
        ({"topk_weights": torch.zeros(33, 2, dtype=torch.int64)}, "topk_weights must be float"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "triton"}, "No backend can serve moe"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    names = ("x", "w_gate_up", "w_down", "topk_idx", "topk_weights")
    with pytest.raises((ValueError, TypeError), match=message) as error:
        moe(**(dict(zip(names, make_moe(), strict=True)) | change))
    assert "\n" not in str(error.value)
