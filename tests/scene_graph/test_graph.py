"""The typed graph: views, subgraphs, packing, validation."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vot_kernels.scene_graph import STSG, Box, CorefEdge, Event, Relation, Tracklet, Vocabulary

VOCABULARY = Vocabulary(
    labels=("digit 3", "digit 7"),
    attributes=("red", "blue"),
    predicates=("left of", "moves left"),
    events=("hits", "bounces"),
)
A, B, C = Box(0.1, 0.1, 0.2, 0.2), Box(0.3, 0.1, 0.4, 0.2), Box(0.6, 0.5, 0.8, 0.7)


def graph() -> STSG:
    return STSG(
        frame_times_s=(0.0, 0.5, 1.0, 1.5),
        tracklets=(
            Tracklet("o1", "digit 3", ("red",), {3: (B, 0.5), 0: (A, 0.9), 1: (B, 0.8)}),
            Tracklet("o2", "digit 7", ("blue",), {1: (C, 1.0), 2: (C, 1.0)}),
        ),
        relations=(Relation("o1", "left of", "o2", 0, 2, 0.7), Relation("o1", "moves left", "o1", 1, 3)),
        events=(Event("hits", 1, ("o1", "o2"), 0.6), Event("bounces", 3, ("o1",))),
        vocabulary=VOCABULARY,
        source="truth",
    )


def test_box_measures():
    assert A.area == pytest.approx(0.01)
    assert B.center == pytest.approx((0.35, 0.15))
    assert A.iou(A) == pytest.approx(1)
    assert A.iou(Box(0.15, 0.1, 0.25, 0.2)) == pytest.approx(1 / 3)
    assert A.iou(C) == 0 and Box(0, 0, 0, 0).iou(Box(0, 0, 0, 0)) == 0


def test_frame_holds_what_is_there():
    frame = graph().frame(1)
    assert (frame.index, frame.time_s) == (1, 0.5)
    assert [(n.track, n.id, n.box, n.score) for n in frame.nodes] == [(0, "o1", B, 0.8), (1, "o2", C, 1.0)]
    assert [r.predicate for r in frame.relations] == ["left of", "moves left"]
    assert [e.kind for e in frame.events] == ["hits"]
    assert graph().frame(0).events == () and len(graph().frame(0).nodes) == 1
    for k in (-1, 4):
        with pytest.raises(IndexError, match="frames 0 to 3"):
            graph().frame(k)


def test_tracklet_is_normalised_and_immutable():
    tracklet = graph().tracklet("o1")
    assert tracklet.frames == (0, 1, 3) and tracklet.name == "red digit 3"
    assert tracklet.box(1) == B and tracklet.box(2) is None
    loose = Tracklet("o1", "digit 3", ["red"], {np.int64(0): (np.array(A), np.float32(1))})
    assert loose == Tracklet("o1", "digit 3", ("red",), {0: (A, 1.0)}) and hash(loose) is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        tracklet.label = "digit 7"
    with pytest.raises(KeyError, match="o1, o2"):
        graph().tracklet("o9")
    with pytest.raises(TypeError, match="Vocabulary.labels"):
        Vocabulary(labels="digit")


def test_subgraph_clips_and_keeps_frame_numbers():
    part = graph().subgraph({"o1"}, 1, 2)
    assert part.frame_times_s == graph().frame_times_s
    assert [(t.id, t.frames) for t in part.tracklets] == [("o1", (1,))]
    assert part.relations == (Relation("o1", "moves left", "o1", 1, 2),)
    assert part.events == ()  # the hit involves o2, the bounce is later
    assert graph().subgraph() == graph()
    assert graph().subgraph(["o1", "o2"], 2, 3).relations[0] == Relation("o1", "left of", "o2", 2, 2, 0.7)


def test_coref_edges_follow_presence():
    expected = (CorefEdge("o1", 0, 1), CorefEdge("o1", 1, 3), CorefEdge("o2", 1, 2))
    assert graph().coref_edges() == expected


def test_interpolation_fills_gaps_linearly():
    sparse = Tracklet("o1", "x", (), {0: (Box(0, 0, 0.2, 0.2), 1.0), 4: (Box(0.4, 0, 0.6, 0.2), 0.5)})
    filled = sparse.interpolated()
    assert filled.frames == (0, 1, 2, 3, 4)
    assert filled.box(1) == pytest.approx((0.1, 0, 0.3, 0.2)) and filled.boxes[1][1] == 0.5
    assert sparse.interpolated(max_gap=3) == sparse


def test_packed_arrays_say_what_the_graph_says():
    g, packed = graph(), graph().to_packed()
    assert packed.lengths.tolist() == [1, 2, 1, 1] and packed.num_tracks == 2
    nodes = [node for k in range(4) for node in g.frame(k).nodes]
    assert packed.track.tolist() == [n.track for n in nodes]
    assert [VOCABULARY.labels[i] for i in packed.label] == [n.label for n in nodes]
    assert packed.attributes.tolist() == [
        [float(a in n.attributes) for a in VOCABULARY.attributes] for n in nodes
    ]
    np.testing.assert_allclose(packed.boxes, [n.box for n in nodes], rtol=1e-6)
    np.testing.assert_allclose(packed.scores, [n.score for n in nodes], rtol=1e-6)
    # left of in frame 1 only (elsewhere one end is absent); moves left in 1 and 3; hits; bounces.
    assert packed.edges.tolist() == [[1, 2, 0], [1, 1, 1], [4, 4, 1], [1, 2, 2], [4, 4, 3]]
    np.testing.assert_allclose(packed.edge_scores, [0.7, 1, 1, 0.6, 1], rtol=1e-6)
    assert packed.coref.tolist() == [[0, 1], [1, 4], [2, 3]]
    assert {a.dtype.name for a in (packed.track, packed.label, packed.edges, packed.lengths)} == {"int64"}


def test_packing_with_another_vocabulary_and_without_nodes():
    packed = graph().to_packed(Vocabulary(labels=("digit 7",), predicates=("moves left",)))
    assert packed.label.tolist() == [1, 1, 0, 0, 1]  # 1: unknown to this vocabulary
    assert packed.attributes.shape == (5, 0)
    assert packed.edges.tolist() == [[1, 1, 0], [4, 4, 0]]
    empty = STSG((0.0, 1.0), (Tracklet("o1", "digit 3"),), vocabulary=VOCABULARY).to_packed()
    assert empty.lengths.tolist() == [0, 0] and empty.boxes.shape == (0, 4) and empty.edges.shape == (0, 3)
    with pytest.raises(ValueError, match="frames 0 to 3, but the graph has 2 frames"):
        dataclasses.replace(graph(), frame_times_s=(0.0, 1.0)).to_packed()


def test_a_sound_graph_has_no_problems():
    assert graph().validate() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frame_times_s": (0.0, 0.5, 0.5, 1.0)}, ["do not increase"]),
        ({"frame_times_s": (0.0, 0.5, float("nan"), 1.0)}, ["not finite"]),
        (
            {"tracklets": (Tracklet("o1", "digit 3"), Tracklet("o1", "digit 3"), Tracklet("o2", "digit 7"))},
            ["2 times"],
        ),
        ({"tracklets": (*graph().tracklets, Tracklet("car", "digit 3"))}, ["of the form o1"]),
        (
            {"tracklets": (*graph().tracklets, Tracklet("o3", "cat", ("big",)))},
            ["label 'cat'", "attribute 'big'"],
        ),
        (
            {"tracklets": (*graph().tracklets, Tracklet("o3", "digit 3", (), {9: (A, 1)}))},
            ["frame 9 is outside"],
        ),
        (
            {"tracklets": (*graph().tracklets, Tracklet("o3", "digit 3", (), {0: ((0.5, 0, 0.4, 1), 1)}))},
            ["swapped"],
        ),
        (
            {"tracklets": (*graph().tracklets, Tracklet("o3", "digit 3", (), {0: ((0, 0, 1.1, 1), 1)}))},
            ["1.1"],
        ),
        (
            {
                "tracklets": (
                    *graph().tracklets,
                    Tracklet("o3", "digit 3", (), {0: ((0, 0, float("nan"), 1), 1)}),
                )
            },
            ["nan"],
        ),
        ({"tracklets": (*graph().tracklets, Tracklet("o3", "digit 3", (), {0: (A, 2)}))}, ["score 2"]),
        ({"relations": (Relation("o1", "eats", "o9", 3, 2),)}, ["'eats'", "no tracklet 'o9'", "ends before"]),
        ({"relations": (Relation("o1", "left of", "o2", 0, 4, -1),)}, ["outside", "score -1"]),
        ({"events": (Event("sings", 4, ("o1", "o9")),)}, ["'sings'", "no tracklet 'o9'", "outside"]),
    ],
)
def test_each_fault_is_named(change, words):
    problems = dataclasses.replace(graph(), **change).validate()
    assert len(problems) == len(words), problems
    for word, problem in zip(words, problems, strict=True):
        assert word in problem


def test_the_types_import_without_torch():
    code = "import sys, vot_kernels.scene_graph as s; s.STSG(()); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])
