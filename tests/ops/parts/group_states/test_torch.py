"""States of groups, their scans and the join with the near part, each against its definition."""

import numpy as np
import pytest
import torch

from vot_kernels.ops.parts.group_states.torch import (
    apply_states,
    far_states,
    far_weight,
    feature_map,
    feature_map_backward,
    group_states,
    join_far,
    plan_far_states,
    plan_states,
    scan_states,
)
from vot_kernels.testing import check_against_reference, make_tensor, max_error, uninitialized_is_nan

# Segments of 4, 0, 1, 4 and 2 groups; groups of several lengths, one of them empty.
SEGMENTS = np.array([0, 4, 4, 5, 9, 11])
ROWS = np.cumsum([0, 3, 3, 2, 3, 4, 1, 3, 0, 3, 2, 2])
TOKENS = int(ROWS[-1])
SIDES = pytest.mark.parametrize(("left", "right"), [(1, None), (0, None), (None, 1), (2, 3), (1, 1), (0, 0)])


def plan(left, right):
    return plan_states(SEGMENTS, ROWS, left, right, torch.device("cpu"))


def far_groups(group, left, right):
    """Each group that `group` reaches, with how many groups further it lies than the nearest one may."""
    segment = np.searchsorted(SEGMENTS, group, side="right") - 1
    others = range(SEGMENTS[segment], SEGMENTS[segment + 1])
    before = [(g, group - left - g) for g in others if left is not None and g <= group - left]
    return before + [(g, g - group - right) for g in others if right is not None and g >= group + right]


def far_by_loop(queries, features, values, left, right, log_step=None):
    """What each query finds: the sum of its scores times the values, over every row of every group it reaches."""
    out = []
    for group in range(SEGMENTS[-1]):
        rows = queries[:, ROWS[group] : ROWS[group + 1]]
        found = rows.new_zeros(*rows.shape[:2], values.shape[2])
        for other, steps in far_groups(group, left, right):
            there = slice(ROWS[other], ROWS[other + 1])
            factor = 1 if log_step is None else (steps * log_step).exp()[:, None, None]
            found = found + factor * (rows @ features[:, there].mT @ values[:, there])
        out.append(found)
    return torch.cat(out, 1)


def far_by_states(queries, features, values, left, right, log_step=None):
    planned = plan(left, right)
    states = group_states(features, values, planned)
    return apply_states(queries, scan_states(states, planned, log_step=log_step), planned)


@SIDES
@pytest.mark.parametrize("decays", [False, True])
def test_scanned_states_are_a_sum_over_the_groups(left, right, decays):
    log_step = torch.tensor([-0.4, -1e-3]) if decays else None
    queries, features, values = (make_tensor(2, TOKENS, n, seed=n).abs() for n in (5, 5, 3))
    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: [far_by_states(*x, left, right, log_step)],
            lambda *x: [far_by_loop(*x, left, right, log_step)],
            [queries, features, values],
            gradients=False,
        )


@SIDES
@pytest.mark.parametrize("decays", [False, True])
def test_the_transposed_scan_is_the_adjoint_of_the_scan(left, right, decays):
    """<scan(x), y> = <x, scan^T(y)> for each head."""
    planned, log_step = plan(left, right), torch.tensor([-0.4, -1e-3]) if decays else None
    x, y = (make_tensor(2, planned.num_slots, 3, 4, dtype=torch.float64, seed=n) for n in (1, 2))
    there = (scan_states(x, planned, log_step=log_step) * y).sum((1, 2, 3))
    back = (x * scan_states(y, planned, transposed=True, log_step=log_step)).sum((1, 2, 3))
    assert max_error(there, back) < 1e-11


def test_segments_that_reach_nothing_have_no_states():
    assert plan(0, None).num_slots == 11  # even a lone group reaches itself
    assert plan(1, None).num_slots == 10
    assert plan(3, 4).num_slots == 8
    assert plan(4, None).num_slots == plan(None, None).num_slots == 0


# Four, one, four and two states; where those end that are far before each of them, and where those after it begin.
STATES, BEFORE = np.array([0, 4, 5, 9, 11]), np.array([0, 0, 0, 2, 4, 5, 5, 6, 8, 9, 10])
AFTER = np.array([2, 3, 4, 4, 5, 6, 8, 9, 9, 11, 11])


def far_plan(before, after):
    index = np.arange(len(BEFORE))
    far = (np.searchsorted(AFTER, index, "right"), np.searchsorted(BEFORE, index, "right"))
    sides = (BEFORE if before else None, AFTER if after else None)
    mirrored = (far[0] if after else None, far[1] if before else None)
    given = [tuple(None if x is None else torch.from_numpy(x) for x in ends) for ends in (sides, mirrored)]
    states = torch.from_numpy(np.stack([ROWS[:-1], ROWS[1:]]))
    return plan_far_states(states, torch.from_numpy(STATES), *given, torch.device("cpu"))


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_far_states_are_sums_over_what_is_far(before, after):
    planned, ones = far_plan(before, after), torch.ones(1, TOKENS, 1)
    numbers = make_tensor(1, TOKENS, 1, seed=1, dtype=torch.float64)
    owner = np.repeat(np.arange(len(BEFORE)), np.diff(ROWS))
    far = np.zeros((TOKENS, TOKENS), dtype=bool)
    for row, state in enumerate(owner):
        segment = np.searchsorted(STATES, state, "right") - 1
        same = (STATES[segment] <= owner) & (owner < STATES[segment + 1])
        far[row] = same & (before & (owner < BEFORE[state]) | after & (owner >= AFTER[state]))
    for transposed in (False, True):
        states = group_states(ones.double(), numbers, planned)
        found = apply_states(ones.double(), far_states(states, planned, transposed=transposed), planned)
        expected = torch.from_numpy(far.T if transposed else far).double() @ numbers
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_feature_maps(name, dtype):
    class Map(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            features = feature_map(x, name)
            ctx.save_for_backward(x, features)
            return features

        @staticmethod
        def backward(ctx, d_features):
            return feature_map_backward(*ctx.saved_tensors, d_features, name)

    definitions = {
        "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: torch.where(x > 0, x, 0 * x),
    }
    x = make_tensor(7, 3, 9, dtype=dtype) * 3
    check_against_reference(lambda x: [Map.apply(x)], lambda x: [definitions[name](x)], [x])


@pytest.mark.parametrize("far", ["some", "none"])
def test_join_is_one_softmax_over_near_and_far(far):
    """Near scores exp(s), far weights exp(beta) f: their sum of values over their sum."""
    near, values = make_tensor(2, 6, 4), make_tensor(2, 4, 3, seed=1)
    weights, far_values = make_tensor(2, 6, 5, seed=2).abs(), make_tensor(2, 5, 3, seed=3)
    beta = torch.tensor([0.7, -30.0])[:, None, None]
    if far == "none":
        weights[:, ::2] = 0

    def joined(near, values, weights, far_values, beta):
        sums = weights @ torch.cat([far_values, torch.ones_like(far_values[..., :1])], -1)
        lse = near.logsumexp(-1, keepdim=True)
        return join_far(near.softmax(-1) @ values, lse, sums, beta)

    def direct(near, values, weights, far_values, beta):
        every = torch.cat([near.exp(), beta.exp() * weights], -1)
        total = every.sum(-1, keepdim=True)
        return every @ torch.cat([values, far_values], 1) / total, total.log()

    inputs = [near, values, weights, far_values, beta]
    check_against_reference(joined, direct, inputs, gradients=False, names=["out", "lse"])


def test_an_absent_near_part_leaves_the_far_part():
    """lse is -inf: the far weights are bounded, so that 0 times one of them is 0."""
    lse, beta = torch.full((1, 2, 1), -torch.inf), torch.zeros(1, 1, 1)
    sums = torch.tensor([[[6.0, 2.0], [0.0, 0.0]]])
    weight = far_weight(beta, lse)
    assert weight.isfinite().all() and (0 * weight == 0).all()
    out, joint = join_far(torch.zeros(1, 2, 1), lse, sums, beta)
    assert out[0, 0] == 3 and joint[0, 0] == torch.tensor(2.0).log()
