"""The Triton kernels of group states, on the interpreter."""

import pytest
import torch

from tests.marks import interpreted
from vot_kernels.ops.parts.group_states.triton import Rows, group_states, scan_states
from vot_kernels.testing import make_tensor, max_error, uninitialized_is_nan

pytest.importorskip("triton")


@interpreted
def test_states_of_given_features():
    """Any groups, features of another width than the values, weights, a last column, heads that add up."""
    bounds = torch.tensor([0, 5, 5, 75, 90], dtype=torch.int32)
    features, values = make_tensor(95, 4, 20).abs(), make_tensor(95, 4, 16, seed=1)
    weights, last = make_tensor(95, 4, seed=2), make_tensor(95, 4, seed=3)
    with uninitialized_is_nan():
        states = group_states(Rows(features, values, weights, last), bounds, 2, "none")
    assert states.shape == (4, 2, 20 * 17)
    columns = torch.cat([values, last[..., None]], -1)
    for group, (begin, end) in enumerate([(0, 5), (5, 5), (5, 75), (75, 90)]):
        rows = slice(begin, end)
        expected = torch.einsum("thf,th,thd->hfd", features[rows], weights[rows], columns[rows])
        expected = expected.unflatten(0, (2, 2)).sum(1)
        assert max_error(states[group, :, :320].unflatten(-1, (20, 16)), expected[..., :16]) < 1e-4
        assert max_error(states[group, :, 320:], expected[..., 16]) < 1e-4


@interpreted
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_sums_of_groups(lag):
    """Over the groups of each segment up to `lag` before, and, added to it, from `lag` after on."""
    states = make_tensor(9, 2, 5)
    bounds = torch.tensor([0, 6, 6, 7, 9], dtype=torch.int32)
    with uninitialized_is_nan():
        before = scan_states(states, bounds, lag=lag)
        both = scan_states(states, bounds, lag=lag, reverse=True, out=before.clone())
    for begin, end in [(0, 6), (6, 7), (7, 9)]:
        for i in range(begin, end):
            left = states[begin : max(begin, i - lag + 1)].sum(0)
            right = states[min(end, i + lag) : end].sum(0)
            assert max_error(before[i], left) < 1e-5 and max_error(both[i], left + right) < 1e-5
