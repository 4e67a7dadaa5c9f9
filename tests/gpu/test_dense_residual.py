"""The weighted sum of past states on a GPU."""

import pytest

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
