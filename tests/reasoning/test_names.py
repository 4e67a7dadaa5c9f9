import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reasoning.world import make_world
from vot_kernels.reasoning.names import (
    absent_words,
    find_directions,
    find_events,
    find_number,
    find_tracklets,
    find_yes_no,
    match_candidate,
)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Did the red digit 3 hit the blue digit 7?", ("o1", "o2")),
        ("Does the blue one hit the RED one?", ("o2", "o1")),
        ("red digit 5", ("o1",)),  # the colour decides when the digit may have been misread
        ("digit 3", ("o1", "o3")),
        ("digit 7s", ("o2",)),
        ("o3 and o1", ("o3", "o1")),
        ("o33, bored, reddish", ()),
        ("- **green digit 3**,\n- ｒｅｄ digit ３", ("o3", "o1")),  # full-width letters
        ("the yellow digit 7", ("o2",)),
        ("", ()),
        ("что движется?", ()),
    ],
)
def test_find_tracklets(world, text, ids):
    assert find_tracklets(text, world) == ids


def test_absent_words(world):
    assert absent_words("yellow", world) == ("yellow",)
    assert absent_words("digit 9", world) == ("digit 9",)
    assert absent_words("red digit 9", world) == ()
    assert absent_words("the red digit 3 or the blue one", world) == ()


def test_find_events():
    kinds = ("hits", "bounces")
    assert find_events("Did it HIT?", kinds) == ("hits",)
    assert find_events("the collision, then bouncing off", kinds) == kinds
    assert find_events("a white thing", kinds) == ()


def test_find_directions():
    assert find_directions("up and to the left") == {"up", "left"}
    assert find_directions("is it left of the other") == frozenset()
    assert find_directions("upper deck, copyright") == frozenset()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("about two times", 2),
        ("Twice.", 2),
        ("None", 0),
        ("it is ten", 10),
        ("someone", None),
        ("", None),
    ],
)
def test_find_number(text, number):
    assert find_number(text) == number


@pytest.mark.parametrize(
    ("text", "said"), [("Yes.", True), (" **No**, it", False), ("true", True), ("nothing", None), ("", None)]
)
def test_find_yes_no(text, said):
    assert find_yes_no(text) is said


def test_match_candidate():
    assert match_candidate("Red digit 3.", ["red", "red digit 3"]) == 1
    assert match_candidate("It is the blue one", ["red", "blue"]) == 1
    assert match_candidate("red and blue", ["blue", "green"]) == 0
    assert match_candidate("either red or blue", ["red", "blue"]) is None
    assert match_candidate("blueish", ["red", "blue"]) is None
    assert match_candidate("", ["red", "blue"]) is None


@given(st.text(max_size=80))
def test_any_text_is_read_without_an_error(text):
    graph = make_world()
    assert set(find_tracklets(text, graph)) <= {t.id for t in graph.tracklets}
    absent_words(text, graph), find_directions(text), find_yes_no(text), match_candidate(text, [text, "a"])
    number = find_number(text)
    assert number is None or number >= 0
