"""The near and far groups of the geometry agree with the masks of the reference."""

from itertools import pairwise

import pytest
import torch

from vot_kernels.ops.attention_options import CAUSAL_MODES, window_sides
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.hybrid_attention.geometry import Geometry
from vot_kernels.packing import PackedLayout

LAYOUTS = {
    "ragged": PackedLayout.from_lengths((9, 0, 2, 13), group_size=4),
    "empty groups": PackedLayout.from_cu_seqlens([0, 12, 15], [0, 4, 4, 9, 12, 12, 15]),
    "one group each": PackedLayout.from_lengths((3, 1)),
    "nothing": PackedLayout.from_lengths((0, 0)),
    "no segment": PackedLayout.from_lengths(()),
}
WINDOWS = [0, 1, (2, 0), (0, 1), None]
every = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def masks(layout, window, causal):
    """near and far `[tokens, tokens]` by the reference, segment by segment."""
    near, far = torch.zeros(2, layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for begin, end in pairwise(layout.host_cu_seqlens.tolist()):
        own = slice(begin, end)
        groups = layout.token_groups[own]
        near[own, own], far[own, own] = reference._masks(groups, window_sides(window, causal), causal)
    return near, far


def geometries(layout):
    for window in WINDOWS:
        for causal in CAUSAL_MODES:
            if not (causal and window == (0, 1)):
                yield Geometry.of(layout, window, causal), *masks(layout, window, causal)


@every
def test_near_ranges(layout):
    for geometry, near, _ in geometries(layout):
        found = torch.zeros_like(near)
        for begin, end, key_begin, key_end in geometry.near_ranges().tolist():
            found[begin:end, key_begin:key_end] = True
        if geometry.causal == "token":
            found = found.tril()
        assert torch.equal(found, near), geometry[-3:]


@every
def test_lags(layout):
    """A group is far if it is at least so many groups back, or ahead."""
    groups, segments = layout.token_groups, layout.token_segments
    distance = groups - groups[:, None]
    together = segments == segments[:, None]
    for geometry, _, far in geometries(layout):
        behind, ahead = geometry.lags
        found = torch.zeros_like(far)
        if behind is not None:
            found |= together & (distance <= -behind)
        if ahead is not None:
            found |= together & (distance >= ahead)
        assert torch.equal(found, far), geometry[-3:]
        assert geometry.has_far or not far.any(), geometry[-3:]


def test_whether_any_group_is_far():
    layout = PackedLayout.from_lengths((9, 0, 2), group_size=4)  # three groups, none and one
    for window, causal, expected in (
        (0, None, True),
        (1, "group", True),
        (2, None, False),
        (None, "token", False),
    ):
        assert Geometry.of(layout, window, causal).has_far is expected
    assert not Geometry.of(PackedLayout.from_lengths(()), 0, None).has_far


def test_groups_play_no_part_where_all_is_near():
    layout = LAYOUTS["ragged"]
    for window, causal, expected in ((None, None, True), (None, "token", True), (None, "group", False)):
        geometry = Geometry.of(layout, window, causal)
        assert geometry.all_near is expected
        assert (geometry.key_ranges().row_groups is layout.cu_seqlens) is expected
    assert not Geometry.of(layout, 9, None).all_near
