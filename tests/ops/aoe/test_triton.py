"""The Triton backend of `aoe` and `moe` as a whole: on the interpreter against the references, and what it launches.

Its kernels are tested one by one in tests/ops/parts/experts.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import compiled, interpreted
from vot_kernels.ops.aoe import reference as aoe_reference
from vot_kernels.ops.aoe.op import AoEAux, _aoe_bwd, _aoe_fwd, aoe
from vot_kernels.ops.dispatch import CAPABILITIES, Inputs
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.moe import reference as moe_reference
from vot_kernels.ops.moe.op import _moe_bwd, _moe_fwd, moe
from vot_kernels.ops.parts.experts import slots as _experts
from vot_kernels.testing import (
    ToleranceError,
    check_against_reference,
    check_selection,
    make_experts,
    make_moe,
    make_tensor,
    spread,
    uninitialized_is_nan,
)

pytest.importorskip("triton")

WEIGHTINGS = pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def y_alone(y, aux):
    return (y,)


def everything(y, aux):
    return y, aux.norms, aux.weights, aux.balance_loss[None]


def check_aoe(inputs, top_k, weighting="topk_softmax", bias=None, outputs=y_alone, run=aoe):
    """Check the parity rule: the reference gets the kernels' own choice before anything is compared."""
    options = {"weighting": weighting, "bias": bias}
    with torch.no_grad(), uninitialized_is_nan():
        _, aux = aoe(*inputs, top_k, **options, return_aux=True, backend="triton")
    check_selection(*inputs[:2], aux.norms, aux.indices, bias)

    def tested(*tensors):
        return outputs(*run(*tensors, top_k, **options, return_aux=True, backend="triton"))

    def oracle(*tensors):
        y, *rest = aoe_reference.aoe(*tensors, top_k, **options, indices=aux.indices)
        return outputs(y, AoEAux(*rest))

    with uninitialized_is_nan():
        check_against_reference(tested, oracle, inputs)


def check_moe(inputs):
    x, w_gate_up, w_down, idx, weights = inputs
    with uninitialized_is_nan():
        check_against_reference(
            lambda x, a, b, w: (moe(x, a, b, idx, w, backend="triton"),),
            lambda x, a, b, w: (moe_reference.moe(x, a, b, idx, w),),
            (x, w_gate_up, w_down, weights),
        )


@interpreted
@WEIGHTINGS
@HALF_AND_SINGLE
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_aoe_outputs_and_gradients(top_k, dtype, weighting):
    """With 6 of 6 the stored caches are gathered, with fewer than half they are computed again."""
    check_aoe(make_experts(dtype=dtype), top_k, weighting, bias=make_tensor(6, seed=9))


@interpreted
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_argument_may_be_strided(top_k):
    """These are the tensors that the kernels need contiguous: the bias, the choices and their weights."""

    def results(run, inputs, grad, *rest):
        leaves = [x.requires_grad_() for x in inputs]
        y = run(*leaves, *rest, backend="triton")
        return [y, *torch.autograd.grad(y, leaves, grad)]

    def run_aoe(*inputs, backend):
        *inputs, bias = inputs
        return aoe(*inputs, top_k, bias=bias, backend=backend)

    def run_moe(x, a, b, weights, idx, *, backend):
        return moe(x, a, b, idx, weights, backend=backend)

    x, a, b, idx, weights = make_moe(top_k=top_k)
    cases = [(run_aoe, make_experts(experts=2), make_tensor(2, seed=9)), (run_moe, (x, a, b, weights), idx)]
    for run, inputs, last in cases:
        grad = make_tensor(*inputs[0].shape, seed=7)
        expected = results(run, [x.clone() for x in inputs], grad, last)
        actual = results(run, list(map(spread, inputs)), spread(grad), spread(last))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@interpreted
@WEIGHTINGS
def test_aoe_gradients_through_the_auxiliary_outputs(weighting):
    """The dense path: every expert's norm has a gradient."""
    check_aoe(make_experts(), 2, weighting, outputs=everything)


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"experts": 1, "top_k": 1},
        {"experts": 2, "top_k": 2},
        {"dim": 7, "hidden": 13, "rank": 5},
        {"rank": 1, "hidden": 1},
        {"tokens": 70, "experts": 16, "top_k": 5},
        {"tokens": 3, "rank": 400, "experts": 2, "top_k": 1},
        {"tokens": 2, "dim": 8, "rank": 4, "hidden": 646, "experts": 1, "top_k": 1},
    ],
    ids=lambda shape: "-".join(f"{name}{size}" for name, size in shape.items()),
)
def test_aoe_shapes(shape):
    shape = dict(shape)
    top_k = shape.pop("top_k", 2)
    check_aoe(make_experts(**shape), top_k)


@interpreted
def test_aoe_all_tokens_to_one_expert():
    inputs = make_experts()
    bias = torch.tensor([0.0, 0, 1e6, 0, 0, 0])
    check_aoe(inputs, 1, bias=bias)
    leaves = [x.requires_grad_() for x in inputs]
    for grad in torch.autograd.grad(aoe(*leaves, 1, bias=bias, backend="triton").sum(), leaves[1:]):
        assert (grad[[0, 1, 3, 4, 5]] == 0).all(), "an expert that nobody chose has a gradient"
        # The mixing weight of a single choice is 1 whatever its norm: W_down is reached through the gate alone.
        assert (grad[2] != 0).any()


@interpreted
@WEIGHTINGS
def test_aoe_zero_rows_tie_to_the_first_experts(weighting):
    inputs = make_experts(tokens=6)
    inputs[0][2:4] = 0
    leaves = [x.requires_grad_() for x in inputs]
    y, aux = aoe(*leaves, 3, weighting=weighting, return_aux=True, backend="triton")
    assert (y[2:4] == 0).all()
    assert torch.equal(aux.indices[2:4], torch.tensor([[0, 1, 2]] * 2))
    loss = y.square().sum() + aux.balance_loss + aux.weights.square().sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


@interpreted
def test_aoe_non_contiguous_inputs():
    inputs = make_experts()
    strided = [
        inputs[0].T.contiguous().T,
        *(w.transpose(1, 2).contiguous().transpose(1, 2) for w in inputs[1:]),
    ]
    assert not any(x.is_contiguous() for x in strided)
    check_aoe(strided, 2)
    expanded = inputs[0][:1].expand(9, -1)
    torch.testing.assert_close(
        aoe(expanded, *inputs[1:], 2, backend="triton"),
        aoe(expanded.contiguous(), *inputs[1:], 2, backend="triton"),
    )


@interpreted
def test_aoe_rows_more_than_two_to_the_31_numbers_apart():
    """The memory between them is never touched, so it costs nothing."""
    x, *weights = make_experts(3, 16, 4, 8, 16)
    spread = torch.empty(2**31 + 16, dtype=torch.float32).as_strided((3, 16), (2**30, 1))
    spread.copy_(x)
    assert torch.equal(aoe(spread, *weights, 2, backend="triton"), aoe(x, *weights, 2, backend="triton"))


@interpreted
def test_aoe_keeps_what_the_formula_says():
    """2d + 2kD + 2kr bytes of activations per token in half precision, and 4 or 8 per norm, choice and place."""
    tokens, dim, experts, rank, hidden, top_k = 64, 32, 4, 8, 16, 2
    x, *weights = make_experts(tokens, dim, experts, rank, hidden, dtype=torch.float16)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        aoe(x.requires_grad_(), *weights, top_k, backend="triton")
    kept = sum(t.nbytes for t in saved.values()) - sum(w.nbytes for w in weights)
    activations = 2 * dim + 2 * top_k * hidden + 2 * top_k * rank
    routing = 4 * experts + top_k * (8 + 4 + 4 + 4)
    assert kept == tokens * (activations + routing) + 4 * (experts + 1)


@interpreted
def test_aoe_repeats_bitwise():
    inputs = [x.requires_grad_() for x in make_experts(tokens=70, dtype=torch.float16)]
    runs = []
    for _ in range(2):
        y, aux = aoe(*inputs, 2, return_aux=True, backend="triton")
        runs.append([y, *aux, *torch.autograd.grad(y.float().sum() + aux.balance_loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpreted
def test_aoe_a_token_does_not_depend_on_the_others():
    x, *weights = make_experts(tokens=40)
    together = aoe(x, *weights, 2, backend="triton")
    poisoned = x.clone()
    poisoned[20] = float("nan")
    found = aoe(poisoned, *weights, 2, backend="triton")
    kept = torch.arange(40) != 20
    assert found[20].isnan().all() and torch.equal(found[kept], together[kept])
    alone = aoe(x[3:9], *weights, 2, backend="triton")
    assert torch.equal(alone, together[3:9]), "a tile's other rows change nothing, to the bit"


@interpreted
@WEIGHTINGS
def test_opcheck(weighting):
    inputs = [x.requires_grad_() for x in make_experts(5, 8, 3, 4, 8)]
    torch.library.opcheck(_aoe_fwd.op, (*inputs, torch.ones(3), 2, weighting, True, "triton"))
    x, a, b, idx, w = make_moe(5, 8, 3, 8)
    torch.library.opcheck(_moe_fwd.op, (x.requires_grad_(), a, b, idx, w, True, "triton"))


@interpreted
def test_opcheck_backward():
    tests = ("test_schema", "test_faketensor")
    inputs = make_experts(5, 8, 3, 4, 8)
    y, *saved = _aoe_fwd(*inputs, None, 2, "topk_softmax", True, "triton")
    norms, _, weights = saved[:3]
    for grads in ((y, None, None), (y, norms, weights), (None, None, weights)):
        arguments = (*grads, *inputs, *saved, "topk_softmax", "triton")
        torch.library.opcheck(_aoe_bwd.op, arguments, test_utils=tests)
    x, a, b, idx, w = make_moe(5, 8, 3, 8)
    y, *saved = _moe_fwd(x, a, b, idx, w, True, "triton")
    torch.library.opcheck(_moe_bwd.op, (y, x, a, b, w, *saved, "triton"), test_utils=tests)


@interpreted
@HALF_AND_SINGLE
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_moe_outputs_and_gradients(top_k, dtype):
    check_moe(make_moe(top_k=top_k, dtype=dtype))


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"experts": 1, "top_k": 1},
        {"dim": 7, "hidden": 13},
        {"hidden": 1},
        {"tokens": 70, "experts": 16, "top_k": 5},
        {"top_k": 0},
    ],
    ids=lambda shape: "-".join(f"{name}{size}" for name, size in shape.items()),
)
def test_moe_shapes(shape):
    check_moe(make_moe(**shape))


@interpreted
def test_moe_ids_of_no_expert_and_ids_twice():
    x, a, b, idx, w = make_moe()
    idx = idx.to(torch.int32)
    idx[::3, 0], idx[1::3, 1], idx[2::3, 1] = 6, -1, idx[2::3, 0]
    check_moe((x, a, b, idx, w))
    idx[:] = 99
    assert (moe(x, a, b, idx, w, backend="triton") == 0).all()


@interpreted
def test_moe_experts_without_tokens_get_zero_gradients():
    x, a, b, idx, w = make_moe()
    idx[:] = torch.tensor([1, 4])
    leaves = [t.requires_grad_() for t in (x, a, b, w)]
    with uninitialized_is_nan():
        y = moe(x, a, b, idx, w, backend="triton")
        grads = torch.autograd.grad(y.square().sum(), leaves)
    for grad in grads[1:3]:
        assert (grad[[0, 2, 3, 5]] == 0).all() and (grad[[1, 4]] != 0).any()


def dropped_expert(x, w_down, w_up, w_p, w_o, *rest, **options):
    kept = torch.ones_like(w_o[:, :1, :1])
    kept[-1] = 0
    return aoe(x, w_down, w_up, w_p, w_o * kept, *rest, **options)


def dropped_token(*inputs, **options):
    y, aux = aoe(*inputs, **options)
    return torch.cat([y[:-1], y[-1:] * 0]), aux


@interpreted
@pytest.mark.parametrize("wrong", [dropped_expert, dropped_token])
def test_canary_the_comparison_rejects(wrong):
    with pytest.raises(ToleranceError):
        check_aoe(make_experts(), 2, run=wrong)


@compiled
def test_cpu_tensors_are_refused_in_words():
    with pytest.raises(ValueError, match="unless TRITON_INTERPRET=1 is set"):
        aoe(*make_experts(), 2, backend="triton")
    with pytest.raises(ValueError, match="unless TRITON_INTERPRET=1 is set"):
        moe(*make_moe(), backend="triton")


@pytest.mark.parametrize("op", ["aoe", "moe"])
def test_what_the_backend_takes(op):
    accepts = CAPABILITIES[op]["triton"]
    with record_launches("sm_90"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert not accepts(Inputs(torch.device("cpu"), dtype))
        assert "float64" in accepts(Inputs(torch.device("cpu"), torch.float64))[0]


@compiled
def test_caches_of_all_experts_are_stored_only_where_most_are_selected():
    def kernels(top_k):
        with record_launches("sm_90") as launches, torch.no_grad():
            aoe(*make_experts(), top_k, backend="triton")
        return [launch.kernel.__name__ for launch in launches]

    assert "_gather_caches_kernel" not in kernels(3)
    assert "_gather_caches_kernel" in kernels(4)


@compiled
def test_nothing_of_the_size_of_all_caches_is_allocated(monkeypatch):
    tokens, experts, rank = 512, 16, 64
    largest = 0
    new_empty = torch.Tensor.new_empty

    def watched(self, *arguments, **options):
        nonlocal largest
        found = new_empty(self, *arguments, **options)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    monkeypatch.setitem(_experts.BLOCK_ELEMENTS, "cpu", 2**10)
    x, *weights = make_experts(tokens, 32, experts, rank, 32)
    with record_launches("sm_90"):
        y = aoe(x.requires_grad_(), *weights, 2, backend="triton")
        torch.autograd.grad(y.sum(), x)
    assert tokens * rank <= largest < tokens * experts * rank


@compiled
def test_one_compiled_graph_for_any_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")

    def step(*inputs):
        y, aux = aoe(*inputs, 2, return_aux=True, backend="triton")
        return y.sum() + aux.balance_loss

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for tokens in (5, 64, 17):
        inputs = [x.requires_grad_() for x in make_experts(tokens=tokens)]
        torch._dynamo.mark_dynamic(inputs[0], 0)
        with record_launches("sm_90") as launches:
            compiled(*inputs)
        assert launches
    assert counter.frame_count == 1
