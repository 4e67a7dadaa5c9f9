"""The weighted sum of past states against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp, interpreted
from tests.threads import differing
from vot_kernels.ops.dense_residual import dense_residual, op
from vot_kernels.ops.parts import row_blocks
from vot_kernels.testing import (
    ToleranceError,
    check_against_reference,
    make_tensor,
    spread,
    uninitialized_is_nan,
)

# Every backend that computes: the kernels run on Triton's interpreter.
BACKENDS = (*COMPUTING, pytest.param("triton", marks=interpreted))


def make_inputs(count=4, shape=(9, 12), dtype=torch.float32, weight_dtype=torch.float32):
    weights = make_tensor(count, seed=50, dtype=weight_dtype)
    return [weights, *(make_tensor(*shape, seed=i, dtype=dtype) for i in range(count))]


def ours(weights, *states, backend="torch"):
    return (dense_residual(states, weights, backend=backend),)


@pytest.fixture(params=BACKENDS)
def on(request):
    """`ours` on each backend."""
    return partial(ours, backend=request.param)


def oracle(weights, *states):
    return (dense_residual(states, weights, backend="reference"),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_matches_the_reference(on, dtype, count):
    check_against_reference(on, oracle, make_inputs(count, dtype=dtype))
    check_against_reference(on, oracle, make_inputs(count, dtype=dtype, weight_dtype=dtype))


def test_matches_the_reference_in_float64():
    check_against_reference(ours, oracle, make_inputs(dtype=torch.float64, weight_dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1, 7, 107])
def test_blocks_of_any_size(numbers, dtype, monkeypatch):
    monkeypatch.setattr(row_blocks, "_BLOCK_NUMBERS", numbers)
    check_against_reference(ours, oracle, make_inputs(dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5, 7), (6,), (47, 521)])
def test_shapes(on, shape):
    check_against_reference(on, oracle, make_inputs(3, shape))


@cpp
@given(
    count=st.integers(1, 6),
    shape=st.lists(st.sampled_from([0, 1, 2, 7, 15, 17, 33]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
)
@settings(max_examples=40)
def test_kernels_serve_any_shape(count, shape, dtype, strided):
    inputs = make_inputs(count, shape, dtype)
    if strided:
        inputs = [spread(x) for x in inputs]
    with uninitialized_is_nan():
        check_against_reference(partial(ours, backend="cpp"), oracle, inputs)


def normed(weights, norm_weight, *states, backend="torch"):
    return dense_residual(states, weights, norm_weight=norm_weight, eps=1e-3, backend=backend)


def norm_inputs(count=3, shape=(9, 12), dtype=torch.float32, weight_dtype=torch.float32):
    weights, *states = make_inputs(count, shape, dtype, weight_dtype)
    return [weights, 1 + 0.3 * make_tensor(shape[-1], seed=51, dtype=weight_dtype), *states]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "shape"), [(3, (9, 12)), (5, (2, 7, 20)), (2, (0, 8))])
def test_a_norm_matches_the_reference(backend, count, shape, dtype):
    with uninitialized_is_nan():
        check_against_reference(
            partial(normed, backend=backend),
            partial(normed, backend="reference"),
            norm_inputs(count, shape, dtype),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6,), (1, 1)])
def test_a_norm_of_a_single_row(backend, shape):
    """In float32 alone: coarser roundings of so few numbers are sometimes much smaller than usual."""
    inputs = norm_inputs(2, shape)
    check_against_reference(partial(normed, backend=backend), partial(normed, backend="reference"), inputs)


def test_a_norm_matches_the_reference_in_float64():
    inputs = norm_inputs(dtype=torch.float64, weight_dtype=torch.float64)
    check_against_reference(normed, partial(normed, backend="reference"), inputs)
    leaves = [x.requires_grad_() for x in norm_inputs(2, (2, 3), torch.float64, torch.float64)]
    assert torch.autograd.gradcheck(normed, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_is_that_of_torch_and_leaves_the_sum_as_it_is(backend):
    weights, norm_weight, *states = norm_inputs()
    total, found = normed(weights, norm_weight, *states, backend=backend)
    assert torch.equal(total, dense_residual(states, weights, backend=backend))
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(total, (12,), norm_weight, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_a_norm(dtype, backend):
    weights, norm_weight, *states = (x.requires_grad_() for x in norm_inputs(dtype=dtype))
    arguments = (states, weights, norm_weight, 1e-3, backend)
    torch.library.opcheck(op._dense_residual_norm_fwd.op, arguments)
    states = [x.detach() for x in states]
    grads = torch.ones((), dtype=dtype).expand(9, 12), states[0].T.contiguous().T
    arguments = (*grads, states, weights.detach(), norm_weight.detach(), states[1], 1e-3, backend)
    torch.library.opcheck(
        op._dense_residual_norm_bwd.op, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_weight": torch.ones(4)}, r"norm_weight must have the shape \[3\]"),
        ({"norm_weight": torch.ones(3, dtype=torch.int32)}, "norm_weight must be float"),
        ({"norm_weight": torch.ones(3), "eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"norm_weight": torch.ones(3), "eps": "a"}, "eps must be a number"),
    ],
)
def test_a_bad_norm_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dense_residual([torch.ones(2, 3)], torch.ones(1), **options)


def test_reference_is_the_sum():
    weights, *states = make_inputs(dtype=torch.float64)
    expected = sum(float(w) * s for w, s in zip(weights, states, strict=True))
    torch.testing.assert_close(oracle(weights, *states)[0], expected)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(3, (2, 3), torch.float64, torch.float64)]
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_in_float32(backend):
    """A large and a tiny state of opposite weights: half precision would lose the tiny one on the way."""
    states = [torch.full((4,), value, dtype=torch.bfloat16) for value in (1024.0, 1.0, 1024.0)]
    y = dense_residual(states, torch.tensor([1.0, 1.0, -1.0]), backend=backend)
    assert torch.equal(y, torch.ones(4, dtype=torch.bfloat16))


def test_keeps_only_the_states_for_the_backward():
    weights, *states = (x.requires_grad_() for x in make_inputs(dtype=torch.bfloat16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        dense_residual(states, weights)
    assert set(saved) == {x.data_ptr() for x in (weights, *states)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_state_twice_and_strided_states(backend):
    state = make_tensor(6, 4).T.requires_grad_()
    weights = torch.tensor([2.0, 3.0], requires_grad=True)
    y = dense_residual([state, state], weights, backend=backend)
    torch.testing.assert_close(y, 5 * state)
    (gradient,) = torch.autograd.grad(y.sum(), [state])
    torch.testing.assert_close(gradient, torch.full((4, 6), 5.0))


def test_repeats_bitwise_and_rows_are_independent(on):
    inputs = make_inputs(shape=(33, 16))
    (y,) = on(*inputs)
    assert torch.equal(y, on(*inputs)[0])
    assert torch.equal(y[7:8], on(inputs[0], *(state[7:8] for state in inputs[1:]))[0])


@cpp
def test_any_number_of_threads_gives_the_same_bits():
    inputs = [x.requires_grad_() for x in make_inputs(shape=(100, 257))]

    def results():
        (y,) = ours(*inputs, backend="cpp")
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    assert differing(results) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    weights, *states = (x.requires_grad_() for x in make_inputs(dtype=dtype))
    torch.library.opcheck(op._dense_residual_fwd.op, (states, weights, backend))
    strided = [make_tensor(4, 6, seed=i, dtype=dtype).T for i in range(2)]
    torch.library.opcheck(
        op._dense_residual_fwd.op, (strided, weights[:2].detach().requires_grad_(), backend)
    )
    arguments = (torch.ones((), dtype=dtype).expand(6, 4), strided, weights[:2].detach(), backend)
    torch.library.opcheck(op._dense_residual_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_one_compiled_graph_for_any_number_of_tokens(on):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: on(*inputs)[0].square().sum(), backend=counter, fullgraph=True)
    for tokens in (5, 40, 17):
        inputs = [x.requires_grad_() for x in make_inputs(shape=(tokens, 8))]
        for state in inputs[1:]:
            torch._dynamo.mark_dynamic(state, 0)
        actual, expected = compiled(*inputs), on(*inputs)[0].square().sum()
        pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda weights, *states: (ours(weights, *states)[0] * 0,),
        lambda weights, *states: ours(weights[:-1], *states[:-1]),
        lambda weights, *states: ours(weights, states[1], states[0], *states[2:]),
        lambda weights, *states: ours(weights.detach(), *states),
    ],
    ids=["zeros", "dropped state", "swapped states", "no weight gradient"],
)
def test_canary_the_comparison_rejects(wrong):
    with pytest.raises(ToleranceError):
        check_against_reference(wrong, oracle, make_inputs())


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], torch.ones(0), "at least one state"),
        ([torch.ones(2, 3)], torch.ones(2), "weights must"),
        ([torch.ones(2, 3)], torch.ones(1, dtype=torch.int64), "weights must be float"),
        ([torch.ones(2, 3), torch.ones(2, 4)], torch.ones(2), r"states\[1\] must be \[2, 3\]"),
        ([torch.ones(2, 3), torch.ones(2, 3).double()], torch.ones(2), r"states\[1\] must have the dtype"),
        ([torch.ones(2, 3, dtype=torch.int32)], torch.ones(1), "must be float"),
    ],
)
def test_a_bad_argument_is_named(states, weights, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dense_residual(states, weights)
    with pytest.raises(ValueError, match="backend must be one of"):
        dense_residual([torch.ones(2)], torch.ones(1), backend="fast")
