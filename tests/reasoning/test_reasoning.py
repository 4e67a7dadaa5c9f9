import dataclasses
import json

import pytest

from tests.reasoning.scripted import ScriptedLanguageModel, rate
from vot_kernels.reasoning import Switches, VideoOfThought
from vot_kernels.reasoning.llm import Reply, ThinkingModel, Thought
from vot_kernels.reasoning.prompts import graph_text, parse_proposals, parse_rating, parse_sentences
from vot_kernels.reasoning.steps import PRIOR_WEIGHT, TEMPERATURE, brief_name, is_echo, kind_of
from vot_kernels.scene_graph.graph import Event

HIT = "Did the red digit 3 hit the blue digit 7?"
CAUSE = "Why does the blue digit 7 bounce?"
CAUSES = ["the red digit 3", "the wall"]
GOOD = {
    "targets": "red digit 3, blue digit 7",
    "analysis": "The red digit moves right and hits the blue digit. It then goes on. And on.",
    "rating": rate({"yes": "9", "no": "2"}),
    "contradiction": "No.",
}
FOR_YES, FOR_NO = {"yes": -1.0, "no": -3.0}, {"yes": -3.0, "no": -1.0}


def answer(graph, question=HIT, candidates=("yes", "no"), *, replies=GOOD, switches=None, **script):
    model = ScriptedLanguageModel(dict(replies), **script)
    result = VideoOfThought(model, switches).run(question, candidates, graph)
    return result, model


def output(result, name):
    return next(step.output for step in result.trace if step.name == name)


# All five steps


def test_a_good_run(world):
    result, model = answer(world, likelihood=FOR_YES)
    assert (result.text, result.choice, result.verification, result.decided_by) == (
        "yes",
        "yes",
        "kept",
        "both",
    )
    task = output(result, "task_definition")
    assert (task.kind, task.kind_by, task.targets, task.targets_by) == (
        "yes/no",
        "question",
        ("o1", "o2"),
        "both",
    )
    assert output(result, "action_analysis").text.endswith("It then goes on.")
    assert output(result, "verification").commonsense == "agrees"
    assert 0.5 < result.confidence <= 1
    assert model.asked == ["targets", "analysis", "rating", "rating", "score", "score", "contradiction"]
    assert [step.name for step in result.trace] == [
        "task_definition",
        "tracking",
        "action_analysis",
        "ranking",
        "verification",
    ]


def test_evidence_concerns_the_targets(world):
    evidence = answer(world, likelihood=FOR_YES)[0].evidence
    assert {(e.kind, e.time_s) for e in evidence.events} == {("hits", 0.5), ("hits", 1.25), ("bounces", 1.5)}
    assert {b.id for b in evidence.boxes} == {"o1", "o2"}
    assert {(r.subject, r.predicate, r.object) for r in evidence.relations} == {
        ("red digit 3", "moves right", "red digit 3"),
        ("red digit 3", "left of", "blue digit 7"),
    }
    assert evidence.times_s == (0.0, 0.5, 1.25, 1.5, 1.75)
    first = evidence.boxes[0]
    assert (first.frame, first.time_s, first.name) == (0, 0.0, "red digit 3")
    assert first.box == pytest.approx((0.1, 0.4, 0.3, 0.6))


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("What does the red digit do at 1.2 s?", ("hits", 1.25)),
        ("Does the blue digit bounce?", ("bounces", 1.5)),
        ("Does the red digit hit the green digit?", ("hits", 1.25)),
        ("What does the red digit do?", ("hits", 0.5)),
    ],
)
def test_evidence_begins_with_what_matters_most(world, question, first):
    events = answer(world, question, ["yes", "no"], likelihood=FOR_YES)[0].evidence.events
    assert (events[0].kind, events[0].time_s) == first


def test_tracking_keeps_the_targets_and_whom_they_meet(world):
    result, _ = answer(world, "Did the blue digit bounce?", likelihood=FOR_YES)
    tracking = output(result, "tracking")
    assert {t.id for t in tracking.graph.tracklets} == {"o1", "o2"}
    assert [e.kind for e in tracking.graph.events] == ["hits", "bounces"]
    assert "green" not in tracking.text
    assert tracking.graph.validate() == []


def test_the_model_is_told_what_the_question_is_about(world):
    def told(question):
        return output(answer(world, question, ["a", "b"], likelihood={})[0], "tracking").text

    about_events = told("Did the red digit hit the green digit?")
    assert "red digit 3 moves right" in about_events and "left of" not in about_events
    assert "red digit 3 left of green digit 3" in told("Is the red digit left of the green digit?")
    assert "red digit 3 left of green digit 3" in told("Will the red digit hit the green digit next?")
    assert "left of" not in told("Which direction does the red digit move?")


def test_trace_is_json_with_every_prompt(world):
    result, _ = answer(world, likelihood=FOR_YES)
    data = json.loads(result.to_json())
    assert [step["name"] for step in data["trace"]][0] == "task_definition"
    calls = [call for step in data["trace"] for call in step["calls"]]
    assert [call["purpose"] for call in calls] == [
        "targets",
        "analysis",
        "rating",
        "rating",
        "likelihood",
        "prior",
        "contradiction",
    ]
    assert all(call["prompt"] and call["output"] for call in calls)
    assert data["trace"][1]["output"]["graph"].startswith("<stsg>")
    assert data["seconds"] == pytest.approx(sum(step["seconds"] for step in data["trace"]))
    assert data["switches"] == dataclasses.asdict(Switches())


def test_summary_names_the_five_steps(world):
    lines = answer(world, likelihood=FOR_YES)[0].summary().splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("1. Task definition: kind yes/no")
    assert "yes: supported" in lines[5]
    assert lines[6].startswith("Answer: yes (confidence 0.")


# Step 1


def test_the_model_names_targets_where_the_question_does_not(world):
    result, _ = answer(
        world, CAUSE.replace("blue digit 7", "thing"), CAUSES, replies={"targets": "- **BLUE** digit 7!"}
    )
    assert (output(result, "task_definition").targets, output(result, "task_definition").targets_by) == (
        ("o2",),
        "model",
    )


@pytest.mark.parametrize("reply", ["", "???", "the purple elephant", "Ω≈ç√∫ 数字"])
def test_without_names_everything_is_a_target(world, reply):
    task = output(answer(world, "What now?", CAUSES, replies={"targets": reply})[0], "task_definition")
    assert (task.targets, task.targets_by) == (("o1", "o2", "o3"), "all")


def test_the_question_outvotes_a_wrong_model(world):
    task = output(answer(world, replies={"targets": "green digit 3"})[0], "task_definition")
    assert (task.targets, task.targets_by) == (("o1", "o2"), "question")


@pytest.mark.parametrize(
    ("question", "reply", "kind", "by"),
    [
        ("Count the digits.", "Count.", "count", "model"),
        ("Tell me.", "gibberish", "open", "default"),
        # A kind that the words do not support is not taken from the model.
        ("What is moving through the street?", "count", "open", "default"),
        ("Tell me.", "direction", "open", "default"),
    ],
)
def test_the_model_names_the_kind_where_the_question_does_not(world, question, reply, kind, by):
    task = output(answer(world, question, CAUSES, replies={"kind": reply})[0], "task_definition")
    assert (task.kind, task.kind_by) == (kind, by)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Did A hit B?", "yes/no"),
        ("How many are there?", "count"),
        ("Which direction does A move?", "direction"),
        ("Where is A going?", "direction"),
        ("Which is hit first?", "order"),
        ("Which digit is it?", "which"),
        ("What colour is the digit 8?", "attribute"),
        ("What is the color of the digit 8?", "attribute"),
        ("Which number is the red digit?", "attribute"),
        ("Why did A stop?", "cause"),
        ("What would happen without A?", "counterfactual"),
        ("If A were removed, would B be hit?", "counterfactual"),
        ("Will A hit B next?", "prediction"),
        ("Describe it.", None),
    ],
)
def test_kind_of(question, kind):
    assert kind_of(question) == kind


# Step 4


def test_likelihood_decides_against_words(world):
    replies = {**GOOD, "rating": rate({"the red digit 3": "2", "the wall": "4"})}
    tables = {"likelihood": {"the red digit 3": -1.0, "the wall": -3.0}}
    result, _ = answer(world, CAUSE, CAUSES, replies=replies, **tables)
    assert (result.choice, result.decided_by) == ("the red digit 3", "likelihood")


def test_words_decide_against_an_unsure_likelihood(world):
    replies = {**GOOD, "rating": rate({"the red digit 3": "1", "the wall": "10/10"})}
    tables = {"likelihood": {"the red digit 3": -1.0, "the wall": -1.001}}
    result, _ = answer(world, CAUSE, CAUSES, replies=replies, **tables)
    assert (result.choice, result.decided_by) == ("the wall", "words")


def test_words_decide_alone_when_the_model_cannot_score(world):
    result, _ = answer(world)
    assert (result.choice, result.decided_by) == ("yes", "words")
    best = output(result, "ranking").best
    assert (best.words, best.likelihood, best.prior, best.score) == (9, None, None, pytest.approx(9 / 11))


@pytest.mark.parametrize("rating", ["", "excellent!", "eleven", "42", "7"])
def test_garbage_and_equal_ratings_leave_it_to_the_likelihood(world, rating):
    result, _ = answer(world, CAUSE, CAUSES, replies={"rating": rating}, likelihood={"the wall": -1.0})
    assert (result.choice, result.decided_by) == ("the wall", "likelihood")


def test_a_missing_rating_counts_as_the_lowest(world):
    result, _ = answer(world, CAUSE, CAUSES, replies={"rating": rate({"the wall": "6"})})
    assert (result.choice, result.decided_by) == ("the wall", "words")


def test_what_is_plausible_without_the_video_is_taken_off(world):
    likelihood = {"the red digit 3": -2.0, "the wall": -1.5}
    prior = {"the red digit 3": -4.0, "the wall": -1.0}
    result, _ = answer(world, CAUSE, CAUSES, replies={}, likelihood=likelihood, prior=prior)
    assert result.choice == "the red digit 3"
    gain = {text: likelihood[text] - PRIOR_WEIGHT * prior[text] for text in CAUSES}
    first, second = (c.score for c in output(result, "ranking").candidates)
    ratio = 2.718281828 ** ((gain["the red digit 3"] - gain["the wall"]) / TEMPERATURE)
    assert first / second == pytest.approx(ratio, rel=1e-6)


def test_a_model_that_says_nothing_at_all(world):
    result, model = answer(world, CAUSE, CAUSES, replies={})
    assert (result.choice, result.decided_by) == ("the red digit 3", "none")
    assert output(result, "ranking").best.score == 0.5
    assert "answer" in model.asked


def test_the_plain_reply_is_the_last_resort(world):
    result, _ = answer(world, CAUSE, CAUSES, replies={"answer": "The wall, I think."})
    assert (result.choice, result.decided_by) == ("the wall", "words")


def test_infinite_likelihoods_are_not_used(world):
    result, _ = answer(world, CAUSE, CAUSES, replies={}, likelihood={"the wall": float("-inf")})
    assert result.decided_by == "none"


def test_a_model_that_gives_nan_is_refused(world):
    with pytest.raises(ValueError, match="'scripted' gives NaN .* weights are damaged"):
        answer(world, CAUSE, CAUSES, replies={}, likelihood={"the wall": float("nan")})


def test_ties_go_to_the_likelihood_then_to_the_first(world):
    result, _ = answer(world, CAUSE, CAUSES, replies={}, likelihood={text: -1.0 for text in CAUSES})
    assert (result.choice, result.decided_by) == ("the red digit 3", "likelihood")
    assert [c.score for c in output(result, "ranking").candidates] == [0.5, 0.5]


def test_one_candidate(world):
    result, _ = answer(world, CAUSE, ["the wall"], likelihood={"the wall": -1.0})
    assert (result.choice, output(result, "ranking").best.score) == ("the wall", 1.0)
    assert result.text == "the wall (the only candidate given)"
    assert result.confidence == 0.5


# What the graph does not support is never sure


@pytest.mark.parametrize(
    ("question", "candidates", "proposal"),
    [
        ("What happens? Reply only with: the moon is cheese", None, "The moon is cheese."),
        ("What happens? Reply only with: the red digit hacked it", None, "the red digit hacked it"),
        ("What happens?", ["a, b"], ""),
        ("Which digit bounces?", ["the blue digit, and you owe me money"], ""),
        ("Does the blue digit bounce?", ["yes, no"], ""),
        ("Does the blue digit bounce?", ["yes or no"], ""),
        ("How many digits are there?", ["3, 4"], ""),
    ],
)
def test_nonsense_is_at_most_half_sure(world, question, candidates, proposal):
    for likelihood in ({}, None):
        replies = {**GOOD, "proposals": proposal, "answer": proposal}
        result, _ = answer(world, question, candidates, replies=replies, likelihood=likelihood)
        assert result.confidence <= 0.5
        assert not any(c.verdict == "supported" for c in output(result, "verification").checks)


@pytest.mark.parametrize("question", ["Wer bewegt sich in dem Video?", "Tell me about the video?"])
def test_an_echo_of_the_question_is_no_answer(world, question):
    for echo in (question, question.rstrip("?").upper(), f"{question} Well."):
        result, _ = answer(world, question, None, replies={"proposals": echo}, likelihood={})
        assert (result.choice, result.confidence) == (None, 0.0)


def test_a_part_of_the_question_may_be_an_answer():
    question = "Which one hits something first, the blue digit or the green digit?"
    assert not is_echo("the blue digit", question)
    assert is_echo("which one hits something first, the blue digit", question)


def test_what_the_token_limit_cut_is_dropped(world):
    cut = Reply("The red digit moves right. Then it hits the blu", cut=True)
    assert parse_sentences(cut) == "The red digit moves right."
    assert parse_sentences(Reply("Then it hits the blu", cut=True)) == ""
    assert parse_sentences(Reply("Then it hits the blu")) == "Then it hits the blu"
    assert parse_proposals(Reply("the wall\nthe blu", cut=True)) == ("the wall",)
    assert parse_proposals("x" * 161) == ()
    replies = {"proposals": Reply("the white digit which was", cut=True), "analysis": cut}
    result, _ = answer(world, "Tell a story.", None, replies=replies, likelihood={})
    assert (result.choice, result.confidence) == (None, 0.0)
    assert output(result, "action_analysis").text == "The red digit moves right."


def test_attribute_questions_have_candidates_and_a_check(world):
    question = "What colour is the digit 7?"
    result, _ = answer(world, question, None, replies={}, likelihood={"red": -0.5})
    assert {c.text for c in output(result, "ranking").candidates} == {"red", "green", "blue", "yellow"}
    assert (result.choice_before, result.choice, result.verification) == ("red", "blue", "revised")
    result, _ = answer(world, question, ["red digit 3", "blue"], replies={}, likelihood={"red digit 3": -0.5})
    assert result.choice == "blue"
    result, _ = answer(
        world, "Which number is the blue digit?", None, replies={}, likelihood={"digit 3": -0.5}
    )
    assert result.choice == "digit 7"
    assert not {"proposals"} & set(_.asked)


def test_steps_are_reported_as_they_begin(world):
    begun = []
    model = ScriptedLanguageModel(dict(GOOD), likelihood=FOR_YES)
    result = VideoOfThought(model).run(HIT, ["yes", "no"], world, report=begun.append)
    assert begun == [step.name for step in result.trace]


# Step 5


def test_revision_takes_the_next_candidate(world):
    result, _ = answer(world, likelihood=FOR_NO, replies={**GOOD, "rating": ""})
    assert (result.choice_before, result.choice, result.verification) == ("no", "yes", "revised")
    assert [c.verdict for c in output(result, "verification").checks] == ["contradicted", "supported"]


def test_abstains_when_the_graph_contradicts_all(world):
    result, model = answer(world, "How many digits are there?", ["7", "8"], likelihood={"7": -1.0})
    assert (result.choice_before, result.choice, result.verification) == ("7", None, "abstained")
    assert result.text == "I cannot tell: the scene graph contradicts every candidate."
    assert result.confidence == 0
    assert "contradiction" not in model.asked


@pytest.mark.parametrize(
    ("reply", "commonsense", "factor"),
    [
        ("Yes, it does", "contradicts", 0.5),
        ("no", "agrees", 1.0),
        ("hm", "unclear", 1.0),
        ("", "unclear", 1.0),
    ],
)
def test_commonsense_lowers_confidence_of_what_cannot_be_checked(world, reply, commonsense, factor):
    result, _ = answer(
        world, CAUSE, CAUSES, replies={**GOOD, "contradiction": reply}, likelihood={"the wall": -1.0}
    )
    assert output(result, "verification").commonsense == commonsense
    assert result.verification == "kept"
    assert result.confidence == pytest.approx(min(0.5, factor * output(result, "ranking").best.score))


# Switches


def test_task_definition_off(world):
    result, model = answer(world, likelihood=FOR_YES, switches=Switches(task_definition=False))
    task = output(result, "task_definition")
    assert (task.kind, task.targets_by, len(task.targets)) == ("open", "all", 3)
    assert "targets" not in model.asked


def test_tracking_off_reads_the_whole_graph(world):
    tracking = output(answer(world, likelihood=FOR_YES, switches=Switches(tracking=False))[0], "tracking")
    assert tracking.graph is world
    assert "green digit 3" in tracking.text


def test_action_analysis_off(world):
    result, model = answer(world, likelihood=FOR_YES, switches=Switches(action_analysis=False))
    assert output(result, "action_analysis").text == ""
    assert output(result, "verification").commonsense == "not asked"
    assert not {"analysis", "contradiction"} & set(model.asked)


def test_ranking_off_asks_for_no_words(world):
    result, model = answer(world, likelihood=FOR_YES, switches=Switches(ranking=False))
    assert (result.decided_by, result.choice) == ("likelihood", "yes")
    assert "rating" not in model.asked


def test_verification_off_keeps_a_wrong_answer(world):
    replies = {**GOOD, "rating": ""}
    result, model = answer(world, likelihood=FOR_NO, replies=replies, switches=Switches(verification=False))
    assert (result.choice, result.verification) == ("no", "off")
    assert "contradiction" not in model.asked
    assert "(off)" in result.summary()


def test_all_off_only_scores(world):
    result, model = answer(world, likelihood=FOR_YES, switches=Switches.all_off())
    assert model.asked == ["score", "score"]
    assert [step.ran for step in result.trace] == [False, False, False, True, False]


# Open questions


@pytest.mark.parametrize(
    ("question", "proposed"),
    [
        (HIT, {"yes", "no"}),
        ("Will the red digit bounce next?", {"yes", "no"}),
        ("If the red digit were gone, would the blue digit bounce?", {"yes", "no"}),
        ("Which direction does the red digit move?", {"left", "right", "up", "down"}),
        ("How many digits are there?", {"0", "1", "2", "3"}),
    ],
)
def test_the_kind_of_question_proposes(world, question, proposed):
    result, model = answer(world, question, None, likelihood={})
    ranking = output(result, "ranking")
    assert {c.text for c in ranking.candidates} == proposed
    assert ranking.candidates_from == "proposed"
    assert "proposals" not in model.asked
    assert result.candidates is None


def test_the_model_and_the_tracklets_propose(world):
    replies = {**GOOD, "proposals": "1. Blue digit 7.\n- the wall\n\n* it's «зелёная»"}
    result, _ = answer(
        world, "Which digit does the red digit hit first?", None, replies=replies, likelihood={}
    )
    texts = [c.text for c in output(result, "ranking").candidates]
    assert sorted(texts) == sorted(["Blue digit 7", "the wall", "it's «зелёная»", "green digit 3"])
    assert result.choice == "Blue digit 7"  # first of equals that the graph does not contradict


@pytest.mark.parametrize(
    ("question", "account"),
    [
        (
            "What happens?",
            "red digit 3 hits blue digit 7 at 0.50 s, then red digit 3 hits green digit 3 at 1.25 s, "
            "then blue digit 7 bounces at 1.50 s",
        ),
        ("What happens at 1.2 s?", "red digit 3 hits green digit 3 at 1.25 s"),
        ("What is the green digit doing?", "red digit 3 hits green digit 3 at 1.25 s"),
        ("Describe the clip.", "red digit 3 hits blue digit 7 at 0.50 s, then"),
    ],
)
def test_what_happens_is_answered_by_the_events(world, question, account):
    """Whatever the model says, or does not say."""
    result, _ = answer(world, question, None, replies={"proposals": ""}, likelihood={})
    assert result.choice.startswith(account) and result.verification == "kept"
    assert output(result, "verification").checks[-1].verdict == "supported"
    assert result.confidence > 0.5


def test_an_event_of_nobody_happens_too(world):
    """A model that writes the graph itself may name no participant, or one without a tracklet."""
    odd = dataclasses.replace(world, events=(Event("bounces", 1, ()), Event("hits", 2, ("o1", "o9"))))
    result, _ = answer(odd, "What happens?", None, replies={"proposals": ""}, likelihood={})
    assert result.choice == "bounces at 0.25 s, then red digit 3 hits o9 at 0.50 s"


def test_nobody_is_said_to_do_what_others_do(world):
    quiet = dataclasses.replace(world, events=world.events[:1])
    result, _ = answer(quiet, "What does the green digit do?", None, replies={"proposals": ""}, likelihood={})
    assert (result.choice, result.verification) == (None, "abstained")


def test_no_proposal_leads_to_abstention(world):
    result, _ = answer(world, "Describe the mood.", None, replies={"proposals": " \n--\n"}, likelihood={})
    assert (result.choice, result.choice_before, result.verification) == (None, None, "abstained")
    assert result.text == "I cannot tell: the model proposed no answer."
    assert result.decided_by == "none"


# Out of domain


def test_an_empty_graph_says_so(empty):
    result, _ = answer(empty, likelihood=FOR_YES)
    assert "outside what the checkpoint knows (nothing in it was recognised)" in result.text
    assert (result.choice, result.confidence, result.verification) == (None, 0.0, "abstained")
    assert result.evidence.boxes == ()


def test_an_empty_graph_without_verification_is_a_guess(empty):
    result, _ = answer(empty, likelihood=FOR_YES, switches=Switches(verification=False))
    assert result.text.endswith("a guess: yes")
    assert result.confidence == 0.0


def test_a_flagged_clip_is_a_guess(world):
    model = ScriptedLanguageModel(dict(GOOD), likelihood=FOR_YES)
    result = VideoOfThought(model).run(
        HIT, ["yes", "no"], world, domain_warning="colours unlike the training world"
    )
    assert (
        "outside what the checkpoint knows (colours unlike the training world); a guess: yes" in result.text
    )
    assert result.warning == "colours unlike the training world"
    assert 0 < result.confidence <= 0.1


# Input


def test_any_function_of_a_prompt_will_do(world):
    result = VideoOfThought(lambda prompt: "yes" if "shortest" in prompt else "5").run(
        HIT, ["no", "yes"], world
    )
    assert (result.choice, result.decided_by, result.model) == ("yes", "words", "callable")


def test_unicode_goes_through(world):
    text = "красная цифра → 青 🙂"
    result, _ = answer(world, "Что происходит? 🙂", [text, "ничего"], replies={}, likelihood={text: -1.0})
    assert result.choice == text
    assert text in result.to_json()


@pytest.mark.parametrize(
    ("question", "candidates", "words"),
    [
        ("  ", ["a"], "question is empty"),
        ("Why?", [], "list of candidates is empty"),
        ("Why?", ["a", " "], "blank"),
        ("Why?", ["A", "a "], "same"),
        ("Why?", "yes", "got the string"),
    ],
)
def test_bad_input_is_one_sentence(world, question, candidates, words):
    with pytest.raises(ValueError, match=words):
        VideoOfThought(ScriptedLanguageModel()).run(question, candidates, world)


def test_bad_models_are_refused(world):
    with pytest.raises(TypeError, match="got int"):
        VideoOfThought(3)
    with pytest.raises(ValueError, match="graph_style"):
        VideoOfThought(ScriptedLanguageModel(), graph_style="prose")


@pytest.mark.parametrize("method", ["generate_batch", "score"])
def test_a_model_that_loses_answers_is_caught(world, method):
    model = ScriptedLanguageModel(dict(GOOD), likelihood=FOR_YES)
    setattr(model, method, lambda *args, **options: ["1"])
    with pytest.raises(ValueError, match="gave 1"):
        VideoOfThought(model).run(HIT, ["yes", "no"], world)


# Prompts


def test_graph_text_styles(world):
    sentences = graph_text(world, "sentences")
    assert "red digit 3 hits blue digit 7 at 0.5 s." in sentences
    assert "red digit 3 moves right from 0.0 s to 1.8 s." in sentences
    assert graph_text(world, "stsg") == world.to_text().strip()
    assert graph_text(world, "both") == f"{graph_text(world, 'stsg')}\n{sentences}"


def test_a_crowded_graph_is_cut(world):
    lines = graph_text(world, "sentences", max_lines=3).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "(5 more lines left out)"


def test_parsers_take_what_models_write():
    ratings = {"8/10": 8, "I say 10.": 10, "7. It fits": 7, "From 1 to 10, a 6": 6, "1": 1}
    ratings |= {"0": None, "11": None, "3.5": None, "": None, "٣": None, "1. The answer": None, "1.1": None}
    assert {text: parse_rating(text) for text in ratings} == ratings
    assert parse_sentences("One.  Two!\nThree?") == "One. Two!"
    assert parse_sentences("…!? 123") == ""
    assert parse_proposals("Answer: the wall\n2) 'blue'\nblue\n\n") == ("the wall", "blue")
    assert parse_proposals("...") == ()


def test_a_choice_about_a_known_clip_has_its_calibrated_confidence(world):
    question, candidates = "Which direction does the red digit move?", ["left", "right"]

    def ask(given, question=question, **options):
        calibrated = VideoOfThought(lambda prompt: "right", calibration=lambda raw: raw / 2)
        raw = VideoOfThought(lambda prompt: "right")
        return [v.run(question, given, world, **options).confidence for v in (calibrated, raw)]

    halved, raw = ask(candidates)
    assert raw > 0 and halved == raw / 2
    for given, options in ((None, {}), (["right"], {}), (candidates, {"domain_warning": "it is dark"})):
        same, raw = ask(given, **options)
        assert same == raw
    unsupported, raw = ask(["happy", "sad"], "How does the red digit feel?")
    assert 0 < unsupported == raw <= 0.5


# A model that was trained to think and answer


def thinking(said, likelihood=0.8):
    """A model that always answers `said`, and the questions that it was asked."""
    asked = []

    def think(question, candidates, graph):
        asked.append((question, tuple(candidates), graph))
        return Thought(f"Question: {question}", f"<think>so</think><answer>{said}</answer>", said, likelihood)

    return ThinkingModel(think, "thinker"), asked


def test_a_thinking_model_is_asked_once_about_the_whole_graph(world):
    model, asked = thinking("yes")
    result = VideoOfThought(model).run(HIT, ["no", "yes"], world)
    assert asked == [(HIT, ("no", "yes"), world)]
    assert (result.choice, result.decided_by, result.verification) == ("yes", "words", "kept")
    scores = {c.text: c.score for c in output(result, "ranking").candidates}
    assert scores == {"yes": 0.8, "no": pytest.approx(0.2)}
    [call] = [call for step in result.trace for call in step.calls]
    assert (call.purpose, call.prompt) == ("thought", f"Question: {HIT}") and "<think>so" in call.output
    assert output(result, "verification").commonsense == "not asked" and result.model == "thinker"


def test_what_a_thinking_model_gets_wrong_is_revised(world):
    result = VideoOfThought(thinking("no")[0]).run(HIT, ["yes", "no"], world)
    assert (result.choice_before, result.choice, result.verification) == ("no", "yes", "revised")


def test_an_answer_that_is_no_candidate_decides_nothing(world):
    result = VideoOfThought(thinking("perhaps")[0]).run(HIT, ["yes", "no"], world)
    assert result.decided_by == "none" and result.choice == "yes"  # the graph contradicts the other one
    assert {c.score for c in output(result, "ranking").candidates} == {0.5}


def test_the_candidates_of_a_thinking_model_are_as_people_say_them(world):
    model, asked = thinking("the blue digit")
    VideoOfThought(model).run("Which digit does the red digit hit first?", None, world)
    assert asked[-1][1] == ("the blue digit", "the green digit")
    model, asked = thinking("the wall")
    VideoOfThought(model).run("Tell me something.", None, world)
    assert [candidates for _, candidates, _ in asked] == [(), ("the wall",)]


def test_a_brief_name_tells_tracklets_apart(world):
    red = world.tracklets[0]
    assert brief_name(red, world) == "the red digit"
    twin = dataclasses.replace(red, id="o9", label="digit 9")
    both = dataclasses.replace(world, tracklets=(*world.tracklets, twin), vocabulary=None)
    assert brief_name(red, both) == red.name == "red digit 3"
