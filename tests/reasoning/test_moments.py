"""Questions of when: what they ask for, the interval in the answer, and its verification."""

import json
import re
from dataclasses import replace

import pytest

from tests.reasoning.scripted import ScriptedLanguageModel
from tests.reasoning.world import make_world
from vot_kernels.reasoning.moments import asks_when
from vot_kernels.reasoning.prompts import MAX_LINES
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.types import Switches
from vot_kernels.scene_graph import Event, Interval, Relation


def answer(world, question, candidates=None, likelihood=None, **switches):
    model = ScriptedLanguageModel(likelihood=likelihood)
    return VideoOfThought(model, Switches(**switches)).run(question, candidates, world)


@pytest.mark.parametrize(
    ("question", "when"),
    [
        ("When does the ball hit the wall?", True),
        ("At what time is the red digit left of the blue digit?", True),
        ("How many seconds into the clip does it bounce?", True),
        ("Say when exactly does the red one turn", True),
        ("In which part of the clip does it bounce?", True),
        ("At what point is the red digit above the blue one?", True),
        ("In which part of the room does the cat sit?", False),
        ("At what point of the wall does the ball bounce?", False),
        ("When the red digit hits the blue one, which way does it go?", False),
        ("What happens when two digits meet?", False),
        ("When would the red digit hit the blue one if it were faster?", False),
        ("How many times does the red digit bounce?", False),
    ],
)
def test_questions_of_when_are_recognised(question, when):
    assert asks_when(question) == when


@pytest.mark.parametrize(
    ("question", "interval"),
    [
        ("When does the red digit hit the blue digit?", (0.25, 0.75)),
        ("When do the green and the red digit collide?", (1.0, 1.5)),
        ("When does red 3 hit another digit last?", (1.0, 1.5)),
        ("When does the red digit first hit another digit?", (0.25, 0.75)),
        ("In the second half, when does the red digit hit another digit?", (1.0, 1.5)),
        ("When does the blue 7 hit the wall?", (1.25, 1.75)),
        ("When is the red digit to the left of the blue digit?", (0.0, 0.75)),
        ("When is the blue digit right of the red digit?", (0.0, 0.75)),
        ("When is the blue digit near the green digit?", (0.0, 0.25)),
        ("When does the red digit move to the right?", (0.0, 1.75)),
    ],
)
def test_the_graph_says_when(world, question, interval):
    given = answer(world, question)
    assert given.interval == Interval(*interval) and given.text == str(given.interval)
    assert given.verification == "kept" and given.trace[-1].output.checks[-1].verdict == "supported"
    assert given.trace[0].output.kind == "when"


def test_verification_corrects_the_moment_that_the_model_prefers(world):
    question, wrong = "When does the red digit hit the blue digit?", "1.00 s to 1.50 s"
    given = answer(world, question, likelihood={wrong: 0.0})
    assert given.choice_before == wrong and given.verification == "revised"
    assert given.interval == Interval(0.25, 0.75)
    unverified = answer(world, question, likelihood={wrong: 0.0}, verification=False)
    assert unverified.interval == Interval(1.0, 1.5)


def test_what_the_graph_never_shows_has_no_moment(world):
    given = answer(world, "When does the blue digit hit the green digit?")
    assert given.interval is None and given.verification == "abstained"


@pytest.mark.parametrize(
    "question",
    ["When does the yellow digit hit the red digit?", "When is the red digit left of the yellow digit?"],
)
def test_who_is_not_there_has_no_moment(world, question):
    given = answer(world, question)
    assert given.interval is None and given.verification == "abstained"


@pytest.mark.parametrize(
    "question",
    ["When does the blue digit bounce off the left wall?", "When does the blue digit bounce twice?"],
)
def test_where_and_how_often_leave_the_moment_open(world, question):
    given = answer(world, question)
    assert given.trace[-1].output.checks[-1].verdict == "uncheckable" and given.confidence <= 0.5


def test_an_unknown_object_is_not_taken_for_a_known_one(world):
    given = answer(world, "When does the ball hit the wall?")
    assert given.trace[-1].output.checks[-1].verdict == "uncheckable" and given.confidence <= 0.5


def test_candidates_may_name_times_or_none(world):
    question = "When does the red digit hit the green digit?"
    given = answer(world, question, ["0 to 1 s", "between 1 and 1.6 s"])
    assert given.choice == "between 1 and 1.6 s" and given.interval == Interval(1.0, 1.6)
    halves = answer(world, question, ["in the first half", "in the second half"])
    assert halves.choice == "in the second half" and halves.interval == Interval(0.875, 1.75)
    assert "0.88 s to 1.75 s" in halves.headline()
    words = answer(world, question, ["early", "late"])
    assert words.interval == Interval(1.0, 1.5)  # words without a time: the graph's own moment
    alone = answer(world, question, ["0 to 1.75 s"])
    assert alone.trace[-1].output.checks[-1].verdict == "uncheckable"  # the whole clip is always true


def test_the_interval_is_in_the_json_and_other_questions_have_none(world):
    given = json.loads(answer(world, "When does the red digit hit the blue digit?").to_json())
    assert given["interval"] == {"start_s": 0.25, "end_s": 0.75}
    other = json.loads(answer(world, "Which digit does the red digit hit first?").to_json())
    assert other["interval"] is None


def long_world(frames=2000):
    """Red hits blue every 2 s, and green once, at 300 s."""
    base = make_world()
    times = tuple(0.25 * k for k in range(frames))
    events = [Event("hits", k, ("o1", "o2")) for k in range(4, frames, 8)]
    events = sorted([*events, Event("hits", 1200, ("o1", "o3"))], key=lambda event: event.t)
    relations = [Relation("o1", "moves right", "o1", k, k + 3) for k in range(0, frames - 4, 8)]
    return replace(base, frame_times_s=times, events=tuple(events), relations=tuple(relations))


def test_of_a_long_video_the_model_reads_what_the_question_asks_about():
    def read(question):
        return VideoOfThought(ScriptedLanguageModel()).run(question, None, long_world()).trace[1].output.text

    for question in (
        "When does the red digit hit the green digit?",
        "Does the red digit hit the green digit?",
        "What does the red digit do at 300.0 s?",
    ):
        text = read(question)
        assert "red digit 3 hits green digit 3 at 300.0 s." in text and len(text.splitlines()) <= MAX_LINES
    near = [
        float(at) for at in re.findall(r"hits blue digit 7 at ([\d.]+) s", read("What happens at 100.0 s?"))
    ]
    assert near and all(abs(at - 100) < 60 for at in near)
    spread = [float(at) for at in re.findall(r"hits blue digit 7 at ([\d.]+) s", read("What happens?"))]
    assert min(spread) < 30 and max(spread) > 450


def test_a_needle_is_found_in_a_long_video():
    world = long_world()
    given = answer(world, "When does the red digit hit the green digit?")
    assert given.interval == Interval(299.75, 300.25)
    assert [event.time_s for event in given.evidence.events] == [300.0]
    counted = answer(world, "How many times does the red digit hit the blue digit?")
    assert counted.text == "250" and counted.verification in ("kept", "revised")
