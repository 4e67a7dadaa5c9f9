"""Eyes and readers as protocols: whatever has their methods is one, and what has not is refused."""

import json

import numpy as np
import pytest

from tests.reasoning.scripted import ScriptedLanguageModel
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import load_video
from vot_kernels.pipelines.video_qa import VideoQA
from vot_kernels.reasoning.types import ModelCall
from vot_kernels.scene_graph.graph import STSG, Box, Tracklet
from vot_kernels.scene_graph.text import ParseIssue
from vot_kernels.watching import Eyes, Reader, Sight
from vot_kernels.watching.protocols import DeferredModel, TextReader, as_reader


class Seeing(ScriptedLanguageModel):
    """A scripted model that sees the video: it has a blind twin."""

    def __init__(self, **options):
        super().__init__(**options)
        self.blind = ScriptedLanguageModel(likelihood={}, prior={"a cat": -9.0})


class OneSight:
    name, fps = "a stand-in", 4.0

    def __init__(self, **sight):
        self.sight = sight

    def see(self, clip):
        graph = self.sight.get("graph", STSG(tuple(clip.times)))
        return Sight(graph, self.name, self.sight.get("warning"))


def one_thing(clip) -> STSG:
    return STSG(tuple(clip.times), (Tracklet("o1", "thing", (), {0: (Box(0, 0, 1, 1), 1.0)}),))


@pytest.fixture(scope="module")
def clip():
    return load_video(digitworld_clip()[0], num_frames=3)


def test_what_a_reader_may_be(clip):
    model = ScriptedLanguageModel()
    assert as_reader(model).about(clip) is model
    assert as_reader(lambda prompt: "yes").about(clip).generate("?") == "yes"
    reader = TextReader(model)
    assert as_reader(reader) is reader and isinstance(reader, Reader)
    for bad in (3, None, "a model"):
        with pytest.raises(TypeError, match="LanguageModel or a function"):
            as_reader(bad)


def test_a_deferred_model_is_loaded_once_and_when_it_is_asked(clip):
    loaded = []
    reader = DeferredModel(lambda: loaded.append(1) or ScriptedLanguageModel())
    assert isinstance(reader, Reader) and not loaded
    assert reader.about(clip) is reader.about(clip) and loaded == [1]


def test_a_sight_is_plain_data():
    issue = ParseIssue(2, "unclosed", "The closing </stsg> is missing.")
    sight = Sight(STSG(()), "somebody", None, (issue,), (ModelCall("graph", "?", "<stsg>"),))
    data = json.loads(json.dumps(sight.to_dict()))
    assert (data["name"], data["parse_issues"], data["issues"][0]["kind"]) == ("somebody", 1, "unclosed")
    assert data["calls"] == [{"purpose": "graph", "prompt": "?", "output": "<stsg>"}] and sight.in_domain


def test_eyes_that_warn_end_the_answer_unless_it_is_wanted_anyway(clip):
    eyes = OneSight(warning="it is dark", graph=one_thing(clip))
    assert isinstance(eyes, Eyes)
    refused = VideoQA(eyes, ScriptedLanguageModel()).ask(clip, "What is it?", ["a cat", "a dog"]).answer
    assert "it is dark" in refused.text and refused.choice is None and refused.trace == ()
    anyway = VideoQA(eyes, ScriptedLanguageModel(likelihood={"a dog": -0.1}), anyway=True)
    guessed = anyway.ask(clip, "What is it?", ["a cat", "a dog"]).answer
    assert "a guess" in guessed.text and guessed.confidence <= 0.1


class TestAnEmptyGraph:
    """It says nothing to a model that sees the video, and is all that another one has."""

    def ask(self, clip, model):
        return VideoQA(OneSight(), model).ask(clip, "What is it?", ["a cat", "a dog"]).answer

    def test_a_model_that_sees_answers_without_it(self, clip):
        asked = []
        model = Seeing(replies={"rating": lambda prompt: asked.append(prompt) or "5"})
        answer = self.ask(clip, model)
        assert answer.choice and answer.warning is None and 0 < answer.confidence <= 0.5
        assert answer.verification == "kept"
        (check,) = answer.trace[4].output.checks
        assert (check.verdict, check.reason) == ("uncheckable", "the graph shows nothing")
        assert asked and all(
            "Objects: none" not in prompt and "What happens in the video" not in prompt for prompt in asked
        )

    def test_another_has_seen_nothing(self, clip):
        answer = self.ask(clip, ScriptedLanguageModel())
        assert "nothing in it was recognised" in answer.text and answer.choice is None


def test_the_prior_is_that_of_the_model_without_the_video(clip):
    """It is asked of the blind twin, which finds cats unlikely; so cats gain."""
    model = Seeing(likelihood={"a cat": -1.0, "a dog": -1.0})
    answer = (
        VideoQA(OneSight(graph=one_thing(clip)), model).ask(clip, "What is it?", ["a dog", "a cat"]).answer
    )
    ranking = answer.trace[3].output
    assert [c.text for c in ranking.candidates] == ["a cat", "a dog"]
    assert ranking.candidates[0].prior == -9.0 and model.blind.asked == ["score"]
    assert np.isclose(sum(c.score for c in ranking.candidates), 1)
