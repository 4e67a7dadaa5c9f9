"""Agreement of graphs: a graph with itself, each kind of error by a case worked out by hand."""

from dataclasses import replace

import pytest

from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.scene_graph.graph import STSG, Relation, Tracklet
from vot_kernels.train.rewards.agreement import event_iou, track_iou, triplets_found


def track(id, name, x, frames=range(4)):
    *attributes, label = name.split()
    return Tracklet(id, label, tuple(attributes), {t: ((x, 0.0, x + 0.2, 0.2), 1.0) for t in frames})


def graph(tracklets, *relations):
    return STSG(frame_times_s=tuple(range(4)), tracklets=tuple(tracklets), relations=tuple(relations))


RED, BLUE = track("o1", "red 3", 0.1), track("o2", "blue 7", 0.6)
LEFT = Relation("o1", "left of", "o2", 0, 3)
TRUE = graph([RED, BLUE], LEFT)


@pytest.mark.parametrize("index", range(6))
def test_a_graph_agrees_with_itself(index):
    stsg = generate_episode("test", index).stsg
    found, total = triplets_found(stsg, stsg)
    assert found == total == sum(r.t1 - r.t0 + 1 for r in stsg.relations)
    assert track_iou(stsg, stsg) == event_iou(stsg, stsg) == pytest.approx(1)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (graph([RED, BLUE]), 0),
        (graph([RED, BLUE], replace(LEFT, t0=1, t1=2)), 2),
        (graph([RED, BLUE], replace(LEFT, predicate="above")), 0),
        (graph([RED, BLUE], Relation("o2", "left of", "o1", 0, 3)), 0),
        (graph([replace(RED, label="4"), BLUE], LEFT), 0),  # another digit
        (
            graph([track("o1", "red 3", 0.16), BLUE], LEFT),
            4,
        ),  # moved by less than a third of its width: IoU 0.54
        (graph([track("o1", "red 3", 0.18), BLUE], LEFT), 0),  # by more: IoU 0.43
        (graph([RED, track("o2", "blue 7", 0.6, range(3))], LEFT), 3),  # absent in the last frame
        (
            graph(
                [track("o2", "red 3", 0.1), track("o1", "blue 7", 0.6)], Relation("o2", "left of", "o1", 0, 3)
            ),
            4,
        ),
    ],
    ids=["none", "half", "predicate", "turned", "name", "near", "far", "absent", "other ids"],
)
def test_triplets_need_their_words_their_frame_and_their_places(said, found):
    assert triplets_found(said, TRUE) == (found, 4)


def test_an_empty_truth_has_no_triplets():
    assert triplets_found(TRUE, graph([])) == (0, 0)
