"""The size-aware embedding on a GPU."""

import pytest

from vot_kernels import PackedLayout, size_aware_embedding
from vot_kernels.testing import check_against_reference, make_tensor

OP = "size_aware_embedding"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [10, 768])
@pytest.mark.parametrize("grid", [[[2, 3, 2], [0, 4, 4], [1, 1, 1]], [[8, 24, 32], [1, 40, 51]]])
def test_matches_the_reference(grid, width, backend, device, dtype):
    layout = PackedLayout.from_grid_thw(grid, device=device)
    shapes = ((layout.num_tokens, width), (48, 36), (48,), (width, 48), (width,))
    inputs = [make_tensor(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]

    def run(x, *weights, backend=backend):
        return (size_aware_embedding(x, layout, *weights, fps=8.0, backend=backend),)

    def oracle(*inputs):
        return run(*inputs, backend="reference")

    # Gradients of the weights are sums over all tokens, whose terms mostly cancel.
    check_against_reference(run, oracle, inputs, roundings=16.0)
