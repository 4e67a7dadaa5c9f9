"""Training on a user's own questions: replies, the frames and graphs that are shown, held-out videos, whole runs."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.data.questions import question_from_dict, split_questions
from vot_kernels.data.video import load_video, save_mp4
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.scene_graph import STSG, Box, Tracklet
from vot_kernels.train.perception.batches import digitworld_config
from vot_kernels.train.sft.questions import QuestionBatches, answer, question_metrics
from vot_kernels.train.sft.replies import reply_to
from vot_kernels.train.sft.run import run_on_questions
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.vlm import answers
from vot_kernels.train.vlm import model as vlm
from vot_kernels.train.vlm.conversations import encode

SHORT = SftTraining(steps=2, batch_size=2, warmup=2)
GRAPH = """<stsg>
o1=dog: 0:10,10,20,20 4:60,10,70,20
o2=man: 0:50,50,60,90
o3=cup
o1 jumps on o2 @2-4
o2 holding o3 @1-2
o1 hits o2 @3
</stsg>"""


def question(text, reply, **more):
    return question_from_dict(
        {"video": "a.mp4", "question": text, "answer": reply, "stsg": GRAPH} | more, "1"
    )


def write(path, items):
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return path


@pytest.fixture(scope="module", autouse=True)
def small():
    """A tokenizer of few episodes, and replies that end early."""
    patch = pytest.MonkeyPatch()
    patch.setattr(vlm, "_TOKENIZER_EPISODES", 6)
    patch.setattr(answers, "MAX_NEW_TOKENS", 4)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a video-language model of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    VotPerceptionModel(digitworld_config()).save_pretrained(folder / "perception")
    vlm.save_half(*vlm.build_model("nano", folder / "perception", seed=0), folder / "vlm")
    return folder / "vlm"


@pytest.fixture(scope="module")
def model(published):
    return vlm.load_vlm(published)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Questions of every kind about four videos; two of these are held out."""
    folder = tmp_path_factory.mktemp("own")
    items = []
    episodes = (generate_episode("train", n) for n in range(99))
    for n, episode in enumerate(islice((e for e in episodes if e.questions), 4)):
        save_mp4(folder / f"{n}.mp4", episode.frames(), fps=8)
        common = {"video": f"{n}.mp4", "split": "train" if n < 2 else "val"}
        asked = episode.questions[0]
        graph = {"stsg": episode.stsg.to_dict()}
        items += [
            common
            | graph
            | {"question": asked.text, "answer": asked.answer, "candidates": list(asked.candidates)},
            common | {"question": "What is it?", "answer": "a game"},
            common | {"question": "When does it begin?", "start": 0.5, "end": 1.0, "part": [0.4, 1.2]},
            common | graph | {"question": "Write the scene graph."},
        ]
    return write(folder / "q.jsonl", items)


def batches(model, file, seed=0, size=2):
    return QuestionBatches(split_questions(file)[0], {}, model[1], answer, seed, size)


# --- replies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reply", "more", "thought"),
    [
        (
            "Does the dog hit the man?",
            "yes",
            {},
            "<stsg>\no1=dog\no2=man\no1 hits o2 @3\n</stsg>\n'hits' with dog and man at 3.00 s.",
        ),
        (
            "How many times does the dog hit the man?",
            "1",
            {},
            "<stsg>\no1=dog\no2=man\no1 hits o2 @3\n</stsg>\n'hits' happens 1 times.",
        ),
        (
            "Which way does the dog move?",
            "right",
            {},
            "<stsg>\no1=dog: 0:10,10,20,20 4:60,10,70,20\n</stsg>\nIt moves +0.51 of the frame to the right and "
            "+0.00 down.",
        ),
        (
            "When does the dog hit the man?",
            None,
            {"start": 2, "end": 4},
            "<stsg>\no1=dog\no2=man\no1 jumps on o2 @2-4\no1 hits o2 @3\n</stsg>\nThe graph shows it at 2.00 s to "
            "4.00 s.",
        ),
        ("Does the dog hit the man?", "no", {}, ""),  # the graph says otherwise
        ("Why does the dog hit the man?", "it is angry", {}, ""),  # which no graph tells
        ("Does the dog hit the man?", "yes", {"stsg": None}, ""),
    ],
)
def test_the_thought_is_what_verification_rests_on(text, reply, more, thought):
    asked = question(text, reply, **more)
    assert reply_to(asked) == f"<think>{thought}</think><answer>{asked.answer}</answer>"
    assert read_reply(reply_to(asked)) == (thought, asked.answer)
    if thought:
        assert STSG.from_text(thought, asked.stsg.vocabulary, asked.stsg.frame_times_s)[1] == []


def test_a_graph_that_is_asked_for_is_the_whole_reply():
    asked = question("Write the scene graph.", None)
    assert reply_to(asked) == asked.stsg.to_text()


# --- what the model sees ------------------------------------------------------------------------------------


def test_frames_are_of_the_part_at_their_times(model, file):
    posed = {p.question.kind: p for p in map(batches(model, file).posed, range(8))}
    when, whole = posed["when"], posed["open"]
    assert len(whole.clip.frames) == model[1].num_frames == 4
    assert (when.clip.times >= 0.375).all() and (when.clip.times < 1.2).all() and whole.clip.times[-1] > 1.5
    same = load_video(file.parent / whole.question.video, num_frames=4)
    assert np.array_equal(whole.clip.frames, same.frames) and whole.seconds[0] == 0
    assert whole.seconds[-1] == same.info.duration_s


def test_the_graph_is_shown_unless_it_is_the_answer(model, file):
    for posed in map(batches(model, file).posed, range(8)):
        conversation = answer(posed, np.random.default_rng(0))
        [turn] = conversation.turns
        shown = posed.question.kind == "choice"
        assert (conversation.graph is not None) == turn.prompt.startswith("<stsg>") == shown
        ids = encode(model[1], [conversation])
        learnt = ids["labels"] >= 0
        assert model[1].tokenizer.decode(ids["labels"][learnt]) == f"{reply_to(posed.question)}<|im_end|>"


def test_relations_that_boxes_do_not_show_are_told():
    graph = question("?", "x").stsg
    prompt = answers.first_prompt(graph, "Who?")
    assert "o2 holding o3 @1-2" in prompt and prompt.endswith("</stsg>\nWho?")
    stsg = generate_episode("test", 0).stsg
    assert stsg.relations
    shown, issues = STSG.from_text(answers.first_prompt(stsg, "Who?"), stsg.vocabulary, stsg.frame_times_s)
    assert issues == [] and shown.relations == () and shown.events == stsg.events


@pytest.mark.parametrize(("frames", "told"), [(16, {0, 3, 12, 15}), (5, {0, 1, 3, 4}), (1, {0})])
def test_a_prompt_tells_a_few_boxes(frames, told):
    box = (Box(0.1, 0.2, 0.3, 0.4), 1.0)
    late = range(min(5, frames - 1), frames)
    tracklets = [
        Tracklet(id, "dog", (), dict.fromkeys(seen, box))
        for id, seen in (("o1", range(frames)), ("o2", late))
    ]
    graph = STSG(tuple(range(frames)), tuple(tracklets))
    shown, _ = STSG.from_text(answers.first_prompt(graph, "Who?"), frame_times_s=graph.frame_times_s)
    assert [set(t.frames) for t in shown.tracklets] == [told, {k for k in told if k in late} | {late[0]}]


def test_every_question_takes_its_turn(model, file):
    data = batches(model, file)
    asked = [data.posed(n).question.id for n in range(16)]
    assert (
        sorted(asked[:8]) == sorted(asked[8:]) == sorted(f"{n}" for n in range(1, 9))
        and asked[:8] != asked[8:]
    )
    assert asked == [batches(model, file).posed(n).question.id for n in range(16)]
    assert asked != [batches(model, file, seed=1).posed(n).question.id for n in range(16)]


def test_a_video_that_cannot_be_read_is_named(model, tmp_path):
    items = [
        {"video": f"{n}.mp4", "question": "?", "answer": "a", "split": s}
        for n, s in enumerate(("train", "val"))
    ]
    data = batches(model, write(tmp_path / "q.jsonl", items))
    with pytest.raises(ValueError, match=r"q.jsonl, question '1': .*0.mp4.*\.$") as raised:
        list(data.loader(0, 2))
    assert "Traceback" not in str(raised.value)


# --- runs ---------------------------------------------------------------------------------------------------


def test_metrics_of_held_out_questions(model, file, monkeypatch):
    _, held = split_questions(file)
    right = []
    monkeypatch.setattr("vot_kernels.train.sft.questions.replies", lambda m, p, asked: iter(right))
    order = [QuestionBatches(held, {}, model[1], answer, 0, 8).posed(n).question for n in range(len(held))]
    right += [reply_to(q) for q in order if q.kind != "graph"]
    found = question_metrics(*model, 99, questions=held)
    assert {name: found[name] for name in found if name != "nats"} == dict.fromkeys(
        ("format", "accuracy", "choice", "open", "when"), 1.0
    )
    assert found["nats"] > 0
    right[:] = ["<think></think><answer>0.75 s to 1 s</answer>"] * len(right)
    assert question_metrics(*model, 99, questions=held)["when"] == pytest.approx(0.5)
    assert question_metrics(*model, 99, questions=held)["choice"] == 0.0


def test_a_whole_run_resumes_and_knows_its_data(published, file, tmp_path):
    table = run_on_questions(tmp_path, published, file, SHORT, eval_clips=3)
    assert table.startswith("8 questions to train on, 8 held out.\n") and "accuracy" in table
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["command"].startswith(
        f"vot train sft {published} --data {file} --held-out 0.1 --eval-clips 3 --"
    )
    assert record["metrics"]["after"]["nats"] < record["metrics"]["before"]["nats"]
    assert (
        run_on_questions(tmp_path, published, file, SHORT, eval_clips=3) == table
    )  # it is not trained again
    other = file.with_name("other.jsonl")
    other.write_text(file.read_text().replace("a game", "a film"))
    with pytest.raises(
        ValueError, match="cannot be resumed with other settings: data was q.jsonl, now other.jsonl"
    ):
        run_on_questions(tmp_path, published, other, SHORT, eval_clips=3)


def test_without_graphs_there_is_nothing_else_to_learn_from(published, tmp_path, file):
    """A file of plain questions trains, though no batch has a graph."""
    items = [json.loads(line) for line in file.read_text().splitlines()]
    plain = [i | {"video": str(file.parent / i["video"])} for i in items if "stsg" not in i]
    own = write(tmp_path / "q.jsonl", plain)
    assert "when" in run_on_questions(tmp_path / "run", published, own, SHORT, eval_clips=4)
