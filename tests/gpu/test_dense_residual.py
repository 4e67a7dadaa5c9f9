"""The weighted sum of past states on a GPU."""

import pytest
import torch

from vot_kernels import dense_residual
from vot_kernels.testing import check_against_reference, make_tensor

OP = "dense_residual"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (777, 100), (4096, 768)])
@pytest.mark.parametrize("count", [1, 2, 13])
def test_matches_the_reference(count, shape, backend, device, dtype):
    weights = make_tensor(count, seed=50, device=device)
    states = [make_tensor(*shape, seed=i, dtype=dtype, device=device) for i in range(count)]

    def run(weights, *states, backend=backend):
        return (dense_residual(states, weights, backend=backend),)

    def oracle(weights, *states):
        return run(weights, *states, backend="reference")

    check_against_reference(run, oracle, [weights, *states])


@pytest.mark.parametrize("shape", [(0, 8), (5, 1), (777, 100), (2000, 768), (33, 1280), (9, 4096)])
def test_a_norm_matches_the_reference(shape, backend, device, dtype):
    weights, norm = make_tensor(3, seed=50, device=device), make_tensor(shape[1], seed=51, device=device)
    states = [make_tensor(*shape, seed=i, dtype=dtype, device=device) for i in range(3)]

    def run(weights, norm, *states, backend=backend):
        return dense_residual(states, weights, norm_weight=norm, backend=backend)

    def oracle(*inputs):
        return run(*inputs, backend="reference")

    check_against_reference(run, oracle, [weights, norm, *states])


@pytest.mark.tested_on("axolotl#3667", "Liger#1248")
def test_states_of_more_than_two_to_the_31_numbers(device):
    if device.type != "cuda":
        pytest.skip("the states take 13 GB")
    states = [torch.ones(2**31 + 8, dtype=torch.bfloat16, device=device) for _ in range(2)]
    out = dense_residual(states, torch.tensor([1.0, 2.0], device=device), backend="triton")
    assert (out[-8:] == 3).all() and (out[:8] == 3).all()
