"""The benchmark of long videos: it measures, resumes, refuses other settings, and sums up right."""

import json

import pytest

from benchmarks import long_video


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(long_video, "CLIPS", {16: 2, 64: 1})


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
            "loaded_mb": 10.0, "model": "m",
        }  # fmt: skip

    rows = [
        row(16, [("which", {"rules": True, "vot": True}), ("did", {"rules": False})], 20.0),
        row(16, [("did", {"rules": True, "spread": True})], 30.0),
    ]
    result = long_video.summarise(rows, {"questions": 1, "asked": 1, "seed": 0})
    found = result["lengths"]["16"]
    assert found["right"]["rules"] == {"which": 1.0, "did": 0.5, "all": pytest.approx(2 / 3)}
    assert found["right"]["vot"] == {"which": 1.0, "all": 1.0} and found["questions_to_the_model"] == 1
    assert found["peak_mb"] == 30.0 and found["clips"] == 2 and found["questions"] == 3
    assert result["command"].endswith("--questions 1 --asked 1 --seed 0") and result["llm"] == "m"
