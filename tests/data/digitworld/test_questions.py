import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from vot_kernels.data.digitworld import KINDS, AskedEpisode, Scene, generate_episode, generate_questions
from vot_kernels.data.digitworld.question_sets import draw_questions
from vot_kernels.data.digitworld.questions import CELLS, HORIZON, direction

STEP = 2e-4  # seconds; a disc moves less than 0.01 px


class SteppedClips:
    """An independent simulation in small steps of many scenes at once, some with an object removed."""

    def __init__(self, jobs: list[tuple[Scene, int | None]], seconds: float) -> None:
        most = max(len(scene.digits) for scene, _ in jobs)
        self.there = np.zeros((len(jobs), most), bool)
        place, velocity = np.full((len(jobs), most, 2), 32.0), np.zeros((len(jobs), most, 2))
        for s, (scene, removed) in enumerate(jobs):
            n = len(scene.digits)
            place[s, :n], velocity[s, :n], self.there[s, :n] = scene.positions, scene.velocities, True
            if removed is not None:
                self.there[s, removed] = False
        radius = jobs[0][0].radius
        height, width = jobs[0][0].size
        upper = np.array([width, height]) - radius
        first, second = np.triu_indices(most, 1)
        real = self.there[:, first] & self.there[:, second]
        self.hits: list[list[tuple[float, frozenset[int]]]] = [[] for _ in jobs]
        self.bounces: list[Counter[int]] = [Counter() for _ in jobs]
        self.path = []
        steps_a_frame = round(1 / jobs[0][0].fps / STEP)
        for step in range(round(seconds / STEP) + 1):
            if step % steps_a_frame == 0:
                self.path.append(place.copy())
            now = step * STEP
            out = (place < radius) & (velocity < 0) | (place > upper) & (velocity > 0)
            out &= self.there[..., None]
            if out.any():
                velocity[out] *= -1
                for s, n, _ in zip(*np.nonzero(out), strict=True):
                    self.bounces[s][int(n)] += 1
            offset = place[:, second] - place[:, first]
            near = real & ((offset * offset).sum(-1) < 4 * radius**2)
            for s, p in zip(*np.nonzero(near), strict=True):
                a, b = int(first[p]), int(second[p])
                normal = offset[s, p] / np.linalg.norm(offset[s, p])
                approach = (velocity[s, a] - velocity[s, b]) @ normal
                if approach > 0:
                    velocity[s, a] -= approach * normal
                    velocity[s, b] += approach * normal
                    self.hits[s].append((now, frozenset((a, b))))
            place = place + velocity * STEP
        self.frames = np.stack(self.path, axis=1)  # [scenes, frames, bodies, 2]


def bodies_in(text: str, scene: Scene) -> list[int]:
    return [scene.colours.index(colour) for colour in re.findall(r"the (\w+) digit", text)]


def independent_answer(asked: AskedEpisode, facts: tuple, removed: dict[int, tuple]) -> str:
    """Answer by the text of the question and the stepped simulations (hits, bounces, path)."""
    question, scene = asked.question, asked.episode.scene
    hits, bounces, path = facts
    named, middle = bodies_in(question.text, scene), scene.duration / 2
    within = [(t, pair) for t, pair in hits if t <= scene.duration]

    def met(hits, *bodies):
        return [t for t, pair in hits if set(bodies) <= pair and t <= scene.duration]

    def name(body):
        return f"the {scene.colours[body]} digit"

    if question.kind == "motion":
        quarter = scene.num_frames // 4
        first, last = 0, scene.num_frames - 1
        if "start of" in question.text:
            last = quarter - 1
        elif "end of" in question.text:
            first = scene.num_frames - quarter
        x, y = path[last, named[0]] - path[first, named[0]]
        across = abs(x) > abs(y)
        return ("left", "right")[int(x > 0)] if across else ("up", "down")[int(y > 0)]
    if question.kind == "did_hit":
        times = met(hits, *named)
        if "half" in question.text:
            times = [t for t in times if (t < middle) == ("first half" in question.text)]
        return "yes" if times else "no"
    if question.kind == "count":
        if "wall" in question.text:
            return str(bounces[named[0]])
        return str(len(met(hits, *named)))
    if question.kind == "which_first":
        if named:
            partners = [pair - {named[0]} for _, pair in within if named[0] in pair]
            return name(*partners[0])
        return min(question.candidates, key=lambda claim: met(hits, *bodies_in(claim, scene))[0])
    if question.kind == "causal":
        if len(named) == 1:
            time = float(re.search(r"([\d.]+) s", question.text)[1])
            own = [(abs(t - time), sorted(pair - {named[0]})[0]) for t, pair in within if named[0] in pair]
            return name(min(own)[1])
        (needed,) = [b for b, other in removed.items() if not met(other[0], *named)]
        return name(needed)
    if question.kind == "counterfactual":
        return "yes" if met(removed[named[0]][0], *named[1:]) else "no"
    later = [pair for t, pair in hits if t > scene.duration and named[0] in pair]
    return name(*(later[0] - {named[0]}))


@cache
def asked(split: str, count: int, seed: int = 0) -> list[AskedEpisode]:
    return generate_questions(split, count, seed=seed)


@pytest.mark.parametrize("kinds", [tuple(k for k in KINDS if k != "next"), ("next",)])
def test_answers_agree_with_an_independent_simulation(kinds):
    items = [item for item in asked("test", 350) if item.question.kind in kinds][:180]
    jobs: list[tuple[Scene, int | None]] = [(item.episode.scene, None) for item in items]
    places: list[dict[int, int]] = []
    for item in items:
        scene, places_of_item = item.episode.scene, {}
        if item.question.kind == "counterfactual":
            bodies = bodies_in(item.question.text, scene)[:1]
        else:
            bodies = [
                bodies_in(c, scene)[0] for c in item.question.candidates if item.question.cell == "needed"
            ]
        for body in bodies:
            places_of_item[body] = len(jobs)
            jobs.append((scene, body))
        places.append(places_of_item)
    clips = SteppedClips(jobs, items[0].episode.scene.duration + (HORIZON if kinds == ("next",) else 0.0))

    def result(s):
        return clips.hits[s], clips.bounces[s], clips.frames[s]

    for s, item in enumerate(items):
        answer = independent_answer(item, result(s), {b: result(j) for b, j in places[s].items()})
        assert answer == item.question.answer, item.question


@pytest.mark.parametrize("split", ["test", "five_objects", "long", "resolution", "held_out_pairs"])
def test_every_question_is_well_formed(split):
    for item in asked(split, 350 if split == "test" else 70):
        question = item.question
        assert question.answer in question.candidates
        assert 2 <= len(question.candidates) <= 5 and len(set(question.candidates)) == len(
            question.candidates
        )
        assert question.cell in CELLS[question.kind]
        known = {f"the {colour} digit" for colour in item.episode.scene.colours}
        for text in (question.text, *question.candidates):
            assert set(re.findall(r"the \w+ digit", text)) <= known
        ids = [f"o{body + 1}" for body in bodies_in(question.text, item.episode.scene)]
        assert sorted(ids) == sorted(question.objects)


def test_kinds_answers_and_places_are_balanced():
    questions = [item.question for item in asked("test", 350)]
    assert set(Counter(q.kind for q in questions).values()) == {50}
    for kind, shares in {"motion": 4, "did_hit": 2, "counterfactual": 2}.items():
        counts = Counter(q.answer for q in questions if q.kind == kind)
        assert len(counts) == shares and max(counts.values()) - min(counts.values()) <= 3
    counts = Counter(q.cell for q in questions if q.kind == "count")
    assert set(counts) == set(CELLS["count"]) and max(counts.values()) - min(counts.values()) <= 1
    for kind in ("which_first", "causal", "next"):
        counts = Counter(q.answer for q in questions if q.kind == kind)
        assert max(counts.values()) <= 0.3 * 50
    flips = [q for q in questions if q.flip]
    assert {q.kind for q in flips} == {"counterfactual"} and abs(len(flips) - 25) <= 1
    for kind in KINDS:
        of_kind = [q for q in questions if q.kind == kind]
        for place in range(2):
            expected = sum(1 / len(q.candidates) for q in of_kind)
            at_place = sum(q.candidates.index(q.answer) == place for q in of_kind)
            assert abs(at_place - expected) <= 6


def test_counterfactual_flip_means_the_fact_is_the_other_answer():
    for item in asked("test", 350):
        if item.question.kind == "counterfactual":
            _, a, b = bodies_in(item.question.text, item.episode.scene)
            fact = "yes" if item.episode.hits[:, a, b].any() else "no"
            assert (fact != item.question.answer) == item.question.flip


def test_both_halves_of_hard_negatives_exist():
    negatives = [i for i in asked("test", 350) if i.question.cell == "whole: no"]
    busy = 0
    for item in negatives:
        a, b = bodies_in(item.question.text, item.episode.scene)
        hits = item.episode.hits.any(0)
        both = hits[a].any() and hits[b].any()
        gap = item.episode.motion.closest(a, b) - 2 * item.episode.radius
        assert both or gap < item.episode.radius
        busy += both
    assert busy > 0


def test_questions_of_episodes_are_close_to_balanced_too():
    counts = Counter(
        (q.kind, q.answer) for i in range(250) for q in generate_episode("train", i, 3).questions
    )
    for kind in ("did_hit", "counterfactual"):
        total = counts[kind, "yes"] + counts[kind, "no"]
        assert total > 40 and abs(counts[kind, "yes"] / total - 0.5) < 0.15


def test_sets_are_deterministic_and_differ_by_seed_and_start():
    one = [(i.episode.index, i.question) for i in generate_questions("val", 21)]
    assert one == [(i.episode.index, i.question) for i in generate_questions("val", 21)]
    assert one != [(i.episode.index, i.question) for i in generate_questions("val", 21, seed=1)]
    assert min(i.episode.index for i in generate_questions("val", 7, start=40)) >= 40
    assert len({index for index, _ in one}) == 21


def test_directions():
    assert [direction(*d) for d in ((2, 0.5), (-2, 0.5), (0.1, 2), (0.1, -2))] == [
        "right",
        "left",
        "down",
        "up",
    ]
    assert direction(0.3, 0.1) is None and direction(2, 1.9) is None


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        generate_questions("test", 0)
    with pytest.raises(ValueError, match="kinds must be some of motion"):
        generate_questions("test", 5, kinds=["colour"])


def test_drawn_questions_are_of_different_kinds_none_of_which_is_rare():
    counts = Counter()
    for index in range(60):
        episode = generate_episode("train", index)
        drawn = draw_questions(episode, 4, np.random.default_rng(index))
        kinds = [question.kind for question in drawn]
        assert len(kinds) == len(set(kinds)) <= 4
        assert all(question.answer in question.candidates for question in drawn)
        counts.update(kinds)
    # Each clip is asked four of seven kinds; a kind that every clip admits comes in more than four of seven clips.
    assert all(10 <= counts[kind] <= 55 for kind in KINDS), counts


def test_more_questions_of_a_kind_are_of_different_cells():
    answers = Counter()
    for index in range(60):
        drawn = draw_questions(
            generate_episode("train", index), 99, np.random.default_rng(index), of_a_kind=2
        )
        kinds = Counter(question.kind for question in drawn)
        assert max(kinds.values(), default=0) <= 2 and len({q.cell for q in drawn}) == len(drawn)
        answers.update(q.answer for q in drawn if q.kind in ("did_hit", "counterfactual"))
    assert 0.5 < answers["yes"] / answers["no"] < 2


def test_answers_have_no_favourite_place_even_in_a_small_set():
    """13 questions of counting, one of each cell: the place says as little as it can."""
    questions = [item.question for item in generate_questions("test", 13, kinds=("count",))]
    places = Counter(question.candidates.index(question.answer) for question in questions)
    assert max(places.values()) <= 5 and set(places) >= {0, 1, 2, 3}
