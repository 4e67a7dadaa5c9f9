"""The Triton kernels of group states, on the interpreter."""

import pytest
import torch

from tests.marks import interpreted
from vot_kernels.ops.parts.group_states.triton import Rows, far_states, group_states, scan_states
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


def far_sums(behind, ahead, dtype=torch.float32, **rows):
    """The states of nine groups, some longer than a tile, and the sums over far groups, as the kernels make them."""
    bounds = torch.tensor([0, 5, 5, 75, 90, 95, 96, 200, 216, 220], dtype=torch.int32)
    segments = torch.tensor([0, 6, 6, 7, 9], dtype=torch.int32)
    features, values = make_tensor(221, 2, 20).abs().to(dtype), make_tensor(221, 2, 16, seed=1).to(dtype)
    made = Rows(features, values, **rows)
    with uninitialized_is_nan():
        states = group_states(made, bounds, 1, "none").squeeze(1)
        return states, far_states(made, bounds, segments, 1, "none", behind, ahead)


@interpreted
@pytest.mark.parametrize("behind, ahead", [(0, None), (1, 1), (3, 2), (None, 1), (None, 4), (9, 9)])
def test_sums_over_far_groups(behind, ahead):
    """Over the groups of each segment from `behind` before on back, and from `ahead` after on."""
    states, (sums, normalisers) = far_sums(behind, ahead)
    assert sums.shape == (9, 1, 20, 16) and normalisers.shape == (9, 1, 20)
    found = torch.cat([sums.flatten(1), normalisers.flatten(1)], 1)
    for begin, end in [(0, 6), (6, 7), (7, 9)]:
        for i in range(begin, end):
            far = torch.zeros_like(states[0])
            if behind is not None:
                far = far + states[begin : max(begin, i - behind + 1)].sum(0)
            if ahead is not None:
                far = far + states[min(end, i + ahead) : end].sum(0)
            assert max_error(found[i], far) <= 1e-6 * far.abs().max()


@interpreted
def test_far_sums_of_half_precision_are_float32():
    """Sums over a segment exceed the range of float16; those of bfloat16 have its range."""
    _, (sums, normalisers) = far_sums(1, 1, torch.float16)
    assert sums.dtype == normalisers.dtype == torch.float32


@interpreted
def test_weights_and_last_may_lie_by_heads():
    weights, last = make_tensor(221, 2, seed=2), make_tensor(221, 2, seed=3)
    _, apart = far_sums(1, 1, weights=weights, last=last)
    by_heads = {"weights": weights.t().contiguous(), "last": last.t().contiguous(), "by_heads": True}
    _, together = far_sums(1, 1, **by_heads)
    for x, y in zip(apart, together, strict=True):
        assert torch.equal(x, y)


@interpreted
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums(lag, reverse):
    """Over the slots of each segment up to `lag` before, or in reverse from `lag` after on."""
    states = make_tensor(9, 2, 5)
    bounds = torch.tensor([0, 6, 6, 7, 9], dtype=torch.int32)
    with uninitialized_is_nan():
        found = scan_states(states, bounds, lag=lag, reverse=reverse)
    for begin, end in [(0, 6), (6, 7), (7, 9)]:
        for i in range(begin, end):
            left, right = states[begin : max(begin, i - lag + 1)], states[min(end, i + lag) : end]
            assert max_error(found[i], (right if reverse else left).sum(0)) < 1e-5
