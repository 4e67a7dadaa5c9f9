"""Video-of-Thought traces: their form, and that the evidence in them decides the question."""

import re

import pytest

from vot_kernels.data.digitworld import KINDS, VOCABULARY, generate_questions
from vot_kernels.data.digitworld.traces import (
    ask,
    evidence,
    read_reply,
    summary_text,
    write_trace,
)
from vot_kernels.scene_graph import from_text


@pytest.fixture(scope="module")
def asked():
    return generate_questions("train", 8 * len(KINDS), seed=3)


def test_a_trace_is_a_thought_with_a_clean_graph_and_the_answer(asked):
    for item in asked:
        read = read_reply(write_trace(item.question, item.episode.stsg))
        assert read is not None
        thought, answer = read
        assert answer == item.question.answer
        graph, issues = from_text(thought, VOCABULARY, item.episode.stsg.frame_times_s)
        assert issues == []
        assert {t.name for t in graph.tracklets} <= {t.name for t in item.episode.stsg.tracklets}
        assert thought.endswith(".")


def test_a_trace_never_guesses_ahead(asked):
    """It says who is meant, by name and then by number, and its graph has them, events, then who else is in these."""
    after_events = 0
    for item in asked:
        question, stsg = item.question, item.episode.stsg
        trace = write_trace(question, stsg)
        who, *lines = (
            trace.removeprefix("<think>").partition("\n</stsg>")[0].replace("<stsg>\n", "").split("\n")
        )
        text = f"{question.text} {' '.join(question.candidates)}"
        ids = {t.attributes[0]: t.id for t in stsg.tracklets}
        mentioned = [ids[colour] for colour in dict.fromkeys(re.findall(r"the (\w+) digit", text))]
        if mentioned:
            assert [ids[c] for c in re.findall(r"[Tt]he (\w+) digit is o", who)] == mentioned
            assert re.findall(r"is (o\d+)", who) == mentioned
        else:
            lines = [who, *lines]
        lines = [line for line in lines if line not in ("<stsg>", "</stsg>")]
        kinds = re.fullmatch("(t*)(e*)(t*)", "".join("t" if "=" in line else "e" for line in lines))
        assert kinds
        listed = [line.partition("=")[0] for line in lines if "=" in line]
        assert listed[: len(mentioned)] == mentioned and len({*listed}) == len(listed)
        if kinds[2]:
            assert len(kinds[1]) == len(mentioned)
            after_events += bool(kinds[3])
    assert after_events


def test_evidence_is_true_and_about_the_question(asked):
    for item in asked:
        stsg, question = item.episode.stsg, item.question
        seen = evidence(question, stsg)
        assert seen.validate() == []
        assert set(question.objects) <= {t.id for t in seen.tracklets}
        assert set(seen.events) <= set(stsg.events)
        for tracklet in seen.tracklets:
            assert tracklet.boxes.items() <= stsg.tracklet(tracklet.id).boxes.items()


def test_evidence_decides_the_question(asked):
    counted = 0
    for item in asked:
        question, seen = item.question, evidence(item.question, item.episode.stsg)
        names = {t.id: f"the {t.attributes[0]} digit" for t in seen.tracklets}
        match question.kind:
            case "did_hit" if question.cell.startswith("whole"):
                answer = "yes" if seen.events else "no"
            case "count":
                answer = str(len(seen.events))
            case "which_first" if question.objects:
                answer = next(names[id] for id in seen.events[0].participants if id not in question.objects)
            case "causal" if question.cell == "turn":
                time = float(re.search(r"at ([\d.]+) s", question.text)[1])
                hit = min(seen.events, key=lambda hit: abs(seen.frame_times_s[hit.t] - time))
                answer = next(names[id] for id in hit.participants if id not in question.objects)
            case "motion":
                (box, _), *_, (last, _) = seen.tracklet(question.objects[0]).boxes.values()
                x, y = (b - a for a, b in zip(box.center, last.center, strict=True))
                size = item.episode.scene.size
                x, y = x * size[1], y * size[0]
                answer = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
            case _:
                continue
        counted += 1
        assert answer == question.answer
    assert counted > len(asked) / 3


def test_thoughts_compare_what_the_evidence_says(asked):
    compared = set()
    for item in asked:
        question, stsg = item.question, item.episode.stsg
        graph, _, thought = read_reply(write_trace(question, stsg))[0].partition("</stsg>")
        match question.kind:
            case "motion":
                edge, first, last = re.search(
                    r"Its (left edge|top) is at (\d+), then (\d+), so", thought
                ).groups()
                written = re.findall(
                    r" \d+:(\d+),(\d+),\d+,\d+", graph
                )  # as tokens of the graph, to be copied
                assert [box[edge == "top"] for box in (written[0], written[-1])] == [first, last]
                assert (int(last) > int(first)) == (question.answer in ("right", "down"))
            case "count":
                assert re.findall(r"\((\d+)\)", thought) == [str(n + 1) for n in range(int(question.answer))]
            case "causal" if question.cell == "turn":
                assert re.search(r"Nearest to [\d.]+ s, .*hits", thought) and question.answer in thought
            case "causal" | "counterfactual":
                assert re.search(r"; (before that|meanwhile), .*; without the", thought)
            case _:
                continue
        compared.add(question.kind)
    assert compared == {"motion", "count", "causal", "counterfactual"}


def test_short_thoughts_conclude_at_once(asked):
    for item in asked:
        question, stsg = item.question, item.episode.stsg
        whole, short = (write_trace(question, stsg, short=short) for short in (False, True))
        assert len(short) <= len(whole) and short.endswith(f"<answer>{question.answer}</answer>")
        assert not re.search(r"is at \d+, then|Nearest|meanwhile|before that|\(\d+\)", short)


def test_summaries_have_events_without_boxes(asked):
    stsg = asked[0].episode.stsg
    graph, issues = from_text(summary_text(stsg), VOCABULARY, stsg.frame_times_s)
    assert issues == [] and graph.events == stsg.events
    assert not any(t.boxes for t in graph.tracklets)
    assert ask("Who?", ("a", "b")) == "Question: Who?\nAnswers: a | b"
    assert ask("Who?") == "Question: Who?"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "yes",
        "<answer>yes</answer>",
        "<think>a</think>yes",
        "<think>a</think><answer>yes</answer> and more",
    ],
)
def test_other_replies_are_not_read(reply):
    assert read_reply(reply) is None
    assert read_reply(" <think> a\nb </think>\n<answer> yes </answer>\n") == ("a\nb", "yes")
