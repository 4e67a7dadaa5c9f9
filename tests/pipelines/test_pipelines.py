"""From files to answers, with the bundled checkpoint and a scripted language model."""

import json
import shutil
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.reasoning.scripted import ScriptedLanguageModel
from vot_kernels.data import contact_sheet
from vot_kernels.data.digitworld.sidecar import load_sidecar
from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.data.video import load_video, save_mp4
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT, BUNDLED_READER, is_own_model
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig, VotImageProcessor
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.pipelines import asking, evaluation, localisation
from vot_kernels.pipelines.batch import answer_batch
from vot_kernels.pipelines.encode import encode_clips, encode_videos, load_encoder
from vot_kernels.pipelines.sampling import Sampling, checkpoint_fps, sample_video, wanted_fps
from vot_kernels.pipelines.video_qa import VideoQA, load_eyes, load_perception, load_video_qa
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModelError
from vot_kernels.train.encoder.run import publish
from vot_kernels.train.vlm import answers
from vot_kernels.train.vlm import model as vlm
from vot_kernels.train.vlm.answers import Asked
from vot_kernels.train.vlm.conversations import Clip
from vot_kernels.watching.perception import domain_warning
from vot_kernels.watching.protocols import VIDEO_LANGUAGE_FPS, DeferredModel


class FirstCandidate:
    """A language model without preferences: every reply is empty and every continuation equally likely."""

    name = "no opinion"

    def generate(self, prompt, *, max_new_tokens=64):
        return ""

    def generate_batch(self, prompts, *, max_new_tokens=64):
        return ["" for _ in prompts]

    def score(self, prompt, continuations):
        return [-1.0 for _ in continuations]


@pytest.fixture(scope="module")
def video_qa():
    return VideoQA(load_eyes(), FirstCandidate())


@pytest.fixture(scope="module")
def answered(video_qa):
    clip, question, candidates = digitworld_clip()
    return video_qa.ask(clip, question, candidates)


def test_the_bundled_checkpoint_sees_the_shipped_clip(answered):
    truth = load_sidecar(digitworld_clip()[0]).stsg
    seen = answered.sight.stsg
    assert answered.sight.in_domain and answered.answer.warning is None
    assert len(seen.tracklets) == len(truth.tracklets)
    for tracklet in truth.tracklets:
        (same,) = [t for t in seen.tracklets if t.attributes == tracklet.attributes]
        overlap = [box.iou(same.box(k)) for k, (box, _) in tracklet.boxes.items() if k in same.boxes]
        assert len(overlap) >= 15 and np.median(overlap) > 0.6


def test_an_answer_has_evidence_and_can_be_saved(answered, tmp_path):
    sidecar = load_sidecar(digitworld_clip()[0])
    assert answered.answer.choice == sidecar.questions[0].answer  # verification takes the hits from the graph
    lines = answered.evidence_lines()
    assert any("hits" in line for line in lines) and any("box" in line for line in lines)
    picture = answered.save_picture(tmp_path / "sheet.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(json.dumps(answered.to_dict()))
    assert data["in_domain"] and data["stsg"]["tracklets"] and len(data["trace"]) == 5


def test_a_natural_clip_is_outside_of_the_domain(video_qa):
    result = video_qa.ask(natural_clip(), "What is moving?", ["bicycles", "a train"], Sampling(num_frames=8))
    assert not result.sight.in_domain
    assert "outside what the checkpoint knows" in result.answer.text
    assert result.answer.confidence == 0.0 and result.answer.trace == ()


def test_a_foreign_clip_needs_no_language_model_and_gets_no_boxes(video_qa, tmp_path, monkeypatch):
    save_mp4(tmp_path / "grey.mp4", np.full((8, 64, 64, 3), 128, np.uint8), 8)
    loaded = []
    deferred = DeferredModel(lambda: loaded.append(1) or FirstCandidate())
    seen = VideoQA(video_qa.eyes, deferred)
    result = seen.ask(tmp_path / "grey.mp4", "What is moving?", ["a", "b"])
    assert result.answer.choice is None and result.answer.text.endswith("; no answer.") and not loaded
    drawn = []
    monkeypatch.setattr(
        contact_sheet, "save_contact_sheet", lambda path, clip, stsg, title: drawn.append(stsg)
    )
    result.save_picture(tmp_path / "sheet.png")
    anyway = VideoQA(video_qa.eyes, deferred, anyway=True)
    result = anyway.ask(tmp_path / "grey.mp4", "What is moving?", ["a", "b"])
    result.save_picture(tmp_path / "sheet.png")
    assert loaded and drawn == [None, None] and result.answer.confidence <= 0.1
    for bad in ({"question": " "}, {"question": "What?", "candidates": ["a", "a"]}):
        with pytest.raises(ValueError, match="empty|same"):
            seen.ask(tmp_path / "grey.mp4", **bad)


def test_a_truncated_video_is_answered_with_a_note(video_qa, tmp_path):
    """The index is at the front, as in most clips on the web."""
    with (
        av.open(str(digitworld_clip()[0])) as source,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "front.mp4").read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    result = video_qa.ask(tmp_path / "half.mp4", digitworld_clip()[1], digitworld_clip()[2])
    assert 2 <= len(result.clip.frames) < 16
    assert any("cut off or damaged" in note for note in result.clip.info.warnings)
    assert result.answer.text


@pytest.mark.parametrize("kind", ["noise", "grey", "stripes"])
def test_other_made_up_clips_are_outside_too(video_qa, tmp_path, kind):
    rng = np.random.default_rng(0)
    frames = {
        "noise": rng.integers(0, 255, (16, 64, 64, 3)),
        "grey": np.full((16, 64, 64, 3), 128),
        "stripes": np.tile((np.arange(64) % 8 < 4)[None, None, :, None] * 200, (16, 64, 1, 3)),
    }[kind].astype(np.uint8)
    save_mp4(tmp_path / "clip.mp4", frames, 8)
    assert not video_qa.see(tmp_path / "clip.mp4")[1].in_domain


def test_sampling_keeps_long_clips_short(tmp_path):
    save_mp4(tmp_path / "long.mp4", np.zeros((100, 16, 16, 3), np.uint8), 10)
    assert len(sample_video(tmp_path / "long.mp4", Sampling(), 8.0).times) == 32
    assert len(sample_video(tmp_path / "long.mp4", Sampling(end=2.0), 8.0).times) == 16
    assert len(sample_video(tmp_path / "long.mp4", Sampling(num_frames=5), 8.0).times) == 5
    assert len(sample_video(tmp_path / "long.mp4", Sampling(fps=10), 8.0).times) == 100


def test_the_frame_rate_of_a_checkpoint_is_known_without_loading_it(video_qa, tmp_path):
    assert checkpoint_fps() == video_qa.eyes.fps
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_text('{"model_type": "vot_perception"}')
    assert checkpoint_fps(tmp_path) == VotPerceptionConfig().fps


def test_a_decoded_clip_is_asked_about_like_its_file(video_qa, answered):
    clip, question, candidates = digitworld_clip()
    decoded = sample_video(clip, Sampling(), checkpoint_fps())
    again = video_qa.ask(decoded, question, candidates)
    assert again.clip is decoded and again.sight.stsg == answered.sight.stsg
    assert again.answer.choice == answered.answer.choice


def test_a_file_that_changed_is_seen_anew(video_qa, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(digitworld_clip()[0], path)
    first, sight = video_qa.see(path)
    assert video_qa.see(path) == (first, sight) and video_qa.see(path)[0] is first
    assert video_qa.see(path, Sampling(num_frames=4))[0] is not first
    save_mp4(path, np.zeros((4, 64, 64, 3), np.uint8), 8)
    assert len(video_qa.see(path)[0].frames) == 4


def test_encode_writes_what_the_encoder_says(tmp_path):
    clip = digitworld_clip()[0]
    save_mp4(tmp_path / "small.mp4", np.zeros((4, 40, 48, 3), np.uint8), 8)
    out = tmp_path / "out.safetensors"
    lines = encode_videos([clip, tmp_path / "small.mp4"], out)
    assert len(lines) == 2 and "1024 tokens" in lines[0]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"0": str(clip), "1": str(tmp_path / "small.mp4")}
        assert file.get_tensor("0.tokens").shape == (1024, file.get_tensor("0.pooled").shape[0])
        assert file.get_tensor("1.times_s").tolist() == [0.0, 0.125, 0.25, 0.375]
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        encode_videos([clip], tmp_path / "out.bin")


def test_damaged_weights_are_named():
    encoder, processor = load_encoder(BUNDLED_CHECKPOINT)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="The encoder gives NaN, so its weights are damaged"):
        encode_clips(encoder, processor, [load_video(digitworld_clip()[0])])
    seen = SimpleNamespace(in_domain=False, domain_distance=float("nan"), domain_threshold=1.0)
    assert domain_warning(seen) == "the checkpoint gives NaN for it, so its weights are damaged"


class TestBatch:
    @pytest.fixture
    def questions(self, tmp_path):
        clip, question, candidates = digitworld_clip()
        lines = [
            {"video": str(clip), "question": question, "candidates": candidates, "id": "a"},
            {"video": "missing.mp4", "question": "Who?"},
            {
                "video": str(clip),
                "question": "Does the white digit hit the magenta digit?",
                "candidates": ["yes", "no"],
            },
        ]
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        return path

    def test_answers_errors_and_resuming(self, video_qa, questions, tmp_path):
        out = tmp_path / "answers.jsonl"
        assert answer_batch(video_qa, questions, out) == (2, 0, 1)
        whole = out.read_text()
        rows = [json.loads(line) for line in whole.splitlines()]
        assert [row["id"] for row in rows] == ["a", "2", "3"]
        assert "missing.mp4" in rows[1]["error"]
        assert rows[2]["choice"] == "yes"
        out.write_text(whole[: whole.index("\n") + 30])  # killed while writing the second line
        assert answer_batch(video_qa, questions, out) == (1, 1, 1)
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "2", "3"]
        assert answer_batch(video_qa, questions, out) == (0, 2, 1)  # what failed is tried again
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "3", "2"]
        shutil.copy(digitworld_clip()[0], questions.parent / "missing.mp4")
        assert answer_batch(video_qa, questions, out) == (1, 2, 0)
        assert answer_batch(video_qa, questions, out) == (0, 3, 0)
        assert "error" not in out.read_text()

    def test_no_frames_but_those_of_the_part_are_shown(self, video_qa, tmp_path):
        clip, asked = str(digitworld_clip()[0]), "Does the magenta digit hit the yellow digit?"
        line = {"video": clip, "question": asked, "candidates": ["yes", "no"]}
        lines = [line, line | {"part": [0, 0.5]}, line | {"part": [1, 2]}]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        out = tmp_path / "a.jsonl"
        assert answer_batch(video_qa, tmp_path / "q.jsonl", out) == (3, 0, 0)
        whole, first, last = map(json.loads, out.read_text().splitlines())
        assert whole["choice"] == "yes" and first["choice"] == "no"
        assert max(whole["evidence"]["times_s"]) > 1
        assert max(first["evidence"]["times_s"]) <= 0.5 and min(last["evidence"]["times_s"]) >= 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "line 1: The line is not JSON"),
            ('{"video": 3, "question": "?"}', 'strings "video" and "question"'),
            ('{"video": "a", "question": "?", "candidates": []}', "non-empty list"),
            (
                '{"video": "a", "question": "?", "id": 1}\n{"video": "a", "question": "?", "id": "1"}',
                "lines 1 and 2",
            ),
        ],
    )
    def test_a_bad_file_is_refused_before_anything_is_answered(self, video_qa, tmp_path, text, message):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            answer_batch(video_qa, tmp_path / "q.jsonl", tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()

    def test_an_output_of_another_kind_is_left_alone(self, video_qa, questions, tmp_path):
        (tmp_path / "out.jsonl").write_text("hello\n")
        with pytest.raises(ValueError, match="not a JSONL of answers"):
            answer_batch(video_qa, questions, tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_text() == "hello\n"


def test_evaluation_counts_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_language_model", lambda path, device: FirstCandidate())
    monkeypatch.setattr(evaluation, "_TRAIN_QUESTIONS", 70)
    out = tmp_path / "result.json"
    result = evaluation.evaluate_digitworld(out, videos=14)
    assert json.loads(out.read_text()) == result
    assert {"vot", "direct", "rules", "rules_truth", "chance", "majority", "question_only"} <= result[
        "accuracy"
    ].keys()
    assert result["accuracy"]["rules_truth"]["all"] > result["accuracy"]["chance"]["all"]
    table = evaluation.format_table(result)
    assert "language model + VoT" in table and "counterfactual" in table
    rows = tmp_path / "result.rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:8]) + lines[8][:20])
    out.unlink()
    again = evaluation.evaluate_digitworld(out, videos=14)
    assert again["accuracy"] == result["accuracy"]
    assert len(rows.read_text().splitlines()) == 15
    with pytest.raises(ValueError, match="other settings: videos was 14, now 7; move it away"):
        evaluation.evaluate_digitworld(out, videos=7)
    whole = rows.read_text()
    for bad, message in (
        (lines[:2] + ['{"a": 1}\n'], "line 3, is not the row of"),
        (lines + lines[-1:], "line 16, is not the row of a question"),
        (["[]\n"], "its first line has no settings"),
    ):
        rows.write_text("".join(bad))
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate_digitworld(out, videos=14)
    rows.write_text(whole)


def test_questions_of_when_have_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_language_model", lambda path, device: FirstCandidate())
    monkeypatch.setattr(localisation, "_TRAIN_QUESTIONS", 24)
    result = evaluation.evaluate_digitworld(tmp_path / "result.json", videos=0, when=12)
    scores = result["localisation"]["scores"]
    assert scores["vot"]["all"]["miou"] > scores["whole_clip"]["all"]["miou"]
    assert scores["rules_truth"]["all"]["r50"] == 1
    table = evaluation.format_table(result)
    assert "mIoU / R@0.5" in table and "blind: middle third" in table and "did_hit" not in table
    rows = tmp_path / "result.when.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:7]))
    again = evaluation.evaluate_digitworld(tmp_path / "result.json", videos=0, when=12)
    assert again["localisation"]["scores"] == scores
    with pytest.raises(ValueError, match="must be videos"):
        evaluation.evaluate_digitworld(tmp_path / "result.json", videos=0)


class FirstCandidateOf(FirstCandidate, HFLanguageModel):
    """A language model that is read from a folder, with weights."""

    def __init__(self, weight):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, weight)


@pytest.mark.parametrize(("videos", "when"), [(2, 0), (0, 2)])
def test_rows_of_others_are_not_resumed(tmp_path, monkeypatch, videos, when):
    """Other weights under the same name, or other groups, give other rows."""
    eyes, weight = load_perception(), iter([1.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "load_perception", lambda path, device: eyes)
    monkeypatch.setattr(
        evaluation, "load_language_model", lambda path, device: FirstCandidateOf(next(weight))
    )
    out = tmp_path / "result.json"

    def run(*only):
        return evaluation.evaluate_digitworld(out, videos, llm="folder", when=when, only=only)

    first = run("llm")
    assert run("llm") == first  # resumed, with the seconds that it took
    settings = first["settings"] if videos else first["localisation"]["settings"]
    assert settings["checkpoint"].startswith("digitworld-nano (") and settings["llm"] != "no opinion"
    with pytest.raises(ValueError, match="other settings"):
        run("llm")
    with pytest.raises(ValueError, match="other settings"):
        run("rules")
    for file in tmp_path.iterdir():
        file.unlink()
    run("rules")
    with torch.no_grad():
        next(eyes[0].parameters()).mul_(1.001)
    with pytest.raises(ValueError, match="other settings"):
        run("rules")


@pytest.mark.tested_on("Qwen3-VL#1029", "lmms-eval#603")
def test_scores_say_what_was_looked_at(tmp_path, monkeypatch):
    """Scores differ by the frames, so a score without them cannot be compared."""
    monkeypatch.setattr(evaluation, "load_language_model", lambda path, device: FirstCandidate())
    monkeypatch.setattr(evaluation, "_TRAIN_QUESTIONS", 70)
    result = evaluation.evaluate_digitworld(tmp_path / "result.json", videos=7)
    settings = json.loads((tmp_path / "result.json").read_text())["settings"]
    assert {name: settings[name] for name in asking.LOOKED_AT} == {
        "frames": "16",
        "frame_size": "64 × 64",
        "fps": "8",
        "codec": "H.264, crf 23, yuv420p",
        "decoder": f"PyAV {av.__version__}",
    }
    table = evaluation.format_table(result)
    assert "Looked at: frames 16; frame size 64 × 64; fps 8; codec H.264" in table
    older = {**result, "settings": {"videos": 7, "seed": 0}}
    assert "Looked at" not in evaluation.format_table(older)


def test_what_a_reply_states_is_parsed_in_the_words_of_its_world():
    stsg = evaluation.generate_questions("test", 1)[0].episode.stsg
    name = stsg.tracklets[0].name

    def valid(graph):
        reply = f"<think><stsg>\n{graph}\n</stsg>\nso</think><answer>yes</answer>"
        return evaluation._states_a_graph({"reply": reply, "stsg": stsg.to_dict()})

    assert valid(f"o1={name}")
    assert not valid("o1=red horse 3") and not valid(f"o1={name}\no1 hits o2 @3") and not valid("")
    assert not evaluation._states_a_graph({"reply": f"o1={name}", "stsg": stsg.to_dict()})


def test_clips_of_another_split_are_asked_about(tmp_path):
    options = {"videos": 7, "only": ("rules",)}
    result = evaluation.evaluate_digitworld(tmp_path / "r.json", split="five_objects", **options)
    assert result["settings"]["split"] == "five_objects"
    rows = [json.loads(line) for line in (tmp_path / "r.rows.jsonl").read_text().splitlines()[1:]]
    assert all("five_objects" in row["episode"] for row in rows)
    agreement = result["scene_graph"]
    assert agreement.keys() == {"triplet_recall", "track_iou", "event_iou"}
    assert all(0.5 < value < 1 for value in agreement.values())
    assert "of the true triplets" in evaluation.format_table(result)
    for split in ("train", "tests"):
        with pytest.raises(ValueError, match=f"split must be one of val, test, .*, got '{split}'"):
            evaluation.evaluate_digitworld(tmp_path / "x.json", split=split, **options)


def test_the_reader_of_the_package_answers_with_the_thought_that_it_was_trained_to_write(tmp_path):
    clip, question, candidates = digitworld_clip()
    qa = load_video_qa(vlm="digitworld-reader")
    result = qa.ask(clip, question, candidates)
    assert result.answer.choice == "the white digit" and result.answer.decided_by == "words"
    assert result.answer.model == "digitworld-reader" and result.sight.eyes.endswith("digitworld-nano")
    [call] = [call for step in result.answer.trace for call in step.calls]
    assert call.prompt.endswith(f"Question: {question}\nAnswers: {' | '.join(candidates)}")
    thought, answer = read_reply(call.output)
    assert "o1 hits o3" in thought and answer == "the white digit"
    names = ("digitworld-reader", "digitworld-smollm2", "digitworld-nano")
    assert all(map(is_own_model, names)) and not is_own_model(tmp_path)
    assert wanted_fps(vlm="digitworld-reader") == checkpoint_fps() == 8
    (tmp_path / "config.json").write_text("{}")
    assert wanted_fps(vlm=tmp_path) == VIDEO_LANGUAGE_FPS


def test_a_thought_has_the_likelihood_of_its_answer(monkeypatch):
    model, processor = vlm.load_vlm(BUNDLED_READER)
    asked = evaluation.generate_questions("test", 1)[0]
    frames = Clip(asked.episode.frames(), asked.episode.times)
    item = Asked(frames, asked.episode.stsg, asked.question.text, asked.question.candidates)
    thought = answers.think(model, processor, item)
    assert thought.reply == next(answers.replies(model, processor, [item]))
    assert thought.answer == read_reply(thought.reply)[1] and 0 < thought.likelihood <= 1
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # less sure of the same order of words
    doubting = answers.think(model, processor, item)
    assert doubting.likelihood < thought.likelihood
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 10**6)
    with pytest.raises(
        LanguageModelError, match=r"take \d+ tokens; with 1000000 of a reply the model allows"
    ):
        answers.think(model, processor, item)


def test_our_vlm_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_TRAIN_QUESTIONS", 70)
    monkeypatch.setattr(vlm, "_TOKENIZER_EPISODES", 6)
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    vlm.save_half(*vlm.build_model("nano", BUNDLED_CHECKPOINT, seed=0), tmp_path / "vlm")
    right, wrong = "<think>so</think><answer>{}</answer>", "<think>so</think><answer>no such</answer>"
    said = iter([right, right, "{}", right, wrong, wrong])  # about the seen and the true graph in turn
    asked = evaluation.generate_questions("test", 3)

    def scripted(model, processor, items):
        item = next(a for a in asked if a.question.text == items[0].question)
        seen, true = (one.graph for one in items)
        assert len(items[0].clip.frames) == 16 and seen.tracklets and true == item.episode.stsg
        yield from (next(said).format(item.question.answer) for _ in items)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "replies", scripted)
        options = {"vlm": tmp_path / "vlm", "only": ("vlm", "rules")}
        result = evaluation.evaluate_digitworld(tmp_path / "scripted.json", videos=3, **options)
    assert result["accuracy"]["vlm"]["all"] == pytest.approx(1 / 3)
    assert result["accuracy"]["vlm_truth"]["all"] == result["vlm_format"] == pytest.approx(2 / 3)
    assert result["vlm_parse_valid"] == 0  # a thought that states no graph
    assert result["settings"]["vlm"].startswith("vlm (") and "llm" not in result["settings"]
    table = evaluation.format_table(result)
    assert "our VLM" in table and "Of our VLM's replies 67 per cent" in table and "Verification" not in table
    assert result["accuracy"].keys() == {"vlm", "vlm_truth", "vlm_verified", "rules", "rules_truth"}
    # The seen graph contradicts what was wrong, and misleads nobody but as it misleads the rules.
    assert result["accuracy"]["vlm_verified"]["all"] == result["accuracy"]["rules"]["all"] > 1 / 3
    with pytest.raises(ValueError, match="only must be some of vlm, llm, rules, blind, got eyes"):
        evaluation.evaluate_digitworld(tmp_path / "x.json", videos=2, only=("eyes",))
    with pytest.raises(ValueError, match="its folder is not given"):
        evaluation.evaluate_digitworld(tmp_path / "x.json", videos=2, only=("vlm",))
    result = evaluation.evaluate_digitworld(tmp_path / "real.json", videos=2, **options)
    assert 0 <= result["accuracy"]["vlm"]["all"] <= 1 and result["seconds_per_question"].keys() == {"vlm"}


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_perception(tmp_path)
    assert sum(f.stat().st_size for f in BUNDLED_CHECKPOINT.iterdir()) <= 6_000_000


@pytest.fixture(scope="module")
def encoder_checkpoint(tmp_path_factory):
    """What `vot train encoder` writes."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run") / "model"
    encoder = VotEncoder(VotEncoderConfig.preset("nano"))
    publish(encoder, folder, {})
    return folder, encoder.eval()


def test_encode_takes_what_train_encoder_writes(encoder_checkpoint, tmp_path):
    folder, encoder = encoder_checkpoint
    encode_videos([digitworld_clip()[0]], tmp_path / "out.safetensors", folder)
    clip = sample_video(digitworld_clip()[0], Sampling())
    inputs = VotImageProcessor.from_pretrained(folder)([clip.frames], fps=[8.0])
    with torch.no_grad():
        wanted = encoder(**inputs).pooler_output[0]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert torch.cosine_similarity(file.get_tensor("0.pooled"), wanted, dim=0) > 0.99999


def test_a_checkpoint_of_another_kind_is_refused(encoder_checkpoint, tmp_path):
    folder, _ = encoder_checkpoint
    with pytest.raises(
        ValueError, match="must be a perception checkpoint, .* says that it is an encoder checkpoint"
    ):
        load_perception(folder)
    with pytest.raises(ValueError, match="must hold a vot_encoder, but it holds a vot_perception"):
        VotEncoder.from_pretrained(BUNDLED_CHECKPOINT)
    llama = tmp_path / "llama"
    shutil.copytree(folder, llama)
    (llama / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match="must be an encoder checkpoint or a perception .* of the type 'llama'"
    ):
        encode_videos([digitworld_clip()[0]], tmp_path / "out.safetensors", llama)
    (llama / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        encode_videos([digitworld_clip()[0]], tmp_path / "out.safetensors", llama)


@pytest.mark.parametrize("change", ["lacks", "has too many", "has in another shape", "cannot be loaded"])
def test_weights_that_do_not_fit_are_refused_in_a_sentence(change, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED_CHECKPOINT, folder)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.norm.weight"
    if change == "lacks":
        del weights[name]
    elif change == "has too many":
        weights["encoder.surplus"] = torch.zeros(3)
        name = "encoder.surplus"
    elif change == "has in another shape":
        weights[name] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "cannot be loaded":
        (folder / "model.safetensors").write_bytes(b"\x08")
        name = ""
    with pytest.raises(ValueError, match=f"{change}.*{name}") as caught:
        load_perception(folder)
    assert "\n" not in str(caught.value)


def test_verification_corrects_a_model_that_is_wrong(video_qa):
    clip, question, candidates = digitworld_clip()
    truth = load_sidecar(clip).questions[0].answer
    wrong = next(c for c in candidates if c != truth)
    llm = ScriptedLanguageModel(likelihood={wrong: -0.1})
    answer = VideoQA(video_qa.eyes, llm).ask(clip, question, candidates).answer
    assert (answer.choice_before, answer.choice, answer.verification) == (wrong, truth, "revised")
