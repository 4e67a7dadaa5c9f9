"""Geometric relations: the correct predicate, the correct frames, no flicker."""

import math

import numpy as np
import pytest

from vot_kernels.scene_graph import (
    GEOMETRIC_PREDICATES,
    STSG,
    Relation,
    RelationRules,
    Threshold,
    Tracklet,
    Vocabulary,
    geometric_relations,
    with_geometric_relations,
)
from vot_kernels.testing import shifted

FPS = 8.0
SIZE = 0.2
VOCABULARY = Vocabulary(predicates=GEOMETRIC_PREDICATES)


def graph(*paths, fps=FPS, frames=None) -> STSG:
    """One tracklet of side 0.2 per path of centres; None means absent."""
    tracklets = []
    for i, path in enumerate(paths, 1):
        boxes = {
            k: ((c[0] - SIZE / 2, c[1] - SIZE / 2, c[0] + SIZE / 2, c[1] + SIZE / 2), 0.5 + 0.1 * i)
            for k, c in enumerate(path)
            if c is not None
        }
        tracklets.append(Tracklet(f"o{i}", "x", (), boxes))
    count = frames or max(map(len, paths))
    return STSG(tuple(k / fps for k in range(count)), tuple(tracklets), vocabulary=VOCABULARY)


def holds(stsg, **options):
    return {(r.subject, r.predicate, r.object): (r.t0, r.t1) for r in geometric_relations(stsg, **options)}


def test_still_objects_side_by_side():
    found = holds(graph([(0.2, 0.5)] * 4, [(0.45, 0.5)] * 4))
    assert found == {("o1", "left of", "o2"): (0, 3), ("o1", "near", "o2"): (0, 3)}
    assert holds(graph([(0.45, 0.5)] * 4, [(0.2, 0.5)] * 4)).keys() >= {("o1", "right of", "o2")}
    assert holds(graph([(0.5, 0.1)] * 4, [(0.5, 0.9)] * 4)) == {("o1", "above", "o2"): (0, 3)}
    assert holds(graph([(0.5, 0.9)] * 4, [(0.5, 0.1)] * 4)) == {("o1", "below", "o2"): (0, 3)}


def test_inverses_mirror_every_directed_relation():
    pair = graph([(0.2, 0.2)] * 4, [(0.45, 0.45)] * 4)
    plain, both = holds(pair), holds(pair, inverses=True)
    mirror = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
        "near": "near",
    }
    assert both == plain | {("o2", mirror[p], "o1"): t for (_, p, _), t in plain.items()} and len(both) == 6


def test_motion_is_unary_and_by_real_time():
    path = [(0.1 + 0.02 * k, 0.8 - 0.03 * k) for k in range(8)]
    assert holds(graph(path)) == {("o1", "moves right", "o1"): (0, 7), ("o1", "moves up", "o1"): (0, 7)}
    assert holds(graph(path, fps=1)) == {}  # the same steps, eight times slower
    mirrored = [(y, x) for x, y in path]
    assert holds(graph(mirrored)) == {("o1", "moves left", "o1"): (0, 7), ("o1", "moves down", "o1"): (0, 7)}


def test_only_the_mover_approaches_and_only_while_closing_in():
    path = [(0.1 + 0.03 * k, 0.5) for k in range(8)]
    found = holds(graph(path, [(0.8, 0.5)] * 8), predicates=["approaches"])
    assert found == {("o1", "approaches", "o2"): (0, 7)}
    # o1 follows o2, which is faster: it moves towards o2 without coming closer.
    assert holds(graph(path, [(0.3 + 0.05 * k, 0.5) for k in range(8)]), predicates=["approaches"]) == {}
    there_and_back = [(0.1 + 0.03 * min(k, 14 - k), 0.5) for k in range(15)]
    found = holds(graph(there_and_back, [(0.9, 0.5)] * 15), predicates=["approaches"])
    ((t0, t1),) = found.values()
    assert t0 == 0 and abs(t1 - 7) <= 1


def test_hysteresis_stops_flicker():
    rng = np.random.default_rng(shifted(0))
    edge = [(0.3 + 0.015 * math.sin(2.5 * k) + rng.normal(0, 0.002), 0.5) for k in range(24)]
    shaky = graph(edge, [(0.5, 0.5)] * 24)  # the gap wavers around 0
    flat = Threshold(on=0.0, off=0.0)
    with_hysteresis = geometric_relations(shaky, predicates=["left of"])
    without = geometric_relations(
        shaky, predicates=["left of"], rules=RelationRules(direction=flat, min_duration=1)
    )
    assert len(with_hysteresis) == 1 and len(without) > 3


def test_short_intervals_and_gaps():
    blink = graph([(0.5, 0.5), (0.2, 0.5), (0.5, 0.5), (0.5, 0.5)], [(0.6, 0.5)] * 4)
    assert ("o1", "left of", "o2") not in holds(blink)
    assert holds(blink, rules=RelationRules(min_duration=1))["o1", "left of", "o2"] == (1, 1)
    path = [(0.2, 0.5)] * 3 + [None] * 5 + [(0.2, 0.5)] * 3
    gap = graph(path, [(0.9, 0.5)] * 11)
    intervals = [(r.t0, r.t1) for r in geometric_relations(gap)]
    assert intervals == [(0, 2), (8, 10)]
    assert [(r.t0, r.t1) for r in geometric_relations(gap, rules=RelationRules(max_gap=6))] == [(0, 10)]


def test_sparse_tracks_read_like_dense_ones():
    dense = graph([(0.1 + 0.02 * k, 0.3) for k in range(16)], [(0.8, 0.8)] * 16)
    sparse, issues = STSG.from_text(dense.to_text(every=4), VOCABULARY, dense.frame_times_s)
    assert [i.kind for i in issues] == ["unknown label"] * 2
    assert holds(sparse) == holds(dense)


def test_scores_are_the_mean_of_the_weaker_end():
    (relation,) = geometric_relations(graph([(0.2, 0.5)] * 4, [(0.9, 0.5)] * 4))
    assert relation.score == pytest.approx(0.6)


def test_derivation_replaces_geometric_relations_only():
    pair = graph([(0.2, 0.5)] * 4, [(0.9, 0.5)] * 4)
    old = (Relation("o1", "near", "o2", 0, 3), Relation("o1", "holds", "o2", 0, 1))
    stsg = STSG(pair.frame_times_s, pair.tracklets, old, (), VOCABULARY)
    derived = with_geometric_relations(stsg).relations
    assert [(r.predicate, r.t0, r.t1) for r in derived] == [("left of", 0, 3), ("holds", 0, 1)]


def test_derived_relations_are_sound_on_random_walks():
    rng = np.random.default_rng(shifted(1))
    paths = np.clip(0.5 + np.cumsum(rng.normal(0, 0.03, (4, 32, 2)), axis=1), 0.1, 0.9)
    stsg = with_geometric_relations(graph(*paths.tolist()))
    assert len(stsg.relations) > 20
    problems = [p for p in stsg.validate() if "label" not in p]
    assert problems == []
    for r in stsg.relations:  # never two opposite directions at once
        opposite = {
            "left of": "right of",
            "above": "below",
            "moves left": "moves right",
            "moves up": "moves down",
        }
        for other in stsg.relations:
            if (other.subject, other.object) == (r.subject, r.object) and opposite.get(
                r.predicate
            ) == other.predicate:
                assert r.t1 < other.t0 or other.t1 < r.t0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="one of left of, .* got 'hits'"):
        geometric_relations(graph([(0.5, 0.5)]), predicates=["hits"])
    with pytest.raises(ValueError, match="off must be at most on"):
        Threshold(on=0.1, off=0.2)
    with pytest.raises(ValueError, match="max_gap must be at least 1, got 0"):
        RelationRules(max_gap=0)
    with pytest.raises(ValueError, match="o1 has boxes in the frames 0 to 2, but the graph has 1 frames"):
        geometric_relations(graph([(0.5, 0.5)] * 3, frames=1))
