"""Answers about what the clip does not show are judged by a simulation of what it shows."""

import pytest

from tests.reasoning.world import make_world
from vot_kernels.data.digitworld.physics import Physics
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.reasoning.names import find_tracklets
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.steps import kind_of
from vot_kernels.reasoning.types import Task
from vot_kernels.reasoning.verification import check

S, C, U = "supported", "contradicted", "uncheckable"
GRAPH = make_world()


class Told:
    """A world in which red meets green only thanks to blue, everybody else meets anyway, and green meets blue next."""

    event = "hits"

    def meets_without(self, one, other, removed, graph):
        return None if removed == "o1" else (one, other, removed) != ("o1", "o3", "o2")

    def next_met(self, id, graph):
        return {"o3": "o2"}.get(id)


def judge(question, answer, candidates=None, graph=GRAPH, world=None):
    asked = find_tracklets(question, graph)
    task = Task(question, kind_of(question), "question", asked, "question" if asked else "all")
    return check(task, answer, candidates or [answer], graph, world)


@pytest.mark.parametrize(
    ("question", "answer", "verdict"),
    [
        ("If the blue digit were not there, would the red digit hit the green digit?", "no", S),
        ("If the blue digit were not there, would the red digit hit the green digit?", "yes", C),
        ("Would the red digit hit the green digit if the blue digit weren't there?", "Yes.", C),
        ("Without the green digit, would the red digit hit the blue digit?", "yes", S),
        ("Without the red digit, would the green digit hit the blue digit?", "yes", U),  # cannot be told
        (
            "If the blue digit were bigger, would the red digit hit the green digit?",
            "yes",
            U,
        ),  # nothing is removed
        ("Without the blue digit, would the red digit not hit the green digit?", "yes", U),
        ("Without the blue digit, would the red digit hit the green digit?", "perhaps", U),
        ("Without the blue digit, would the red digit hit the green digit?", "no, at 0.5 s", U),
        ("Without the blue digit, would the red digit bounce?", "no", U),
        ("Without the blue digit, would the red digit hit anything?", "no", U),
        ("After the clip ends, which digit will the green digit hit next?", "the blue digit", S),
        ("After the clip ends, which digit will the green digit hit next?", "the red digit", C),
        (
            "After the clip ends, which digit will the red digit hit next?",
            "the blue digit",
            U,
        ),  # cannot be told
        ("Will the green digit hit the blue digit next?", "yes", S),
        ("Will the green digit hit the blue digit next?", "no", C),
        ("Will the green digit hit the red digit next?", "yes", C),
        ("Will the green digit hit the blue digit in a year?", "yes", U),
        ("Which other digit causes the red digit to hit the green digit at 1.2 s?", "the blue digit", S),
        ("Which digit causes the red digit to change direction at 1.3 s?", "the green digit", S),
        ("Which digit causes the red digit to change direction at 0.5 s?", "the green digit", C),
        ("Which digit causes the red digit to change direction at 0.5 s?", "the blue digit", S),
        ("Which digit causes the red digit to change direction?", "the blue digit", U),  # it is hit twice
        ("Which digit causes the green digit to change direction?", "the red digit", S),
        ("Why does the red digit hit the green digit?", "because it is angry", U),
        (
            "After the clip ends, which digit will the green digit hit next?",
            "the yellow digit",
            C,
        ),  # nobody is yellow
    ],
)
def test_verdicts(question, answer, verdict):
    found = judge(question, answer, world=Told())
    assert found.verdict == verdict, found.reason


def test_a_cause_among_candidates_is_the_one_without_which_it_would_not_happen():
    question = "Which other digit causes the blue digit to hit the red digit?"
    # Without green they still meet; nobody is needed, and nobody acted on them before.
    assert judge(question, "the green digit", world=Told()).verdict == U


def test_without_a_world_nothing_of_this_is_judged():
    question = "If the blue digit were not there, would the red digit hit the green digit?"
    assert judge(question, "yes").verdict == U


def test_a_reason_says_what_was_simulated():
    question = "If the blue digit were not there, would the red digit hit the green digit?"
    reason = judge(question, "no", world=Told()).reason
    assert reason == "simulated without blue digit 7, red digit 3 misses green digit 3"


def test_digitworlds_physics_agrees_with_its_ground_truth():
    asked = generate_questions("test", 36, kinds=("causal", "counterfactual", "next"))
    verdicts = {True: [], False: []}
    for item in asked:
        q, graph = item.question, item.episode.stsg
        for candidate in q.candidates:
            found = judge(q.text, candidate, q.candidates, graph, Physics())
            verdicts[candidate == q.answer].append(found.verdict)
    assert verdicts[True].count(S) >= 34 and verdicts[False].count(C) >= len(verdicts[False]) - 2


def test_verification_takes_the_answer_that_the_simulation_supports():
    item = next(a for a in generate_questions("test", 4, kinds=("counterfactual",)) if a.question.flip)
    q, wrong = item.question, "yes" if item.question.answer == "no" else "no"

    class Sure:
        name = "sure of the fact"

        def generate(self, prompt, max_new_tokens=64):
            return wrong

        def generate_batch(self, prompts, max_new_tokens=64):
            return [wrong] * len(prompts)

        def score(self, prompt, continuations):
            return [0.0 if text == wrong else -5.0 for text in continuations]

    answers = [
        VideoOfThought(Sure(), world=world).run(q.text, q.candidates, item.episode.stsg)
        for world in (None, Physics())
    ]
    assert [answer.choice for answer in answers] == [wrong, q.answer]
    assert answers[1].verification == "revised" and answers[1].choice_before == wrong
