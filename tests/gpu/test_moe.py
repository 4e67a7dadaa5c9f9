"""A plain mixture of experts on a GPU, against its reference."""

import pytest
import torch

from vot_kernels import moe
from vot_kernels.ops.moe.reference import moe as reference
from vot_kernels.testing import assert_close_to_exact, check_against_reference, make_moe

OP = "moe"
pytestmark = pytest.mark.gpu


def check(inputs, backend):
    x, w_gate_up, w_down, idx, weights = inputs
    check_against_reference(
        lambda x, a, b, w: (moe(x, a, b, idx, w, backend=backend),),
        lambda x, a, b, w: (reference(x, a, b, idx, w),),
        (x, w_gate_up, w_down, weights),
    )


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_outputs_and_gradients(top_k, backend, device, dtype):
    check(make_moe(300, 96, 8, 112, top_k, dtype=dtype, device=device), backend)


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_few_tokens(tokens, backend, device, dtype):
    check(make_moe(tokens, 96, 8, 112, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    ("dim", "hidden", "experts", "top_k"), [(100, 70, 8, 2), (768, 1024, 8, 2), (256, 96, 128, 8)]
)
def test_odd_and_large_sizes(dim, hidden, experts, top_k, backend, device, dtype):
    check(make_moe(1000, dim, experts, hidden, top_k, dtype=dtype, device=device), backend)


def test_ids_of_no_expert_and_ids_twice(backend, device, dtype):
    x, a, b, idx, w = make_moe(300, 96, 8, 112, dtype=dtype, device=device)
    idx = idx.to(torch.int32)
    idx[::3, 0], idx[1::3, 1], idx[2::3, 1] = 8, -1, idx[2::3, 0]
    check((x, a, b, idx, w), backend)
    idx[:] = 99
    assert (moe(x, a, b, idx, w, backend=backend) == 0).all()


def test_experts_without_tokens_get_zero_gradients(backend, device, dtype):
    x, a, b, idx, w = make_moe(300, 96, 8, 112, dtype=dtype, device=device)
    idx[:] = torch.tensor([1, 4], device=device)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]
    y = moe(x, a, b, idx, w, backend=backend)
    for grad in torch.autograd.grad(y, leaves, torch.ones_like(y))[1:3]:
        assert (grad[[0, 2, 3, 5, 6, 7]] == 0).all() and (grad[[1, 4]] != 0).any()


def test_runs_repeat_bit_for_bit(backend, device, dtype):
    x, a, b, idx, w = make_moe(777, 96, 8, 112, dtype=dtype, device=device)

    def results():
        leaves = [t.detach().requires_grad_() for t in (x, a, b, w)]
        y = moe(*leaves[:3], idx, leaves[3], backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    for a_, b_ in zip(results(), results(), strict=True):
        assert_close_to_exact(a_, b_, b_, roundings=0)


def test_activations_of_more_than_two_to_the_31_numbers(backend, device):
    """A sample of the tokens is compared: no other token touches them."""
    tokens, dim, experts, hidden, top_k = 2**16, 64, 8, 4224, 8
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    assert tokens * top_k * hidden > 2**31
    x, a, b, idx, w = make_moe(tokens, dim, experts, hidden, top_k, dtype=torch.bfloat16, device=device)
    sample = torch.arange(0, tokens, 997, device=device)
    x.requires_grad_()
    y = moe(x, a, b, idx, w, backend=backend)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    rows = [x.detach()[sample].requires_grad_(), x.detach()[sample].double().requires_grad_()]
    low = reference(rows[0], a, b, idx[sample], w[sample])
    exact = reference(rows[1], a.double(), b.double(), idx[sample], w[sample].double())
    assert_close_to_exact(y[sample], low, exact)
    grads = [torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip((low, exact), rows, strict=True)]
    assert_close_to_exact(grad[sample], *grads, name="gradient of x")
