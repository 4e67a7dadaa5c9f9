"""`vot ask --vlm` from end to end, on tiny random models of every family."""

import json
import sys

import pytest

from tests.models.vot.tiny import tiny_model, tiny_processor
from tests.watching.families import FAMILIES
from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.watching import video_language, written

QUESTION = "What is moving through the street?"


@pytest.fixture
def vot(monkeypatch, capfd):
    """Runs the command in this process; returns its exit code, stdout and stderr."""
    from vot_kernels import cli

    monkeypatch.setattr(written, "WRITTEN_TOKENS", 24)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", *map(str, words)])
        capfd.readouterr()  # what making a model's folder wrote
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_command(vot, folder_of, family, tmp_path, monkeypatch):
    watched = []
    init = video_language.ClipLanguageModel.__init__

    def watching(self, whole, clip):
        init(self, whole, clip)
        watched.append((clip, self))

    monkeypatch.setattr(video_language.ClipLanguageModel, "__init__", watching)
    trace, picture = tmp_path / "trace.json", tmp_path / "sheet.png"
    code, out, err = vot(
        *("ask", natural_clip(), QUESTION, "--candidates", "bicycles|a train", "--vlm", folder_of(family)),
        *("--num-frames", 6, "--start", 1, "--end", 7, "--json", "--trace", trace, "--picture", picture),
    )
    assert code == 0, err
    answer = json.loads(out)
    ((clip, model),) = watched  # one clip, looked at by one model for everything
    assert clip.times.tolist() == pytest.approx([1.5, 2.5, 3.5, 4.5, 5.5, 6.5], abs=0.041)
    assert "6 frames, at " + ", ".join(f"{t:.2f}" for t in clip.times) in model.tokenizer.decode(model._head)
    assert answer["model"] == family and [step["ran"] for step in answer["trace"]] == [True] * 5
    assert (
        answer["warning"] is None
        and answer["in_domain"]
        and answer["choice"] in ("bicycles", "a train", None)
    )
    assert answer["eyes"]["name"] == f"the video-language model {family}, which wrote the graph"
    assert answer["eyes"]["parse_issues"] == len(answer["eyes"]["issues"])
    (call,) = answer["eyes"]["calls"]
    assert call["purpose"] == "graph" and "from 0 to 5" in call["prompt"]
    assert answer["stsg"]["frame_times_s"] == clip.times.tolist()
    assert json.loads(trace.read_text())["trace"] == answer["trace"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    likelihoods = [c["likelihood"] for c in answer["trace"][3]["output"]["candidates"]]
    assert len(likelihoods) == 2 and all(value < 0 for value in likelihoods)


@pytest.mark.parametrize("clip", [digitworld_clip()[0], natural_clip()], ids=["digits", "street"])
def test_our_own_model_is_one_of_them(vot, clip, tmp_path):
    tiny_model().save_pretrained(tmp_path / "ours")
    tiny_processor().save_pretrained(tmp_path / "ours")
    words = ["ask", clip, QUESTION, "--candidates", "bicycles|a train", "--num-frames", 2]
    words += ["--vlm", tmp_path / "ours", "--json"]
    code, out, err = vot(*words)
    assert code == 0, err
    assert json.loads(out)["verification"] == "abstained"  # two frames a second apart are none of DigitWorld
    code, out, err = vot(*words, "--anyway")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["model"] == "ours" and [step["ran"] for step in answer["trace"]] == [True] * 5
    assert answer["eyes"]["name"] == f"the perception checkpoint {BUNDLED_CHECKPOINT.name}"
    assert len(answer["stsg"]["frame_times_s"]) == 2


def test_a_graph_that_the_model_writes_is_evidence(vot, folder_of, monkeypatch):
    """Its reply is read, completed by relations, and grounds the answer; what could not be read is counted."""
    reply = (
        "Sure!\n<stsg>\no1=red bicycle: 0:10,40,20,60 5:70,40,80,60\no2=man: 0:1,1\no1 moves up @9\n</stsg>"
    )
    real = video_language.ClipLanguageModel.generate
    monkeypatch.setattr(
        video_language.ClipLanguageModel,
        "generate",
        lambda self, prompt, **options: reply if "<stsg>" in prompt else real(self, prompt, **options),
    )
    asked = ("ask", natural_clip(), "Which way does the bicycle go?", "--candidates", "left|right")
    code, out, _ = vot(*asked, "--vlm", folder_of("qwen2_5_vl"), "--num-frames", 6, "--end", 3, "--json")
    answer = json.loads(out)
    assert code == 0 and answer["eyes"]["parse_issues"] == 3
    assert {issue["kind"] for issue in answer["eyes"]["issues"]} == {
        "malformed box",
        "no boxes",
        "frame out of range",
    }
    (tracklet,) = answer["stsg"]["tracklets"]
    assert (tracklet["attributes"], tracklet["label"], len(tracklet["boxes"])) == (["red"], "bicycle", 6)
    assert [r["predicate"] for r in answer["stsg"]["relations"]] == ["moves right"]
    assert answer["choice"] == "right" and answer["evidence"]["boxes"]
    checks = answer["trace"][4]["output"]["checks"]
    assert checks[-1]["verdict"] == "supported"


def test_what_verbose_prints(vot, folder_of):
    asked = (
        "ask",
        natural_clip(),
        QUESTION,
        "--candidates",
        "bicycles|a train",
        "--vlm",
        folder_of("smolvlm2"),
    )
    code, out, err = vot(*asked, "--num-frames", 4, "--verbose", "--dtype", "bfloat16")
    assert code == 0 and "5 of 5 modules replaced" in out and "vot_kernels.flash_attn_varlen_func" in out
    assert "Sampled 4 frames" in out and "wrote the graph" in out and "5. Verification" in out
    assert "Estimate: " in err and "tokens of a clip" in err and "(measured)" in err
    code, out, err = vot(*asked, "--num-frames", 4, "--skip", "action_analysis", "--skip", "verification")
    assert code == 0 and "modules replaced" not in out and "Estimate" not in err  # it takes no time


def test_a_batch_is_resumed(vot, folder_of, tmp_path, monkeypatch):
    """Questions about one file in a row share its frames and its graph."""
    seen, see = [], written.WrittenGraph.see
    monkeypatch.setattr(written.WrittenGraph, "see", lambda self, clip: seen.append(clip) or see(self, clip))
    lines = [{"video": str(natural_clip()), "question": f"Is it {word}?"} for word in ("red", "blue")]
    lines.append({"video": "missing.mp4", "question": "What?"})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("ask", "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--num-frames", 3)
    code, _, err = vot(*words, "--vlm", folder_of("smolvlm2"))
    assert code == 1 and "2 answered, 0 already" in err and "1 failed" in err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row.get("model") for row in rows] == ["smolvlm2", "smolvlm2", None]
    assert all("wrote the graph" in row["eyes"]["name"] for row in rows[:2])
    code, _, err = vot(*words, "--vlm", folder_of("smolvlm2"))
    assert "0 answered, 2 already" in err and len(seen) == 1


def test_without_a_model_for_it_a_foreign_clip_gets_a_refusal_and_what_to_pass(vot):
    code, out, _ = vot("ask", natural_clip(), QUESTION, "--num-frames", 8)
    assert code == 0 and "outside what the checkpoint knows" in out and "vot ask --vlm PATH" in out


def test_a_checkpoint_may_be_the_eyes_of_a_video_language_model(vot, folder_of):
    clip, question, candidates = digitworld_clip()
    asked = ("ask", clip, question, "--candidates", "|".join(candidates), "--json")
    code, out, _ = vot(*asked, "--vlm", folder_of("qwen2_5_vl"), "--checkpoint", BUNDLED_CHECKPOINT)
    answer = json.loads(out)
    assert code == 0 and answer["eyes"]["name"] == "the perception checkpoint digitworld-nano"
    assert answer["model"] == "qwen2_5_vl" and answer["stsg"]["tracklets"]


def test_a_checkpoint_sees_all_of_a_long_video_for_a_video_language_model(vot, folder_of, monkeypatch):
    """Its eyes get the stream; the reader gets as many frames as a window has."""
    watched = []
    about = video_language.VideoLanguageModel.about
    monkeypatch.setattr(
        video_language.VideoLanguageModel,
        "about",
        lambda self, clip: watched.append(clip) or about(self, clip),
    )
    code, out, err = vot(
        *("ask", natural_clip(), QUESTION, "--candidates", "bicycles|a train", "--json", "--anyway"),
        *("--vlm", folder_of("qwen2_5_vl"), "--checkpoint", BUNDLED_CHECKPOINT),
        *(
            word
            for step in ("task_definition", "action_analysis", "verification")
            for word in ("--skip", step)
        ),
    )
    assert code == 0, err
    assert len(json.loads(out)["stsg"]["frame_times_s"]) == 80  # 8 a second
    assert watched and all(len(clip.times) <= 32 for clip in watched)


def test_bad_options(vot, folder_of):
    asked = ("ask", natural_clip(), QUESTION, "--vlm", folder_of("smolvlm2"), "--num-frames", 2)
    for words, message in (
        (("--llm", folder_of("smolvlm2")), "not both"),
        (("--dtype", "int4"), "auto, float32, bfloat16, float16"),
        (("--device", "gpu"), "A device must be"),
    ):
        code, out, err = vot(*asked, *words)
        assert code == 2 and not out and message in err and len(err.splitlines()) == 1
