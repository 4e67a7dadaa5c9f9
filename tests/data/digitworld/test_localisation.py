"""Questions of when: truth from the simulation, balance, the rules, and the blind baselines."""

import re
from collections import Counter

import pytest

from vot_kernels.data.digitworld import (
    TIMED_KINDS,
    baseline_intervals,
    generate_questions,
    interval_by_rules,
    localisation_scores,
)
from vot_kernels.data.digitworld.questions import CELLS, THIRDS
from vot_kernels.data.digitworld.sidecar import load_sidecar, save_episode
from vot_kernels.scene_graph import Interval


@pytest.fixture(scope="module")
def asked():
    return generate_questions("test", 48, kinds=TIMED_KINDS)


def test_every_form_and_third_is_equally_frequent(asked):
    assert Counter(i.question.cell for i in asked) == dict.fromkeys(CELLS["when"], 4)
    for item in asked:
        middle = (item.question.interval.start_s + item.question.interval.end_s) / 2
        third = int(3 * middle / item.episode.scene.duration)
        assert item.question.cell.endswith(THIRDS[third])


def test_the_truth_is_the_simulation(asked):
    """Recomputed from the exact paths: contact of discs, contact with walls, order of boxes, sign of velocity."""
    for item in asked:
        scene, motion, question = item.episode.scene, item.episode.motion, item.question
        bodies = [scene.colours.index(colour) for colour in re.findall(r"the (\w+) digit", question.text)]
        interval, centers = question.interval, item.episode.centers
        inside = [k for k, t in enumerate(item.episode.times) if t in interval]
        form = question.cell.split(":")[0]
        if form == "hit":
            (time,) = [hit.time for hit in motion.hits if set(hit.pair) == set(bodies)]
            gap = motion.centers([time])[0][bodies]
            assert ((gap[0] - gap[1]) ** 2).sum() ** 0.5 == pytest.approx(2 * scene.radius)
            assert time in interval and interval.length_s <= 2 / scene.fps + 1e-9
        elif form == "bounce":
            (time,) = [bounce.time for bounce in motion.bounces if bounce.body in bodies]
            assert time in interval and interval.length_s <= 2 / scene.fps + 1e-9
        elif form == "place":
            axis = 0 if "left of" in question.text or "right of" in question.text else 1
            sign = 1 if "left of" in question.text or "above" in question.text else -1
            ahead = sign * (centers[:, bodies[1], axis] - centers[:, bodies[0], axis])
            assert (ahead[inside] > 0).all() and (ahead[inside] > 1.5 * scene.radius).all()
        else:
            moved = centers[inside[-1], bodies[0]] - centers[inside[0], bodies[0]]
            direction = question.text.rstrip("?").split()[-1]
            along = {"left": -moved[0], "right": moved[0], "up": -moved[1], "down": moved[1]}
            assert along[direction] > 0


def test_rules_find_the_moments_and_blind_baselines_do_not(asked):
    questions, graphs = [i.question for i in asked], [i.episode.stsg for i in asked]
    found = [interval_by_rules(q.text, graph) for q, graph in zip(questions, graphs, strict=True)]
    rules = localisation_scores(questions, found)["all"]
    assert rules["miou"] > 0.85 and rules["r50"] == 1
    train = [i.question for i in generate_questions("train", 48, kinds=TIMED_KINDS)]
    for name, answers in baseline_intervals(train, questions, graphs).items():
        blind = localisation_scores(questions, answers)["all"]
        assert blind["miou"] < 0.35 and blind["r50"] < 0.35, name


def test_no_answer_counts_as_zero(asked):
    questions = [i.question for i in asked]
    right = localisation_scores(questions, [q.interval for q in questions])
    none = localisation_scores(questions, [None] * len(questions))
    assert right["all"] == {"miou": 1, "r50": 1} and none["all"] == {"miou": 0, "r50": 0}
    with pytest.raises(ValueError, match="must have an interval"):
        localisation_scores([i.question for i in generate_questions("test", 1)], [Interval(0, 1)])
    with pytest.raises(ValueError, match="DigitWorld's wordings"):
        interval_by_rules("When does the ball fall?", asked[0].episode.stsg)


def test_a_question_of_when_survives_the_sidecar(asked, tmp_path):
    save_episode(asked[0].episode, tmp_path / "clip.mp4", [asked[0].question])
    assert load_sidecar(tmp_path / "clip.json").questions == (asked[0].question,)
