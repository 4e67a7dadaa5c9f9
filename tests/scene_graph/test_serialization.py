"""The JSON form: lossless, versioned, one sentence per error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vot_kernels.scene_graph import STSG, Event, Relation, STSGFormatError, Tracklet, Vocabulary

floats = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=8)
frames = st.integers(0, 30)
boxes = st.dictionaries(frames, st.tuples(st.tuples(floats, floats, floats, floats), floats), max_size=4)
names = st.lists(words, max_size=3)
graphs = st.builds(
    STSG,
    st.lists(floats, max_size=5),
    st.lists(st.builds(Tracklet, words, words, names, boxes), max_size=3),
    st.lists(st.builds(Relation, words, words, words, frames, frames, floats), max_size=3),
    st.lists(st.builds(Event, words, frames, names, floats), max_size=3),
    st.builds(Vocabulary, names, names, names, names),
    words,
)


@settings(max_examples=80, deadline=None)
@given(graphs, st.sampled_from([None, 2]))
def test_round_trip_is_lossless(graph, indent):
    text = graph.to_json(indent=indent)
    assert STSG.from_json(text) == graph
    assert STSG.from_json(text.encode()) == graph
    assert graph.to_dict() == json.loads(text) and STSG.from_dict(graph.to_dict()) == graph


def test_nan_cannot_be_written():
    with pytest.raises(ValueError, match="NaN or infinity"):
        STSG((float("nan"),)).to_json()


def document() -> dict:
    boxes = {0: ((0, 0, 1, 1), 1)}
    graph = STSG(
        (0.0,),
        (Tracklet("o1", "cat", (), boxes),),
        (Relation("o1", "near", "o1", 0, 0),),
        (Event("hits", 0, ("o1",)),),
    )
    return graph.to_dict()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "must be an object with \"format\": .* got 'other'"),
        (["version"], 2, "version must be 1, got 2"),
        (["vocabulary"], [], "graph.vocabulary must be an object, got a list of 0"),
        (["frame_times_s"], 3, "graph.frame_times_s must be a list, got the number 3"),
        (["frame_times_s", 0], "0", r"frame_times_s\[0\] must be a finite number, got a string"),
        (["frame_times_s", 0], 10**400, r"frame_times_s\[0\] must be a finite number, got the number inf"),
        (["tracklets", 0], None, r"tracklets\[0\] must be an object, got null"),
        (["tracklets", 0, "colour"], "red", r"tracklets\[0\] has the unknown key 'colour'"),
        (["tracklets", 0, "label"], 3, r"tracklets\[0\].label must be a string, got the number 3"),
        (["tracklets", 0, "boxes", 0], [0, 0, 1], r"boxes\[0\] must be \[frame, x1.* got a list of 3"),
        (["tracklets", 0, "boxes"], [[0, 0, 0, 1, 1, 1]] * 2, r"boxes\[1\] must be the only box in frame 0"),
        (["relations", 0, "t0"], 0.5, r"relations\[0\].t0 must be a whole number, got the number 0.5"),
        (["events", 0, "score"], True, r"events\[0\].score must be a finite number, got true or false"),
        (["events", 0, "participants", 0], {}, r"participants\[0\] must be a string, got an object"),
    ],
)
def test_each_malformation_is_named(path, value, message):
    broken = document()
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(STSGFormatError, match=message) as caught:
        STSG.from_dict(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", list(document()))
def test_missing_keys_are_named(key):
    broken = document()
    del broken[key]
    with pytest.raises(STSGFormatError):
        STSG.from_json(json.dumps(broken))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "NaN", "[" * 100_000, b"\xff\xfe\x00", '{"a": 1e999}', "9" * 5000]
)
def test_what_is_not_a_graph_is_refused(text):
    with pytest.raises(STSGFormatError):
        STSG.from_json(text)
