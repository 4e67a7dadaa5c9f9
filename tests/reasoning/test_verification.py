import dataclasses

import pytest

from tests.reasoning.world import track
from vot_kernels.data.digitworld.sidecar import load_sidecar
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.reasoning.claims import judge_claim
from vot_kernels.reasoning.names import find_tracklets
from vot_kernels.reasoning.steps import kind_of
from vot_kernels.reasoning.types import Task
from vot_kernels.reasoning.verification import check, confidence, part_in_question, perception_score
from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

S, C, U = "supported", "contradicted", "uncheckable"


def judge(graph, question, answer, candidates=None):
    asked = find_tracklets(question, graph)
    task = Task(question, kind_of(question) or "open", "question", asked, "question" if asked else "all")
    return check(task, answer, candidates or [answer], graph).verdict


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [
        # events, yes or no
        ("Did the red digit hit the blue digit?", "yes", S),
        ("Did the red digit hit the blue digit?", "No, it did not", C),
        ("Does the blue digit collide with the green digit?", "no", S),
        ("Does the blue digit collide with the green digit?", "yes", C),
        ("Did the blue digit bounce?", "yes", S),
        ("Did the red digit bounce?", "yes", C),
        ("Did the red digit hit the blue digit?", "perhaps", U),
        ("Did the red digit not hit the blue digit?", "no", U),
        ("Did the red digit hit the blue digit before it hit the green one?", "yes", U),
        ("Did anything hit anything?", "yes", U),
        ("Did the red digit hit or bounce?", "yes", U),
        # relations
        ("Is the red digit left of the green digit?", "yes", S),
        ("Is the red digit left of the green digit?", "no", C),
        ("Is the green digit left of the red digit?", "yes", C),
        ("Is the red digit left of the blue digit?", "yes", U),  # only for a while
        ("Is the red digit above the blue digit?", "yes", U),  # not a word of this graph
        # counts
        ("How many times does the red digit hit something?", "2", S),
        ("How many times does the red digit hit something?", "three", C),
        ("How many digits does the red digit hit?", "two", S),
        ("How many digits does the blue digit hit?", "2", C),
        ("How many digits are there?", "3", S),
        ("How many digits are there?", "4", C),
        ("How many collisions are there?", "2", S),
        ("How many times does the red digit blink?", "2", U),
        ("How many digits are there?", "many", U),
        ("How many hits or bounces are there?", "3", U),
        # directions
        ("Which direction does the red digit move?", "right", S),
        ("Which direction does the red digit move?", "left", C),
        ("Which direction does the red digit move?", "up", C),
        ("Which direction does the red digit move?", "it does not move", C),
        ("Which direction does the blue digit move?", "downwards", S),
        ("Which direction does the green digit move?", "up", S),
        ("Which direction does the green digit move at the end?", "up", S),
        ("In which direction does the red digit move at the start?", "right", S),
        ("Which direction do the red digit and the blue digit move?", "right", U),
        ("Which direction does the red digit move?", "sideways", U),
        # which
        ("Which digit does the blue digit hit?", "red digit 3", S),
        ("Which digit does the blue digit hit?", "the green one", C),
        ("Which digit bounces?", "blue digit 7", S),
        ("Which digit blinks?", "blue digit 7", U),
        # existence
        ("Which digit does the red digit hit?", "yellow digit 7", C),
        ("Which digit does the red digit hit?", "digit 9", C),
        # nothing to read off
        ("Would the red digit hit the blue digit if the green one were gone?", "yes", U),
        ("Will the red digit hit the blue digit next?", "yes", U),
        ("Why does the blue digit bounce?", "because of the wall", U),
        # claims in the answer itself
        ("Describe the video.", "The red digit hits the blue digit.", S),
        ("Describe the video.", "The green digit hits the blue digit.", C),
        ("Describe the video.", "The green digit never hits the blue digit.", U),
        ("Describe the video.", "It is lovely.", U),
        # when, how often, where, in which order
        ("Describe the video.", "The red digit hits the blue digit at 0.5 s.", S),
        ("Describe the video.", "The red digit hits the blue digit at 1.9 s.", C),
        ("Describe the video.", "The red digit hits the blue digit after 1 second.", C),
        ("Describe the video.", "The red digit hits the blue digit before 1 second.", S),
        ("Describe the video.", "The red digit hits the blue digit between 0.4 and 0.9 s.", S),
        ("Describe the video.", "The red digit hits the blue digit in the second half.", C),
        ("Describe the video.", "The red digit hits the blue digit once.", S),
        ("Describe the video.", "The red digit hits the blue digit twice.", C),
        ("Describe the video.", "The red digit hits the blue digit three times.", C),
        ("Describe the video.", "The blue digit bounces off the bottom wall.", S),
        ("Describe the video.", "The blue digit bounces off the top wall.", C),
        ("Describe the video.", "The red digit hits the green digit on the right side.", S),
        ("Describe the video.", "The red digit hits the green digit on the left side.", C),
        ("Describe the video.", "The red digit hits the blue digit first.", S),
        ("Describe the video.", "The red digit hits the green digit first.", C),
        ("Describe the video.", "The red digit hits the blue digit and then hits the green digit.", S),
        ("Describe the video.", "The red digit hits the blue digit and bounces.", C),
        (
            "Describe the video.",
            "The red digit hits the blue digit, then the blue digit hits the green digit.",
            C,
        ),
        ("Describe the video.", "The red digit hits the blue digit to win a prize.", U),
        ("Describe the video.", "The red digit moves to the right.", S),
        ("Describe the video.", "The red digit moves to the left.", C),
        ("Describe the video.", "The red digit is left of the green digit.", S),
        ("Describe the video.", "The green digit is left of the red digit.", C),
        ("Describe the video.", "The digit 7 is blue.", S),
        ("Describe the video.", "The digit 7 is red.", C),
        # the same in answers to other questions, and in the questions
        ("Did the red digit hit the blue digit?", "yes, at 0.5 s", S),
        ("Did the red digit hit the blue digit?", "yes, at 1.9 s", C),
        ("Did the red digit hit the blue digit?", "yes, twice", C),
        ("Did the red digit hit the blue digit?", "Yes, the red digit hits the yellow digit.", C),
        ("Did the red digit hit the blue digit?", "Yes, the blue digit hits the green digit.", C),
        ("Did the red digit hit the blue digit?", "yes, because it was angry", U),
        ("Did the red digit hit the blue digit at 0.5 s?", "yes", S),
        ("Did the red digit hit the blue digit at 1.9 s?", "yes", C),
        ("Did the red digit hit the green digit before 1 s?", "no", S),
        ("How many times does the red digit hit something after 1 s?", "1", S),
        ("Which digit does the red digit hit at 1.25 s?", "green digit 3", S),
        ("Which digit does the red digit hit at 0.5 s?", "green digit 3", C),
        ("Which digit does the red digit hit?", "blue digit 7 at 0.5 s", S),
        ("Which digit does the red digit hit?", "blue digit 7 at 1.9 s", C),
        # attributes
        ("What colour is the digit 7?", "blue", S),
        ("What colour is the digit 7?", "red", C),
        ("What colour is the digit 7?", "red digit 3", C),
        ("What colour is the digit 7?", "yellow", C),
        ("What colour is the digit 3?", "red", U),  # two are called so
        ("What colour is the digit 7?", "lovely", U),
        ("What colour is the digit that bounces?", "blue", S),
        ("Which number is the blue digit?", "7", S),
        ("Which number is the blue digit?", "digit 3", C),
        ("Is the digit 7 blue?", "yes", S),
        ("Is the digit 7 green?", "yes", C),
    ],
)
def test_verdicts(world, question, answer, verdict):
    candidates = [answer, "red digit 3", "blue digit 7"]
    assert judge(world, question, answer, candidates) == verdict


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [
        # how often
        ("Does the red digit hit the blue digit once?", "yes", S),
        ("Does the red digit hit the blue digit twice?", "yes", C),
        ("Does the red digit hit the blue digit three times?", "no", S),
        ("Does the blue digit bounce five times?", "yes", C),
        ("Which digit does the red digit hit once?", "green digit 3", S),
        ("Which digit does the red digit hit twice?", "green digit 3", U),  # none of the candidates
        # in which turn
        ("Does the red digit hit the blue digit first?", "yes", S),
        ("Does the red digit hit the blue digit last?", "yes", C),
        ("Does the red digit hit the green digit last?", "no", C),
        # where
        ("Does the blue digit bounce off the bottom wall?", "yes", S),
        ("Does the blue digit bounce off the left wall?", "yes", C),
        ("Does the red digit hit the green digit on the left?", "yes", C),
        ("Which digit does the red digit hit on the right?", "green digit 3", S),
        ("Which digit does the red digit hit on the left?", "green digit 3", C),
        ("How many times does the blue digit bounce off the left wall?", "1", U),
        ("Which way does the red digit on the left move?", "right", U),
        ("Is the red digit left of the green digit at the top?", "yes", U),
        # how
        ("Does the red digit hit the blue digit hard?", "yes", U),
        ("Which digit does the red digit hit gently?", "green digit 3", U),
        ("How many digits are sad?", "3", U),
        ("Which direction does the red digit dance?", "right", U),
        ("What colour is the sad digit 7?", "blue", U),
    ],
)
def test_details_of_the_question_count(world, question, answer, verdict):
    assert judge(world, question, answer, [answer, "blue digit 7"]) == verdict


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [
        ("Does the yellow digit hit the red digit?", "yes", U),
        ("Does the yellow digit hit the red digit?", "no", U),
        ("Which digit does the yellow digit hit?", "red digit 3", U),
        ("Which digit does the yellow digit hit first?", "red digit 3", U),
        ("Which way does the yellow digit move?", "right", U),
        ("Is the yellow digit left of the red digit?", "yes", U),
        ("What colour is the digit 5?", "blue", U),
        ("How many times does the yellow digit bounce?", "1", U),
        ("How many digits does the yellow digit hit?", "2", U),
        ("How many yellow digits are there?", "0", S),
        ("How many yellow digits are there?", "3", C),
        ("How many red or yellow digits are there?", "1", S),
        ("Is the digit 7 yellow?", "no", S),
        ("What does the yellow digit do?", "the red digit hits the blue digit", U),
    ],
)
def test_who_is_not_there_is_nobody_else(world, question, answer, verdict):
    assert judge(world, question, answer, [answer, "blue digit 7"]) == verdict


@pytest.mark.parametrize(
    "claim",
    [
        "the yellow digit hits the red digit",
        "the digit 7 is yellow",
        "the red digit moves right, the yellow one left",
    ],
)
def test_a_claim_about_who_is_not_there_is_false(world, claim):
    assert judge_claim(claim, world)[0] is False


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [
        ("cause", "What makes the red digit, the yellow digit and the blue digit hit?", "the green digit"),
        (
            "counterfactual",
            "Without the red digit, would the yellow, the blue and the green digit hit?",
            "yes",
        ),
        ("prediction", "Which digit will the yellow digit or the red digit hit next?", "the blue digit"),
    ],
)
def test_no_world_is_asked_about_who_is_not_there(world, kind, question, answer):
    class Unasked:
        """It has no answer to give."""

        event = "hits"

    task = Task(question, kind, "question", find_tracklets(question, world), "question")
    assert check(task, answer, [answer], world, Unasked()).verdict == U


def test_first_and_last_compare_the_candidates(world):
    question, names = (
        "Which digit does the red digit hit first?",
        ["green digit 3", "blue digit 7", "red digit 3"],
    )
    assert [judge(world, question, name, names) for name in names] == [C, S, C]
    last = question.replace("first", "last")
    assert [judge(world, last, name, names) for name in names] == [S, C, C]
    listed = "Which hits something first, the blue digit or the green digit?"
    assert [judge(world, listed, name, names[:2]) for name in names[:2]] == [C, S]


def test_a_draw_is_not_decided(world):
    both = dataclasses.replace(world, events=(Event("hits", 2, ("o1", "o2")), Event("hits", 2, ("o1", "o3"))))
    names = ["green digit 3", "blue digit 7"]
    assert {judge(both, "Which digit does the red digit hit first?", name, names) for name in names} == {U}


def test_no_candidate_fits(world):
    quiet = dataclasses.replace(world, events=())
    assert judge(quiet, "Which digit does the red digit hit?", "blue digit 7") == U


def test_directions_of_a_slanted_and_of_a_standing_track(world):
    slanted = dataclasses.replace(world, tracklets=(track("o1", "red", 3, (0.2, 0.2), (0.6, 0.5)),))
    question = "Which direction does the red digit move?"
    assert [judge(slanted, question, a) for a in ("right", "down and right", "down", "up")] == [S, S, U, C]
    assert judge(slanted, question, "down", ["down", "right"]) == C  # the better candidate is on offer
    assert judge(slanted, "Does it go, and in which direction: up or down, the red digit?", "down") == S
    standing = dataclasses.replace(world, tracklets=(track("o1", "red", 3, (0.2, 0.2), (0.21, 0.2)),))
    assert [judge(standing, question, a) for a in ("stays still", "right")] == [S, C]
    once = dataclasses.replace(world, tracklets=(world.tracklets[0].between(2, 2),))
    assert judge(once, question, "right") == U


def test_confidence():
    assert confidence(0.6, "supported", "not asked", 1.0, True) == pytest.approx(0.8)
    assert confidence(0.6, "supported", "contradicts", 1.0, True) == pytest.approx(0.8)
    assert confidence(0.6, "uncheckable", "agrees", 0.5, True) == pytest.approx(0.3)
    assert confidence(0.6, "uncheckable", "contradicts", 1.0, True) == pytest.approx(0.3)
    assert confidence(0.6, "contradicted", "agrees", 1.0, True) == pytest.approx(0.3)
    assert confidence(1.0, "supported", "agrees", 1.0, False) == pytest.approx(0.1)
    assert confidence(1.0, "uncheckable", "agrees", 1.0, True) == pytest.approx(0.5)
    assert confidence(1.0, "supported", "agrees", 1.0, True) == pytest.approx(1.0)


def test_a_false_time_in_the_shipped_clip_is_contradicted():
    graph = load_sidecar(digitworld_clip()[0]).stsg
    ask = "What happens?"
    assert judge(graph, ask, "The white digit hits the magenta digit at 0.25 s") == S
    assert judge(graph, ask, "The white digit hits the magenta digit at 1.9 s") == C


def test_perception_score(world, empty):
    assert perception_score(world, ["o1"]) == pytest.approx(0.9)
    assert perception_score(world, []) == pytest.approx(2.9 / 3)
    assert perception_score(empty, []) == 0.0


@pytest.mark.parametrize(
    ("question", "frames"),
    [
        ("Does it move in the first half of the clip?", (0, 4)),
        ("Does it move in the second half of the video?", (5, 9)),
        ("Which way does it move at the start of the clip?", (0, 9)),
        ("Which way does it move at the end of the clip?", (0, 9)),
        ("Which way does it move?", (0, 9)),
    ],
)
def test_a_part_of_the_clip_is_judged_by_its_own_graph(question, frames):
    boxes = {k: (Box(0.1 * k, 0.2, 0.1 * k + 0.1, 0.3), 1.0) for k in range(10)}
    events = tuple(Event("bounces", k, ("o1",)) for k in range(10))
    graph = STSG(
        tuple(float(k) for k in range(10)), (Tracklet("o1", "ball", (), boxes),), (), events, Vocabulary(), ""
    )
    part = part_in_question(question, graph)
    assert (part.tracklets[0].frames[0], part.tracklets[0].frames[-1]) == frames
    assert [e.t for e in part.events] == list(range(frames[0], frames[1] + 1))


@pytest.mark.parametrize(
    ("spans", "verdict"), [([], C), ([(5, 7)], U), ([(0, 79)], S), ([(0, 4), (8, 79)], U), ([(0, 40)], U)]
)
def test_a_relation_between_kept_boxes_counts(spans, verdict):
    """The graph of a long video keeps every 4th box; a relation may come or go between two of them."""
    kept = {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in range(0, 80, 4)}
    pair = Tracklet("o1", "cup", (), kept), Tracklet("o2", "jug", (), kept)
    relations = (
        Relation("o2", "above", "o1", 0, 0),
        *(Relation("o1", "above", "o2", *span) for span in spans),
    )
    words = Vocabulary(labels=("cup", "jug"), predicates=("above",))
    graph = STSG(tuple(k / 8 for k in range(80)), pair, relations, (), words, "")
    assert judge(graph, "Is the cup above the jug?", "yes") == verdict


@pytest.mark.parametrize(("part", "direction"), [("start", "right"), ("end", "up")])
def test_a_quarter_is_one_of_the_time(part, direction):
    """Of the first 64 frames every 16th box is kept, and of the last 16 all, as in the graph of a long video."""
    at = {k: (0.2 + 0.02 * k, 0.4) for k in range(20)}
    at |= {k: (0.6 - 0.01 * (k - 20), 0.4 + 0.01 * (k - 20)) for k in range(20, 60)}
    at |= {k: (0.2, 0.8 - 0.02 * (k - 60)) for k in range(60, 74)}
    at |= {k: (0.2, 0.5 + 0.015 * (k - 74)) for k in range(74, 80)}
    kept = {k: at[k] for k in [*range(0, 64, 16), *range(64, 80)]}
    boxes = {k: (Box(x - 0.1, y - 0.1, x + 0.1, y + 0.1), 1.0) for k, (x, y) in kept.items()}
    graph = STSG(
        tuple(k / 8 for k in range(80)), (Tracklet("o1", "ball", ("red",), boxes),), (), (), Vocabulary()
    )
    question = f"Which way does the red ball move at the {part} of the clip?"
    sides = ["left", "right", "up", "down"]
    assert [side for side in sides if judge(graph, question, side, sides) == S] == [direction]


@pytest.mark.parametrize(("part", "direction"), [("start", "right"), ("end", "down")])
def test_the_direction_at_the_start_and_at_the_end(part, direction):
    # 2.5 % of the frame a step over 16 frames: little within two frames, enough within a quarter of the clip.
    at = [(0.1 + 0.025 * min(k, 8), 0.1 + 0.025 * max(0, k - 8)) for k in range(16)]
    boxes = {k: (Box(x, y, x + 0.2, y + 0.2), 1.0) for k, (x, y) in enumerate(at)}
    ball = Tracklet("o1", "ball", ("red",), boxes)
    graph = STSG(tuple(k / 8 for k in range(16)), (ball,), (), (), Vocabulary(), "")
    question = f"Which way does the red ball move at the {part} of the clip?"
    sides = ["left", "right", "up", "down"]
    verdicts = {side: judge(graph, question, side, sides) for side in sides}
    assert verdicts == {side: S if side == direction else C for side in sides}
