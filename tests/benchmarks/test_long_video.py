"""The benchmark of long videos: it measures, resumes, refuses other settings, and sums up right."""

import json

import pytest

from benchmarks import long_video
from tests.reasoning.scripted import ScriptedLanguageModel


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(long_video, "CLIPS", {16: 2, 64: 1})


class FirstCandidate(ScriptedLanguageModel):
    """A language model that likes the first answer best, and counts the graphs that it reads."""

    graphs = 0

    def score(self, prompt, continuations):
        self.graphs += "What happens in the video" in prompt
        return [-float(n) for n, _ in enumerate(continuations)]


def run_here(monkeypatch, calls):
    """Measure in this process, where the short list of clips is."""

    def run(command, check):
        calls.append(command)
        return type("Done", (), {"returncode": long_video.main(command[3:])})

    monkeypatch.setattr(long_video.subprocess, "run", run)


def test_it_measures_and_resumes(few, monkeypatch, tmp_path, capsys):
    calls: list[list[str]] = []
    run_here(monkeypatch, calls)
    out, picture = tmp_path / "long.json", tmp_path / "long.svg"
    words = [str(out), "--lengths", "16", "64", "--questions", "2"]
    assert long_video.main([*words, "--plot", str(picture)]) == 0
    result = json.loads(out.read_text())
    assert set(result["lengths"]) == {"16", "64"} and len(calls) == 2
    for found in result["lengths"].values():
        assert found["right"]["rules"]["all"] >= 0.5 and found["questions"] >= 3
        assert found["peak_mb"] >= found["loaded_mb"] > 100
    assert picture.read_text().lstrip().startswith("<?xml") and "<svg" in picture.read_text()
    rows = tmp_path / "long.rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    rows.write_text("".join(lines[:-1]))  # as if interrupted during the last clip
    assert long_video.main(words) == 0
    again = json.loads(out.read_text())
    assert again["lengths"]["64"]["right"] == result["lengths"]["64"]["right"]
    assert rows.read_text().splitlines()[:3] == [line.strip() for line in lines[:3]]
    assert long_video.main([str(out), "--questions", "3"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_the_language_model_is_asked_later_and_about_the_same_clips(few, monkeypatch, tmp_path):
    calls: list[list[str]] = []
    run_here(monkeypatch, calls)
    model = FirstCandidate()
    monkeypatch.setattr("vot_kernels.pipelines.video_qa.load_language_model", lambda: model)
    out = tmp_path / "long.json"
    words = [str(out), "--lengths", "16", "--questions", "2"]
    assert long_video.main(words) == 0
    before = json.loads(out.read_text())["lengths"]["16"]
    assert "vot" not in before["right"] and before["questions_to_the_model"] == 0
    assert long_video.main([*words, "--asked", "1"]) == 0
    found = json.loads(out.read_text())
    assert found["llm"] == "scripted" and found["lengths"]["16"]["right"]["rules"] == before["right"]["rules"]
    *measured, asked = map(json.loads, (tmp_path / "long.rows.jsonl").read_text().splitlines()[1:])
    assert len(measured) == 2 and "asked" not in measured[0] and asked["clip"] == 0
    questions = {q["question"]: q["form"] for q in measured[0]["questions"]}
    assert {q["question"] for q in asked["asked"]} <= set(questions)
    assert sorted(q["form"] for q in asked["asked"]) == sorted(set(questions.values()))
    assert found["lengths"]["16"]["questions_to_the_model"] == len(asked["asked"]) <= model.graphs
    assert 0 <= found["lengths"]["16"]["right"]["vot"]["all"] <= 1
    assert long_video.main([*words, "--asked", "1"]) == 0, "nothing is left to do"
    assert len((tmp_path / "long.rows.jsonl").read_text().splitlines()) == 4


def test_a_length_that_fails_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        long_video.subprocess, "run", lambda command, check: type("Done", (), {"returncode": 1})
    )
    assert long_video.main([str(tmp_path / "long.json"), "--lengths", "64"]) == 1
    assert "64 frames failed" in capsys.readouterr().err and not (tmp_path / "long.json").exists()


def test_the_summary_by_hand():
    def row(frames, right, peak):
        questions = [{"form": form, "right": given} for form, given in right]
        return {
            "frames": frames, "clip": 0, "questions": questions, "seconds": 2.0, "peak_mb": peak,
            "loaded_mb": 10.0,
        }  # fmt: skip

    rows = [
        row(16, [("which", {"rules": True}), ("did", {"rules": False})], 20.0),
        row(16, [("did", {"rules": True, "spread": True})], 30.0),
        {
            "frames": 16,
            "clip": 0,
            "asked": [{"form": "which", "right": {"vot": True}}],
            "seconds": 9.0,
            "model": "m",
        },
    ]
    result = long_video.summarise(rows, {"questions": 1, "seed": 0})
    found = result["lengths"]["16"]
    assert found["right"]["rules"] == {"which": 1.0, "did": 0.5, "all": pytest.approx(2 / 3)}
    assert found["right"]["vot"] == {"which": 1.0, "all": 1.0} and found["questions_to_the_model"] == 1
    assert found["peak_mb"] == 30.0 and found["clips"] == 2 and found["questions"] == 3
    assert found["seconds_to_the_model"] == 9.0 and found["seconds_per_clip"] == 2.0
    assert result["command"].endswith("--questions 1 --seed 0") and result["llm"] == "m"
