"""Rewards: perfect replies of every kind score the maximum; bounds; what is worse scores less; length earns nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vot_kernels.data.digitworld import VOCABULARY
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.data.digitworld.questions import CELLS, KINDS, TIMED_KINDS
from vot_kernels.data.digitworld.traces import evidence, evidence_text, write_trace
from vot_kernels.scene_graph.text import outside_blocks
from vot_kernels.train.rewards import (
    accuracy,
    consistency,
    form,
    grounding,
    order_bonus,
    temporal,
    with_options,
)

ALL = tuple(
    with_options(r, vocabulary=VOCABULARY) for r in (accuracy, form, grounding, temporal, consistency)
)
TIMES = tuple(n / 8 for n in range(16))
HIT = "o1=red digit 3\no2=blue digit 7\no1 hits o2 @6"
PATH = "o1=red digit 3: 0:10,10,20,20 15:60,10,70,20"
PAIR = "o1=red digit 3\no2=blue digit 7"


def reply(graph, thought, answer):
    return f"<think><stsg>\n{graph}\n</stsg>\n{thought}</think><answer>{answer}</answer>"


def row(question, answer, truth=None, candidates=None, interval=None, times=TIMES):
    """The columns of one row of a dataset."""
    return {
        "question": [question],
        "answer": [answer],
        "truth": [truth and f"<stsg>\n{truth}\n</stsg>"],
        "candidates": [candidates],
        "interval": [interval],
        "frame_times_s": [times],
    }


def scores(text, columns):
    return {reward.__name__: reward([text], **columns)[0] for reward in ALL}


# A perfect reply of every kind, written by hand, and what has nothing to be compared with.
PERFECT = {
    "motion": (
        row("Which way does the red digit move?", "right", PATH, ("left", "right")),
        reply(PATH, "The red digit moves right.", "right"),
        {"temporal"},
    ),
    "did_hit": (
        row("Does the red digit hit the blue digit?", "yes", HIT, ("yes", "no")),
        reply(HIT, "The red digit hits the blue digit at 0.8 s.", "yes"),
        set(),
    ),
    "count": (
        row("How many times does the red digit hit another digit?", "1", HIT, ("0", "1", "2")),
        reply(HIT, "The red digit hits the blue digit at 0.8 s: 1.", "1"),
        set(),
    ),
    "which_first": (
        row("Which digit does the red digit hit first?", "the blue digit", HIT, ("the blue digit",)),
        reply(HIT, "The red digit hits the blue digit at 0.75 s.", "the blue digit"),
        set(),
    ),
    "causal": (
        row("Which digit makes the red digit turn at 0.8 s?", "the blue digit", HIT, ("the blue digit",)),
        reply(HIT, "The red digit hits the blue digit at 0.8 s.", "the blue digit"),
        set(),
    ),
    "counterfactual": (
        row("Would the red digit hit the blue digit without the white digit?", "no", HIT, ("yes", "no")),
        reply(HIT, "Without the white digit, the red digit would not hit the blue digit.", "no"),
        {"consistency"},
    ),
    "next": (
        row("Which digit will the red digit hit next?", "the blue digit", PAIR, ("the blue digit",)),
        reply(PAIR, "The red digit moves towards the blue digit.", "the blue digit"),
        {"temporal", "consistency"},
    ),
    "when": (
        row("When does the red digit hit the blue digit?", "0.62 s to 0.88 s", HIT, interval=(5 / 8, 7 / 8)),
        reply(HIT, "The red digit hits the blue digit at 0.75 s.", "0.62 s to 0.88 s"),
        set(),
    ),
}


@pytest.mark.parametrize("kind", PERFECT)
def test_a_perfect_reply_scores_the_maximum(kind):
    columns, text, unknown = PERFECT[kind]
    assert scores(text, columns) == {
        r.__name__: None if r.__name__ in unknown else pytest.approx(1) for r in ALL
    }


def test_there_is_a_perfect_reply_of_every_kind():
    assert set(PERFECT) == {*KINDS, *TIMED_KINDS}


@pytest.fixture(scope="module")
def traces():
    """A question of every cell, its true trace and the columns."""
    count = len(KINDS) * max(len(CELLS[kind]) for kind in KINDS)
    found = []
    for item in generate_questions("val", count):
        question, stsg = item.question, item.episode.stsg
        columns = row(
            question.text, question.answer, candidates=question.candidates, times=stsg.frame_times_s
        )
        columns["truth"] = [evidence_text(evidence(question, stsg), question)]
        found.append((question, write_trace(question, stsg), columns))
    return found


@pytest.mark.tested_on("Video-R1#74", "Video-R1#86")
def test_true_traces_score_the_maximum(traces):
    known = {kind: set() for kind in KINDS}
    for question, text, columns in traces:
        for name, value in scores(text, columns).items():
            assert value in (1.0, None), f"{name} of {text}"
            known[question.kind] |= {name} if value else set()
    always = {"accuracy", "form", "grounding"}
    assert all(always <= names for names in known.values())
    assert all("consistency" in known[kind] for kind in ("motion", "did_hit", "count", "which_first"))
    assert all("temporal" in known[kind] for kind in ("did_hit", "count", "which_first", "counterfactual"))


def test_traces_of_other_clips_score_less(traces):
    """Of each reward that is known, except that a lucky answer may be right and every trace is well-formed."""
    sums = dict.fromkeys(("accuracy", "grounding", "temporal"), (0.0, 0))
    for (question, _, columns), (other, text, _) in zip(traces, traces[len(KINDS) :], strict=False):
        if question.text == other.text:
            continue
        for name in sums:
            if (value := scores(text, columns)[name]) is not None:
                sums[name] = (sums[name][0] + value, sums[name][1] + 1)
    means = {name: total / count for name, (total, count) in sums.items()}
    assert means["grounding"] < 0.3 and means["temporal"] < 0.3 and means["accuracy"] < 0.7


# --- bounds -------------------------------------------------------------------------------------------------

PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "<stsg>", "</stsg>", "\n", "yes", "right", "The "),
    *(PATH, HIT, "o1 hits o2 @4", "o3=", "@", "red digit", "0.62 s to 0.88 s", "-", "99999999999", "é"),
)


@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=14).map("".join),
    st.sampled_from(list(PERFECT)),
)
def test_rewards_are_between_0_and_1(text, kind):
    columns, perfect, _ = PERFECT[kind]
    for whole in (text, reply(text, text, text), perfect.replace("\n", text, 1)):
        assert all(value is None or 0 <= value <= 1 for value in scores(whole, columns).values())


@given(st.integers(0, 200), st.integers(1, 40))
def test_a_damaged_reply_scores_at_most_as_much(start, length):
    columns, perfect, _ = PERFECT["did_hit"]
    damaged = perfect[:start] + perfect[start + length :]
    whole, broken = scores(perfect, columns), scores(damaged, columns)
    assert all(broken[name] is None or broken[name] <= whole[name] for name in whole)


@given(
    st.sampled_from(list(PERFECT)), st.integers(1, 40), st.sampled_from(["Well, ", "Let me think. ", "\n"])
)
def test_length_earns_nothing(kind, times, filler):
    columns, perfect, _ = PERFECT[kind]
    longer = perfect.replace("</stsg>\n", f"</stsg>\n{filler * times}")
    short = scores(perfect, columns)
    for name, value in scores(longer, columns).items():
        assert value is None or value == pytest.approx(short[name]) or value < short[name]


def test_a_batch_is_scored_row_by_row():
    texts = [text for _, text, _ in PERFECT.values()]
    columns = {name: [columns[name][0] for columns, _, _ in PERFECT.values()] for name in PERFECT["next"][0]}
    for reward in ALL:
        assert reward(texts, **columns) == [reward([text], **c)[0] for c, text, _ in PERFECT.values()]


def test_messages_are_read_as_text():
    columns, text, _ = PERFECT["did_hit"]
    for content in (text, [{"type": "text", "text": text}]):
        message = [{"role": "assistant", "content": content}]
        assert [r([message], **columns)[0] for r in ALL] == [1] * 5


# --- each of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "yes", "<answer>yes</answer>", f"So: {PERFECT['did_hit'][1]}", "<think></think>"]
)
def test_another_form_scores_nothing(text):
    assert set(scores(text, PERFECT["did_hit"][0]).values()) == {0}


def test_form_takes_off_a_tenth_per_issue():
    def of(graph):
        return form([reply(graph, "So.", "yes")], [TIMES], vocabulary=VOCABULARY)[0]

    assert of(HIT) == 1
    assert of(f"{HIT}\no1 hits o2 @99") == pytest.approx(0.9)  # no such frame
    assert of(f"{HIT}\no1 hits o2 @99\no7 hits o2 @1") == pytest.approx(0.8)  # and no such track
    assert of("\n".join(f"?{n}" for n in range(30))) == 0
    assert form(["<think>So.</think><answer>yes</answer>"]) == [0]  # no graph


def test_a_question_of_when_is_right_by_the_share_of_time():
    columns, perfect, _ = PERFECT["when"]
    said = ["0.62 s to 0.88 s", "0.62 s to 0.75 s", "0.5 s to 1.5 s", "1.25 s to 1.5 s", "soon"]
    values = [accuracy([perfect.replace(said[0], text)], **columns)[0] for text in said]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[3:] == [0, 0]
    with pytest.raises(ValueError, match="frame_times_s, got None"):
        accuracy([perfect], ["x"], [(0, 1)])


def test_nothing_is_compared_without_ground_truth():
    columns = row("Who?", None)
    values = scores(PERFECT["did_hit"][1], columns)
    assert values["accuracy"] is values["grounding"] is values["temporal"] is None


@given(st.integers(0, 29), st.integers(0, 29))
def test_grounding_falls_with_the_distance_of_boxes(a, b):
    columns = PERFECT["motion"][0]

    def at(shift):
        path = f"o1=red digit 3: 0:{10 + shift},10,{20 + shift},20 15:{60 + shift},10,{70 + shift},20"
        return grounding([reply(path, "So.", "right")], **columns)[0]

    near, far = sorted((a, b))
    assert at(near) >= at(far) and at(0) == 1 and at(10) == 0


def test_grounding_counts_what_is_missing_and_what_is_too_much():
    columns = PERFECT["did_hit"][0]

    def of(graph):
        return grounding([reply(graph, "So.", "yes")], **columns)[0]

    assert of(HIT) == 1
    assert of(HIT.replace("o1 hits o2", "o2 hits o1")) == 1  # a hit is of both
    assert of(HIT.replace("@6", "@7")) == pytest.approx(1 / 3)  # one of three eighths of a second is shared
    assert of(f"{HIT}\no1 hits o2 @12") == pytest.approx(1 / 2)
    assert of(f"{HIT}\no3=white digit 1") == pytest.approx(2 / 3)
    assert of(HIT.replace("red", "pink")) == 0 == of(PAIR)


@given(st.integers(0, 15), st.integers(0, 15))
def test_the_temporal_reward_falls_with_the_distance_in_time(a, b):
    columns = PERFECT["did_hit"][0]

    def at(frame):
        return temporal([reply(HIT.replace("@6", f"@{frame}"), "So.", "yes")], **columns, sigma_s=0.25)[0]

    near, far = sorted((a, b), key=lambda frame: abs(frame - 6))
    assert at(near) >= at(far) and at(6) == 1
    assert at(8) == pytest.approx(2.718281828**-0.5)  # one σ
    with pytest.raises(ValueError, match="sigma_s must be positive, got 0"):
        temporal(["x"], **columns, sigma_s=0)


def test_consistency_asks_for_what_follows_from_the_graph():
    columns, perfect, _ = PERFECT["did_hit"]
    no = perfect.replace("<answer>yes", "<answer>no")
    assert consistency([no], **columns, vocabulary=VOCABULARY) == [0]  # it says itself that they hit
    other = perfect.replace("@6", "@14")  # the thought names another time
    assert consistency([other], **columns, vocabulary=VOCABULARY) == [0]
    never = reply(PAIR, "The red digit never hits the blue digit.", "no")  # consistent, although wrong
    assert consistency([never], **columns, vocabulary=VOCABULARY) == [1]


def test_the_order_of_frames_earns_a_bonus_by_a_margin():
    columns = PERFECT["did_hit"][0] | {"answer": ["yes"] * 4}
    right, wrong = PERFECT["did_hit"][1], PERFECT["did_hit"][1].replace("<answer>yes", "<answer>no")
    columns = {name: values * 4 if len(values) == 1 else values for name, values in columns.items()}

    def bonus(shuffled, **options):
        return order_bonus(
            [right, right, right, wrong], **columns, shuffled_accuracy=[shuffled] * 4, **options
        )

    assert bonus(0.5) == [1, 1, 1, 0]
    assert bonus(0.75) == [0] * 4  # a tie
    assert bonus(0.7) == [0] * 4 and bonus(0.7, margin=0.04) == [1, 1, 1, 0]
    assert bonus(None) == [None] * 4
    assert bonus(0.75, group=["a", "a", "b", "b"]) == [1, 1, 0, 0]


def test_options_keep_the_name():
    assert with_options(temporal, sigma_s=1.0).__name__ == "temporal"


def test_what_stands_outside_the_graph():
    assert outside_blocks("a <stsg>b</stsg> c <stsg>d") == "a  c"
    assert outside_blocks(" a </stsg> b ") == "a  b"
    assert outside_blocks("<stsg>a<stsg>b</stsg>") == ""
