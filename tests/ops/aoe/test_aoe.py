"""Autonomy-of-Experts against its reference: the parity rule makes an exception only for near ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp
from tests.rounding import nearly_equal
from tests.threads import differing
from vot_kernels.ops.aoe import AoEAux, aoe, op, reference
from vot_kernels.ops.aoe import torch as module
from vot_kernels.ops.parts.experts import slots as _experts
from vot_kernels.testing import (
    ToleranceError,
    assert_close_to_exact,
    check_against_reference,
    check_selection,
    make_experts,
    make_tensor,
    spread,
    uninitialized_is_nan,
)

WEIGHTINGS = ("topk_softmax", "softmax_topk")


def outputs(y, aux):
    return y, aux.norms, aux.weights, aux.balance_loss[None]


ON = pytest.mark.parametrize("backend", COMPUTING)


def check_parity(
    inputs, top_k, weighting="topk_softmax", bias=None, outputs=outputs, run=aoe, backend="torch"
):
    """Check the parity rule: the reference gets the backend's own choice before anything is compared."""
    with torch.no_grad():
        _, aux = aoe(*inputs, top_k, weighting=weighting, bias=bias, return_aux=True, backend=backend)
    check_selection(*inputs[:2], aux.norms, aux.indices, bias)

    def tested(*tensors):
        return outputs(
            *run(*tensors, top_k, weighting=weighting, bias=bias, return_aux=True, backend=backend)
        )

    def oracle(*tensors):
        y, *rest = reference.aoe(*tensors, top_k, weighting=weighting, bias=bias, indices=aux.indices)
        return outputs(y, AoEAux(*rest))

    check_against_reference(tested, oracle, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_outputs_and_gradients_match_the_reference(dtype, weighting, top_k):
    check_parity(make_experts(dtype=dtype), top_k, weighting, bias=make_tensor(6, seed=9))


@ON
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_outputs_and_gradients_match_the_reference_in_float32(weighting, top_k, backend):
    check_parity(make_experts(), top_k, weighting, bias=make_tensor(6, seed=9), backend=backend)


@ON
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_of_y_alone(weighting, backend):
    """Under topk_softmax this takes the sparse path, which the tests above never do."""
    check_parity(make_experts(), 2, weighting, outputs=lambda y, aux: (y,), backend=backend)


@cpp
def test_any_number_of_threads_gives_the_same_bits():
    inputs = [x.requires_grad_() for x in make_experts(tokens=600, dim=70, rank=20, hidden=50)]

    def results():
        y, aux = aoe(*inputs, 2, return_aux=True, backend="cpp")
        return y, aux.norms, aux.indices, aux.weights, *torch.autograd.grad(y.square().sum(), inputs)

    assert differing(results) == []


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"experts": 1, "top_k": 1},
        {"experts": 2, "top_k": 2},
        {"dim": 7, "hidden": 13, "rank": 5},
        {"rank": 1},
        {"hidden": 1},
        {"tokens": 257, "experts": 16, "top_k": 5},
        {"tokens": 600, "experts": 2, "rank": 70, "hidden": 90, "dim": 50, "top_k": 1},
    ],
)
@ON
@pytest.mark.parametrize("aux", [False, True])
def test_shapes(shape, aux, backend):
    shape = dict(shape)
    top_k = shape.pop("top_k", 2)
    checked = outputs if aux else lambda y, _: (y,)
    check_parity(make_experts(**shape), top_k, outputs=checked, backend=backend)


@cpp
@given(
    tokens=st.sampled_from([0, 1, 2, 17, 40, 70, 130]),
    experts=st.integers(1, 6),
    dim=st.integers(1, 50),
    rank=st.integers(1, 20),
    hidden=st.integers(1, 40),
    weighting=st.sampled_from(WEIGHTINGS),
    layout=st.sampled_from(["rows", "columns", "apart"]),
    data=st.data(),
)
@settings(max_examples=30)
def test_kernels_serve_any_shape(tokens, experts, dim, rank, hidden, weighting, layout, data):
    inputs = make_experts(tokens, dim, experts, rank, hidden)
    if layout == "columns":
        inputs = [x.mT.contiguous().mT for x in inputs]
    if layout == "apart":
        inputs = [spread(x) for x in inputs]
    top_k = data.draw(st.integers(1, experts))
    bias = data.draw(st.sampled_from([None, make_tensor(experts, seed=9)]))
    with uninitialized_is_nan():
        check_parity(inputs, top_k, weighting, bias, backend="cpp")
        check_parity(inputs, top_k, weighting, bias, outputs=lambda y, aux: (y,), backend="cpp")


@cpp
@given(tokens=st.integers(2, 140), value=st.sampled_from([torch.nan, torch.inf]), data=st.data())
@settings(max_examples=20)
def test_kernels_keep_nan_in_its_token(tokens, value, data):
    inputs = make_experts(tokens)
    clean = aoe(*inputs, 2, backend="cpp")
    row = data.draw(st.integers(0, tokens - 1))
    inputs[0][row] = value
    found = aoe(*inputs, 2, backend="cpp")
    others = torch.arange(tokens) != row
    assert found[row].isnan().all() and nearly_equal(found[others], clean[others])


@ON
def test_the_norm_of_a_cache_whose_terms_cancel_has_a_gradient_of_full_length(backend):
    """A cache of one number is roundings alone here, others in the backward; the gradient of |x . w| is w, -w or 0."""
    x, w_down, *others = make_experts(tokens=200, experts=1, rank=1, dim=64)
    w = w_down[0, 0].double()
    x = (x.double() - torch.outer(x.double() @ w, w) / w.square().sum()).float().requires_grad_()
    norms = aoe(x, w_down, *others, 1, return_aux=True, backend=backend)[1].norms
    (d_x,) = torch.autograd.grad(norms.sum(), x)
    lengths = (d_x.double() @ w).abs() / w.square().sum()
    assert (lengths > 0).sum() > 100
    torch.testing.assert_close(lengths, (lengths > 0).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_selection_follows_the_exact_norms(dtype):
    top_k = 4
    x, w_down, *rest = make_experts(tokens=512, dim=64, experts=16, rank=16, dtype=dtype)
    _, aux = aoe(x, w_down, *rest, top_k, return_aux=True)
    exact = torch.linalg.vector_norm(torch.einsum("td,nrd->tnr", x.double(), w_down.double()), dim=-1)
    torch.testing.assert_close(aux.norms.double(), exact, rtol=1e-5, atol=0)
    ranked = exact.sort(-1, descending=True).values
    clear = ranked[:, top_k - 1] - ranked[:, top_k] > 1e-5 * ranked[:, top_k - 1]
    assert clear.sum() > 400  # the rule below is about nearly all tokens
    expected = exact.topk(top_k).indices.sort(-1).values
    assert torch.equal(aux.indices.sort(-1).values[clear], expected[clear])
    assert (exact.gather(1, aux.indices) >= ranked[:, top_k - 1, None] * (1 - 1e-5)).all()


@pytest.mark.parametrize("backend", [*COMPUTING, "reference"])
def test_ties_go_to_the_lowest_id(backend):
    x, w_down, *rest = make_experts(experts=5)
    w_down = w_down[[0, 1, 1, 0, 1]]
    _, aux = aoe(x, w_down, *rest, 4, return_aux=True, backend=backend)
    first_larger = aux.norms[:, 0] > aux.norms[:, 1]
    expected = torch.where(first_larger[:, None], torch.tensor([0, 3, 1, 2]), torch.tensor([1, 2, 4, 0]))
    assert torch.equal(aux.indices, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_bias_changes_the_selection_alone(weighting):
    inputs = make_experts(tokens=64)
    plain = aoe(*inputs, 2, weighting=weighting, return_aux=True)[1]
    bias = torch.zeros(6)
    bias[4] = 1e6
    biased = aoe(*inputs, 2, weighting=weighting, return_aux=True, bias=bias)[1]
    assert torch.equal(plain.norms, biased.norms)
    assert (biased.indices[:, 0] == 4).all() and biased.load[4] == 1
    expected = plain.norms.gather(1, biased.indices).softmax(-1)
    if weighting == "softmax_topk":
        expected = plain.norms.softmax(-1).gather(1, biased.indices)
    torch.testing.assert_close(biased.weights, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradcheck(weighting, top_k):
    inputs = [x.requires_grad_() for x in make_experts(4, 4, 4, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *tensors: outputs(
            *aoe(*tensors, top_k, weighting=weighting, return_aux=True, backend="torch")
        ),
        inputs,
    )
    assert torch.autograd.gradcheck(lambda *tensors: aoe(*tensors, top_k, weighting=weighting), inputs)


@ON
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("output", ["norms", "weights", "balance_loss"])
def test_each_differentiable_output_alone(output, weighting, backend):
    check_parity(
        make_experts(), 2, weighting, outputs=lambda y, aux: (getattr(aux, output)[None],), backend=backend
    )


def test_load_counts_tokens_and_has_no_gradient():
    inputs = [x.requires_grad_() for x in make_experts(tokens=40)]
    _, aux = aoe(*inputs, 2, return_aux=True)
    counts = torch.stack([(aux.indices == i).sum() for i in range(6)])
    torch.testing.assert_close(aux.load, counts / 40)
    assert not aux.load.requires_grad and not aux.indices.requires_grad


@ON
def test_only_selected_experts_get_gradient(backend):
    inputs = [x.requires_grad_() for x in make_experts(tokens=40)]
    bias = torch.tensor([0.0, 0, 0, -1e6, 0, -1e6])
    for weight in torch.autograd.grad(aoe(*inputs, 2, bias=bias, backend=backend).square().sum(), inputs[1:]):
        assert (weight[[3, 5]] == 0).all()
        assert all((weight[i] != 0).any() for i in (0, 1, 2, 4))


@ON
def test_all_tokens_to_one_expert(backend):
    check_parity(make_experts(), 1, bias=torch.tensor([0.0, 0, 1e6, 0, 0, 0]), backend=backend)


@ON
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_zero_rows_select_the_first_experts_and_have_finite_gradients(weighting, backend):
    inputs = make_experts(tokens=6)
    inputs[0][2:4] = 0
    inputs = [x.requires_grad_() for x in inputs]
    y, aux = aoe(*inputs, 3, weighting=weighting, return_aux=True, backend=backend)
    assert (y[2:4] == 0).all()
    assert torch.equal(aux.indices[2:4], torch.tensor([[0, 1, 2]] * 2))
    loss = y.square().sum() + aux.balance_loss + aux.weights.square().sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e19, 1e30])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "torch"),
        (torch.bfloat16, "torch"),
        pytest.param(torch.float32, "cpp", marks=cpp),
        (torch.float32, "reference"),
        (torch.bfloat16, "reference"),
    ],
)
def test_norms_whose_squares_leave_float32(scale, dtype, backend):
    """They are among rows of ordinary size. W_up and W_p compensate for the scale, so that no product overflows."""
    inputs = make_experts(dtype=dtype)
    inputs[0][1::2] *= scale
    for weight in inputs[2:4]:
        weight *= min(1.0, 1 / scale)
    if backend != "reference":
        check_parity(inputs, 2, outputs=lambda y, aux: (y,), backend=backend)
    y, aux = aoe(*inputs, 2, return_aux=True, backend=backend)
    check_selection(*inputs[:2], aux.norms, aux.indices)
    assert y.isfinite().all() and (aux.norms > 0).all()
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(aoe(*leaves, 2, backend=backend).sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@ON
def test_tokens_of_no_width(backend):
    shapes = ((5, 0), (3, 4, 0), (3, 7, 4), (3, 7, 0), (3, 7, 0))
    inputs = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    y, aux = aoe(*inputs, 2, return_aux=True, backend=backend)
    assert y.shape == (5, 0) and (aux.norms == 0).all()
    gradients = torch.autograd.grad(y.sum() + aux.balance_loss, inputs)
    assert all((gradient == 0).all() for gradient in gradients)


@ON
def test_non_contiguous_inputs(backend):
    inputs = make_experts()
    strided = [
        inputs[0].T.contiguous().T,
        *(w.transpose(1, 2).contiguous().transpose(1, 2) for w in inputs[1:]),
    ]
    assert not any(x.is_contiguous() for x in strided)
    check_parity(strided, 2, backend=backend)
    expanded = inputs[0][:1].expand(9, -1)
    found, expected = (aoe(x, *inputs[1:], 2, backend=backend) for x in (expanded, expanded.contiguous()))
    torch.testing.assert_close(found, expected)


def test_blocks_of_any_size_give_the_same(monkeypatch):
    inputs = [x.requires_grad_() for x in make_experts(tokens=50, dtype=torch.float64)]

    def run():
        y, aux = aoe(*inputs, 2, weighting="softmax_topk", return_aux=True)
        return y, *aux, *torch.autograd.grad(y.square().sum() + aux.balance_loss, inputs)

    whole = run()
    for tokens_per_block in (1, 7, 49):
        monkeypatch.setitem(_experts.BLOCK_ELEMENTS, "cpu", 6 * 8 * tokens_per_block)
        for a, b in zip(run(), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@ON
def test_memory_is_bounded_by_the_selected_experts(backend):
    """Neither the blocks nor what is kept for the backward grow with tokens * experts * rank."""
    tokens, experts, rank, hidden, top_k = 4096, 32, 64, 8, 2
    x, *weights = make_experts(tokens, 16, experts, rank, hidden)
    blocks = _experts.cache_blocks(x, weights[0], x.dtype)
    assert max(cache.numel() for _, cache in blocks) <= _experts.BLOCK_ELEMENTS["cpu"]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        aoe(x.requires_grad_(), *weights, top_k, backend=backend)
    kept = sum(t.nbytes for t in saved.values()) - sum(w.nbytes for w in weights)
    slot = 8 + 4 + 4 + (0 if backend == "torch" else 4)  # index, weight, order and place
    per_token = 4 * 16 + 4 * top_k * (hidden + rank) + 4 * experts + top_k * slot
    assert tokens * 4 * experts * rank > 10 * kept  # what a kept cache would cost
    assert kept <= tokens * per_token + 4 * (experts + 1)


def test_repeats_bitwise():
    inputs = [x.requires_grad_() for x in make_experts(tokens=100)]
    runs = []
    for _ in range(2):
        y, aux = aoe(*inputs, 2, return_aux=True)
        runs.append([y, *aux, *torch.autograd.grad(y.sum() + aux.balance_loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_token_does_not_depend_on_the_others():
    """To rounding: the CPU's matrix product may sum in another order for another number of rows."""
    inputs = make_experts(tokens=40, dtype=torch.float64)
    together, aux = aoe(*inputs, 2, return_aux=True)
    for part in (slice(0, 1), slice(3, 17), slice(39, 40)):
        alone, alone_aux = aoe(inputs[0][part], *inputs[1:], 2, return_aux=True)
        assert torch.equal(alone_aux.indices, aux.indices[part])
        torch.testing.assert_close(alone, together[part], rtol=1e-12, atol=1e-13)
    poisoned = inputs[0].clone()
    poisoned[20:] = float("nan")
    assert torch.equal(aoe(poisoned, *inputs[1:], 2)[:1].isnan(), torch.zeros(1, 24, dtype=torch.bool))
    torch.testing.assert_close(aoe(poisoned, *inputs[1:], 2)[:20], together[:20], rtol=1e-12, atol=1e-13)


@ON
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tokens", [0, 9])
def test_opcheck(weighting, tokens, backend):
    dtype = torch.bfloat16 if backend == "torch" else torch.float32
    inputs = make_experts(tokens=tokens, dtype=dtype)
    torch.library.opcheck(op._aoe_fwd.op, (*inputs, torch.ones(6), 2, weighting, False, backend))
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(op._aoe_fwd.op, (*inputs, None, 2, weighting, True, backend))


@ON
def test_opcheck_backward(backend):
    inputs = make_experts()
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    y, norms, indices, weights, *saved = op._aoe_fwd(*inputs, None, 2, "topk_softmax", True, backend)
    for grads in (
        (y, None, None),
        (y, norms, weights),
        (None, None, weights),
        (y[:1].expand_as(y), None, None),
    ):
        for weighting in WEIGHTINGS:
            arguments = (*grads, *inputs, norms, indices, weights, *saved, weighting, backend)
            torch.library.opcheck(op._aoe_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


@ON
def test_one_compiled_graph_for_any_number_of_tokens(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def step(*inputs):
        y, aux = aoe(*inputs, 2, return_aux=True, backend=backend)
        return y.square().sum() + aux.balance_loss

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for tokens in (5, 64, 17):
        inputs = [x.requires_grad_() for x in make_experts(tokens=tokens)]
        torch._dynamo.mark_dynamic(inputs[0], 0)
        expected, actual = step(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.tested_on("axolotl#3805")
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_autocast_casts_tokens_and_weights_and_does_not_reach_inside(weighting):
    leaves = [x.requires_grad_() for x in make_experts()]

    def run(inputs):
        y, aux = aoe(*inputs, 2, weighting=weighting, return_aux=True)
        return y, *aux, *torch.autograd.grad(y.float().square().sum() + aux.balance_loss, leaves)

    expected = run([x.bfloat16() for x in leaves])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(leaves)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32


def dropped_expert(x, w_down, w_up, w_p, w_o, *rest, **options):
    kept = torch.ones_like(w_o[:, :1, :1])
    kept[-1] = 0
    return aoe(x, w_down, w_up, w_p, w_o * kept, *rest, **options)


def swapped_weights(*inputs, **options):
    w_up = inputs[2].roll(1, 0)
    return aoe(*inputs[:2], w_up, *inputs[3:], **options)


def zeros(*inputs, **options):
    y, aux = aoe(*inputs, **options)
    return y * 0, aux


def dropped_token(*inputs, **options):
    y, aux = aoe(*inputs, **options)
    return torch.cat([y[:-1], y[-1:] * 0]), aux


def detached_norms(*inputs, **options):
    """The right values without the gradient through the selection weights."""
    y, aux = aoe(*inputs, **options)
    frozen = aoe(*inputs[:1], inputs[1].detach(), *inputs[2:], **options)[0]
    return frozen, aux


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [dropped_expert, swapped_weights, zeros, dropped_token, detached_norms])
def test_canary_the_comparison_rejects(wrong, dtype):
    inputs = make_experts(dtype=dtype)
    with pytest.raises(ToleranceError):
        check_parity(inputs, 2, run=wrong, outputs=lambda y, aux: (y,))


def test_canary_half_precision_norms_are_rejected():
    x, w_down, *_ = make_experts(tokens=64, dtype=torch.bfloat16)
    exact = torch.linalg.vector_norm(torch.einsum("td,nrd->tnr", x.double(), w_down.double()), dim=-1)
    rounded = torch.einsum("td,nrd->tnr", x, w_down).float().norm(dim=-1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=0)
    with pytest.raises(ToleranceError):
        same = torch.linalg.vector_norm(torch.einsum("td,nrd->tnr", x.float(), w_down.float()), dim=-1)
        assert_close_to_exact(rounded, same, exact)


def test_reference_is_the_formula_of_the_paper():
    """Compute a few tokens, one at a time, directly from the equations."""
    x, w_down, w_up, w_p, w_o = make_experts(tokens=4, dtype=torch.float64)
    y = reference.aoe(x, w_down, w_up, w_p, w_o, 2)[0]
    for t in range(4):
        caches = [w @ x[t] for w in w_down]
        norms = torch.stack([c.norm() for c in caches])
        chosen = norms.argsort(descending=True)[:2]
        expected = torch.zeros(24, dtype=torch.float64)
        for weight, i in zip(norms[chosen].softmax(0), chosen, strict=True):
            gate = torch.nn.functional.silu(w_up[i] @ caches[i])
            expected += weight * (w_o[i].T @ (gate * (w_p[i] @ x[t])))
        torch.testing.assert_close(y[t], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x must"),
        ({"x": torch.zeros(3, 24, dtype=torch.int64)}, "x must be float"),
        ({"w_down": torch.zeros(6, 8, 23)}, "w_down must"),
        ({"w_down": torch.zeros(6, 0, 24)}, "w_down must have a rank of at least 1"),
        ({"w_up": torch.zeros(6, 20, 7)}, "w_up must"),
        ({"w_p": torch.zeros(5, 20, 24)}, "w_p must"),
        ({"w_o": torch.zeros(6, 24, 20)}, "w_o must"),
        ({"w_o": torch.zeros(6, 20, 24, dtype=torch.float64)}, "w_o must have the dtype of x"),
        ({"top_k": 0}, "top_k must be an int from 1 to the 6 experts, got 0"),
        ({"top_k": 7}, "got 7"),
        ({"top_k": 2.0}, "got 2.0"),
        ({"weighting": "sigmoid"}, "weighting must be one of"),
        ({"bias": torch.zeros(5)}, "bias must"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"backend": "triton"}, "No backend can serve aoe"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    names = ("x", "w_down", "w_up", "w_p", "w_o")
    arguments = {**dict(zip(names, make_experts(), strict=True)), "top_k": 2} | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        aoe(**arguments)
    assert "\n" not in str(error.value)


def test_scaled_rows_choose_the_same_experts():
    """A GPU does this to every row, because looking at the norms would wait for it; powers of two are exact."""
    x, w_down = make_experts()[:2]
    plain = module._select_scaled(x, w_down, None, 2, None)
    scaled = module._select_scaled(x, w_down, None, 2, module._row_scale(x, torch.float32))
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a, b)
