"""Norm and rotary positions of queries and keys on a GPU."""

import pytest

from vot_kernels import PackedLayout, rope_qk_norm
from vot_kernels.testing import check_against_reference, make_tensor

OP = "rope_qk_norm"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("grid", [[[3, 2, 3], [0, 4, 4], [1, 1, 1]], [[8, 24, 32], [1, 40, 51]]])
def test_matches_the_reference(grid, head_dim, norm, backend, device, dtype):
    layout = PackedLayout.from_grid_thw(grid, device=device)
    q, k = (
        make_tensor(layout.num_tokens, heads, head_dim, dtype=dtype, device=device, seed=heads)
        for heads in (4, 2)
    )
    weights = [1 + 0.3 * make_tensor(head_dim, dtype=dtype, device=device, seed=s) for s in (2, 3)]

    def run(q, k, q_weight=None, k_weight=None, backend=backend):
        return rope_qk_norm(q, k, layout.positions, q_weight=q_weight, k_weight=k_weight, backend=backend)

    def oracle(*inputs):
        return run(*inputs, backend="reference")

    check_against_reference(run, oracle, [q, k, *(weights if norm else [])])
