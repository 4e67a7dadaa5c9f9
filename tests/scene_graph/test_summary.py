"""Shorter graphs: the most important events and relations, and some of the frames."""

import pytest

from tests.reasoning.world import make_world
from vot_kernels.scene_graph import STSG, Event, Relation, at_frames, summarised


def graph(count: int) -> STSG:
    events = [Event("hits" if k % 10 else "bounces", k, ("o1",)) for k in range(count)]
    relations = [Relation("o1", "near", "o2", k, k) for k in range(0, count, 2)]
    return STSG(tuple(map(float, range(count))), events=tuple(events), relations=tuple(relations))


def test_the_important_stays_and_the_rest_is_spread_evenly():
    short = summarised(graph(200), 30, lambda item: isinstance(item, Event) and item.kind == "bounces")
    assert [e.t for e in short.events if e.kind == "bounces"] == list(range(0, 200, 10))
    others = [e.t for e in short.events if e.kind == "hits"] + [r.t0 for r in short.relations]
    assert len(others) == 10
    gaps = [b - a for a, b in zip(sorted(others), sorted(others)[1:], strict=False)]
    assert max(gaps) <= 30 and min(others) < 20 and max(others) > 170


@pytest.mark.parametrize("most", [0, 1, 300, 1000])
def test_no_more_than_asked_for_and_all_if_they_fit(most):
    whole = graph(200)
    short = summarised(whole, most, lambda item: 0)
    assert len(short.events) + len(short.relations) == min(most, 300)
    assert summarised(whole, 300, lambda item: 0) == whole
    with pytest.raises(ValueError, match="at least 0, got -1"):
        summarised(whole, -1, lambda item: 0)


def test_the_graph_of_some_frames():
    world = make_world()
    part = at_frames(world, [0, 2, 6])
    assert part.validate() == [] and part.frame_times_s == (0.0, 0.5, 1.5)
    assert part.tracklet("o1").box(1) == world.tracklet("o1").box(2)
    assert [(e.kind, e.t) for e in part.events] == [("hits", 1), ("bounces", 2)]
    assert Relation("o1", "left of", "o2", 0, 1) in part.relations
    for frames in ([2, 0], [0, 0], [8]):
        with pytest.raises(ValueError, match="must increase from 0 to 7"):
            at_frames(world, frames)


def test_boxes_between_those_kept_are_interpolated_up_to_a_gap():
    world = make_world()
    thin = world.subgraph(["o1"])
    track = thin.tracklets[0]
    sparse = STSG(
        world.frame_times_s, (type(track)("o1", "digit 3", (), {k: track.boxes[k] for k in (0, 4)}),)
    )
    assert at_frames(sparse, [2]).tracklets[0].box(0).center == pytest.approx(track.box(2).center)
    assert at_frames(sparse, [2], max_gap=2).tracklets[0].box(0) is None
