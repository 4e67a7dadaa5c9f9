"""Autonomy-of-Experts on a GPU, by the parity rule: the backend's own choice is handed to the reference."""

import pytest
import torch

from vot_kernels import aoe
from vot_kernels.ops.aoe import reference
from vot_kernels.testing import assert_close_to_exact, check_against_reference, check_selection, make_experts

OP = "aoe"
pytestmark = pytest.mark.gpu


def make_inputs(device, dtype, tokens=300, dim=96, experts=8, rank=32, hidden=112):
    return make_experts(tokens, dim, experts, rank, hidden, dtype=dtype, device=device)


def check(inputs, top_k, weighting, backend):
    with torch.no_grad():
        _, aux = aoe(*inputs, top_k, weighting=weighting, return_aux=True, backend=backend)
    check_selection(*inputs[:2], aux.norms, aux.indices)

    def run(*tensors):
        return (aoe(*tensors, top_k, weighting=weighting, backend=backend),)

    def oracle(*tensors):
        return (reference.aoe(*tensors, top_k, weighting=weighting, indices=aux.indices)[0],)

    check_against_reference(run, oracle, inputs)


@pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_outputs_and_gradients(top_k, weighting, backend, device, dtype):
    check(make_inputs(device, dtype), top_k, weighting, backend)


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_few_tokens(tokens, backend, device, dtype):
    check(make_inputs(device, dtype, tokens=tokens), 2, "topk_softmax", backend)


@pytest.mark.parametrize(
    ("dim", "rank", "hidden"), [(100, 40, 70), (768, 256, 1024), (1280, 400, 512), (64, 16, 6470)]
)
def test_odd_and_large_widths(dim, rank, hidden, backend, device, dtype):
    inputs = make_inputs(device, dtype, tokens=1000, dim=dim, rank=rank, hidden=hidden)
    check(inputs, 2, "topk_softmax", backend)


def test_all_tokens_to_one_expert(backend, device, dtype):
    x, w_down, *rest = make_inputs(device, dtype)
    w_down[3] *= 50
    inputs = [x, w_down, *rest]
    check(inputs, 1, "topk_softmax", backend)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = aoe(*leaves, 1, backend=backend)
    for grad in torch.autograd.grad(out, leaves[1:], torch.ones_like(out)):
        idle = torch.cat([grad[:3], grad[4:]])
        assert (idle == 0).all(), "an expert that nobody chose has a gradient"


def test_zero_rows_tie_to_the_first_experts(backend, device, dtype):
    x, *weights = make_inputs(device, dtype)
    x[::3] = 0
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    out, aux = aoe(*leaves, 2, return_aux=True, backend=backend)
    assert (aux.indices[::3] == torch.arange(2, device=device)).all()
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)


def test_many_experts(backend, device, dtype):
    check(make_inputs(device, dtype, tokens=1000, experts=64, rank=16), 8, "topk_softmax", backend)


@pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
def test_gradients_through_the_auxiliary_outputs(weighting, backend, device, dtype):
    """The dense path: every expert's norm has a gradient."""
    inputs = make_inputs(device, dtype)
    with torch.no_grad():
        _, aux = aoe(*inputs, 2, weighting=weighting, return_aux=True, backend=backend)

    def run(*tensors):
        y, found = aoe(*tensors, 2, weighting=weighting, return_aux=True, backend=backend)
        return y, found.norms, found.balance_loss[None]

    def oracle(*tensors):
        y, norms, *_, balance_loss = reference.aoe(*tensors, 2, weighting=weighting, indices=aux.indices)
        return y, norms, balance_loss[None]

    check_against_reference(run, oracle, inputs)


def test_runs_repeat_bit_for_bit(backend, device, dtype):
    inputs = make_inputs(device, dtype, tokens=777)

    def results():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = aoe(*leaves, 2, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    for a, b in zip(results(), results(), strict=True):
        assert_close_to_exact(a, b, b, roundings=0)
