from dataclasses import replace

import numpy as np
import pytest

from vot_kernels.data.digitworld import (
    BASELINES,
    KINDS,
    accuracy_by_kind,
    answer_by_rules,
    answer_text_by_rules,
    baseline_answers,
    generate_episode,
    generate_questions,
)
from vot_kernels.data.digitworld.baselines import Majority, QuestionOnly, last_frame_only, shuffled_frames
from vot_kernels.data.digitworld.tracks import Tracks
from vot_kernels.scene_graph.graph import STSG, Box


@pytest.fixture(scope="module")
def test_set():
    items = generate_questions("test", 350)
    return [i.question for i in items], [i.episode.stsg for i in items]


@pytest.fixture(scope="module")
def train_questions():
    return [i.question for i in generate_questions("train", 700)]


def moved(stsg: STSG, pixels: float, rng: np.random.Generator) -> STSG:
    """Every box displaced by Gaussian noise."""

    def displaced(box):
        return Box(*np.clip(np.array(box) + np.tile(rng.normal(0, pixels / 64, 2), 2), 0, 1))

    tracklets = [
        replace(t, boxes={k: (displaced(box), s) for k, (box, s) in t.boxes.items()}) for t in stsg.tracklets
    ]
    return replace(stsg, tracklets=tuple(tracklets))


def test_rules_answer_from_the_true_graph(test_set):
    questions, graphs = test_set
    right = accuracy_by_kind(questions, [answer_by_rules(*pair) for pair in zip(*test_set, strict=True)])
    assert set(right) == {*KINDS, "all", "flip"}
    assert min(right.values()) >= 0.95


@pytest.mark.parametrize("split", ["five_objects", "long", "resolution"])
def test_rules_work_on_other_shapes_of_clips(split):
    items = generate_questions(split, 70)
    right = [answer_by_rules(i.question, i.episode.stsg) == i.question.answer for i in items]
    assert np.mean(right) >= 0.95


def test_rules_bear_noise_and_missing_events(test_set):
    questions, graphs = test_set
    rng = np.random.default_rng(0)
    noisy = [moved(stsg, 0.4, rng) for stsg in graphs]
    with_events = [answer_by_rules(q, s) for q, s in zip(questions, noisy, strict=True)]
    without = [answer_by_rules(q, replace(s, events=())) for q, s in zip(questions, noisy, strict=True)]
    assert accuracy_by_kind(questions, with_events)["all"] >= 0.9
    assert accuracy_by_kind(questions, without)["all"] >= 0.75


def test_rules_read_every_fourth_frame():
    """The text form gives every 4th box and all events; motion and events must survive it."""
    items = generate_questions("test", 60, kinds=["motion", "did_hit", "causal"])
    right = []
    for item in items:
        graph, issues = STSG.from_text(
            item.episode.stsg.to_text(), item.episode.stsg.vocabulary, item.episode.stsg.frame_times_s
        )
        assert not issues
        right.append(answer_by_rules(item.question, graph) == item.question.answer)
    assert np.mean(right) >= 0.9


def test_rules_always_give_a_candidate(test_set):
    questions, graphs = test_set
    empty = STSG(frame_times_s=())
    no_tracks = replace(graphs[0], tracklets=(), relations=(), events=())
    for question, stsg in zip(questions[:70], graphs, strict=False):
        for graph in (empty, no_tracks, replace(stsg, tracklets=stsg.tracklets[:1]), graphs[-1]):
            assert answer_by_rules(question, graph) in question.candidates


def test_unknown_wordings_are_refused():
    stsg = generate_episode("test", 0).stsg
    with pytest.raises(ValueError, match="know only DigitWorld's wordings"):
        answer_text_by_rules("What is the meaning of it all?", ["42"], stsg)
    with pytest.raises(ValueError, match="at least one answer"):
        answer_text_by_rules("How many times do two digits hit each other?", [], stsg)


@pytest.mark.parametrize("split", ["test", "resolution"])
def test_tracks_recover_the_box_and_the_state(split):
    for index in range(6):
        episode = generate_episode(split, index)
        tracks = Tracks(episode.stsg)
        height, width = episode.scene.size
        assert (tracks.width, tracks.height) == pytest.approx(
            (width / episode.radius, height / episode.radius)
        )
        positions, velocities = tracks.state(0)
        assert np.allclose(positions * episode.radius, episode.scene.positions, atol=1e-6)
        assert np.allclose(velocities * episode.radius, episode.scene.velocities, atol=1e-5)


def test_blind_baselines_are_near_chance(train_questions):
    """Of 40 questions of a kind, 20 points are 2.5 standard deviations; counting alone needs no order of frames."""
    asked = generate_questions("test", 40 * len(KINDS), seed=5)
    questions, graphs = [item.question for item in asked], [item.episode.stsg for item in asked]
    answers = baseline_answers(train_questions, questions, graphs)
    assert tuple(answers) == BASELINES
    answers["first"] = [q.candidates[0] for q in questions]
    expected = np.mean([1 / len(q.candidates) for q in questions])
    for name, given in answers.items():
        found = accuracy_by_kind(questions, given)
        for kind in KINDS:
            chance = np.mean([1 / len(q.candidates) for q in questions if q.kind == kind])
            if (kind, name) != ("count", "shuffled_frames"):
                assert found[kind] <= chance + 0.2, (kind, name)
        assert found["all"] <= expected + (0.12 if name == "shuffled_frames" else 0.06), name


def test_baselines_would_find_a_shortcut(train_questions):
    """The question-only model must be able to win where the questions give the answer away."""
    rigged = [
        replace(q, answer="yes" if "red" in q.text else "no") for q in train_questions if q.kind == "did_hit"
    ]
    model = QuestionOnly(rigged)
    assert np.mean([model.answer(q) == q.answer for q in rigged]) > 0.95
    biased = [replace(q, answer="no") for q in rigged]
    assert all(Majority(biased).answer(q) == "no" for q in rigged)


def test_repeating_the_fact_scores_zero_on_the_flips(test_set):
    questions, graphs = test_set
    facts = []
    for question, graph in zip(questions, graphs, strict=True):
        ids = set(question.objects[1:])
        facts.append(
            "yes" if any(e.kind == "hits" and set(e.participants) == ids for e in graph.events) else "no"
        )
    right = accuracy_by_kind(questions, facts)
    assert right["flip"] == 0.0 and abs(right["counterfactual"] - 0.5) < 0.05


def test_shuffled_and_single_frames_keep_boxes_and_lose_order():
    stsg = generate_episode("test", 3).stsg
    shuffled = shuffled_frames(stsg, np.random.default_rng(0))
    for before, after in zip(stsg.tracklets, shuffled.tracklets, strict=True):
        assert sorted(before.boxes.values()) == sorted(after.boxes.values())
        assert before.boxes != after.boxes
    single = last_frame_only(stsg)
    assert single.num_frames == 1 and single.tracklets[0].box(0) == stsg.tracklets[0].box(stsg.num_frames - 1)
    for graph in (shuffled, single):
        assert not graph.events and not graph.relations and graph.validate() == []
