"""Experts on inputs that broke other packages; each mark names the report."""

import pytest
import torch

from vot_kernels import aoe, moe
from vot_kernels.testing import make_experts, make_moe


@pytest.mark.tested_on("transformers#46743")
@pytest.mark.parametrize("hidden", [5, 6])
def test_small_odd_experts_and_an_expanded_gradient(hidden):
    x, w_gate_up, w_down, indices, weights = make_moe(7, hidden, 3, hidden)
    leaves = [t.requires_grad_() for t in (x, w_gate_up, w_down, weights)]
    moe(*leaves[:3], indices, leaves[3]).sum().backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    moe(*leaves[:3], indices, leaves[3], backend="reference").sum().backward()
    assert all(
        torch.allclose(leaf.grad, grad, atol=1e-5) for leaf, grad in zip(leaves, expected, strict=True)
    )
    experts = [t.requires_grad_() for t in make_experts(7, hidden, 3, 2, hidden)]
    aoe(*experts, 2).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in experts)
