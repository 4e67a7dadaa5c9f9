"""Intervals of time: the temporal IoU as properties and by hand, and the intervals of a graph."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reasoning.world import make_world
from vot_kernels.scene_graph import Event, Interval, Relation

TIMES = st.floats(0, 1e4, allow_nan=False)
INTERVALS = st.tuples(TIMES, TIMES).map(lambda ends: Interval(*sorted(ends)))


@given(INTERVALS, INTERVALS)
def test_temporal_iou_is_a_symmetric_share(a, b):
    iou = a.iou(b)
    assert 0 <= iou <= 1 and iou == b.iou(a)
    assert a.iou(a) == 1
    if a.shared(b) is None:
        assert iou == 0
    if iou == 1 and a.length_s > 1e-3:
        assert a.start_s == pytest.approx(b.start_s) and a.end_s == pytest.approx(b.end_s)


@given(INTERVALS, st.floats(1e-2, 1e2), st.floats(-1e3, 1e3))
def test_temporal_iou_knows_neither_units_nor_origin(a, scale, shift):
    b = Interval(a.start_s + 0.3 * a.length_s, a.end_s + 0.3 * a.length_s)
    if a.length_s > 1e-3:
        moved = [Interval(i.start_s * scale + shift, i.end_s * scale + shift) for i in (a, b)]
        assert moved[0].iou(moved[1]) == pytest.approx(0.7 / 1.3, abs=1e-3)


def test_temporal_iou_by_hand():
    assert Interval(0, 2).iou(Interval(1, 3)) == pytest.approx(1 / 3)
    assert Interval(0, 4).iou(Interval(1, 2)) == pytest.approx(1 / 4)
    assert Interval(0, 1).iou(Interval(1, 2)) == 0  # they only touch
    assert Interval(1, 1).iou(Interval(0, 2)) == 0 and Interval(1, 1).iou(Interval(1, 1)) == 1
    assert 1.0 in Interval(0, 1) and 1.1 not in Interval(0, 1)
    assert Interval(0, 2).shared(Interval(1, math.inf)) == Interval(1, 2)
    for ends in ((2, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="must not end before it begins"):
            Interval(*ends)


def test_events_last_from_the_frame_before_to_the_frame_after():
    world = make_world()  # frames 0.25 s apart
    assert world.interval(Event("hits", 2, ("o1", "o2"))) == Interval(0.25, 0.75)
    assert world.interval(Event("hits", 0, ("o1", "o2"))) == Interval(0, 0.25)
    assert world.interval(Event("hits", 7, ("o1", "o2"))) == Interval(1.5, 1.75)
    assert world.interval(Relation("o1", "near", "o2", 1, 3)) == Interval(0.25, 0.75)
