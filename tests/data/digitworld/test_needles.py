"""Needle questions: one hit decides each, wherever it lies; drawing a long clip holds few frames."""

import re
from collections import Counter

import numpy as np
import pytest

from vot_kernels.data.digitworld import (
    NEEDLE_FORMS,
    answer_by_rules,
    generate_episode,
    interval_by_rules,
    long_clip,
    needle,
    needles,
)
from vot_kernels.data.digitworld.truth import true_stsg


@pytest.fixture(scope="module")
def clip():
    return long_clip("test", 0, 512)


@pytest.fixture(scope="module")
def asked(clip):
    return needles(clip, NEEDLE_FORMS, 24, np.random.default_rng(0))


def test_the_answers_are_those_of_the_simulation(clip, asked):
    for item in asked:
        question = item.question
        bodies = [clip.scene.colours.index(c) for c in re.findall(r"the (\w+) digit", question.text)]
        begin, end = (
            (float(n) for n in re.findall(r"[\d.]+(?= and|(?<=\d) s)", question.text)[-2:])
            if ("between" in question.text)
            else (item.time_s - 0.2, item.time_s + 0.2)
        )
        inside = [h for h in clip.motion.hits if begin <= h.time <= end and set(bodies) <= set(h.pair)]
        if question.kind == "did":
            assert question.answer == ("yes" if inside else "no")
        elif question.kind == "when":
            assert [h.time in question.interval for h in inside] == [True]
        else:
            (hit,) = inside
            (other,) = set(hit.pair) - set(bodies)
            assert (
                question.answer == f"the {clip.scene.colours[other]} digit" and len(question.candidates) >= 2
            )


def test_rules_on_the_true_graph_answer_all(clip, asked):
    graph = true_stsg(clip.scene, clip.motion)
    for item in asked:
        question = item.question
        if question.candidates:
            assert answer_by_rules(question, graph) == question.answer
        else:
            assert interval_by_rules(question.text, graph).iou(question.interval) >= 0.5


def test_they_lie_anywhere_and_answers_are_balanced(clip, asked):
    assert {item.question.kind for item in asked} == set(NEEDLE_FORMS)
    thirds = Counter(int(3 * item.time_s / clip.scene.duration) for item in asked)
    assert len(thirds) == 3 and min(thirds.values()) >= len(asked) / 8
    said = Counter(item.question.answer for item in asked if item.question.kind == "did")
    assert min(said["yes"], said["no"]) >= 4
    texts = [item.question.text for item in asked]
    assert len(set(texts)) == len(texts)


def test_a_long_clip_begins_like_its_episode(clip):
    episode = generate_episode("test", 0)
    first = [frame for frame, _ in zip(clip.frames(), range(16), strict=False)]
    np.testing.assert_array_equal(np.stack(first), episode.frames())
    assert sum(1 for _ in clip.frames()) == 512


def test_bad_requests_are_refused(clip):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        long_clip("test", 0, 1)
    with pytest.raises(ValueError, match="one of which, did, when, got 'why'"):
        needle(clip, "why", np.random.default_rng(0))
