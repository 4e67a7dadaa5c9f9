"""The command line: help explains units, mistakes are one sentence on stderr and exit code 2."""

import json
import sys

import pytest

from vot_kernels import cli
from vot_kernels.data.sample_clips import digitworld_clip


@pytest.fixture
def vot(monkeypatch, capsys):
    """Run `vot ...`; returns (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vot", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.mark.parametrize(
    "command", [["ask"], ["encode"], ["train", "perception"], ["eval", "digitworld"], ["info"], ["demo"]]
)
def test_help(vot, command):
    code, out, _ = vot(*command, "--help")
    assert code == 0 and "Usage" in out


def test_help_explains_units(vot, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # nothing is wrapped
    out = " ".join(vot("ask", "--help")[1].split())
    for words in ("in seconds", "Frames per second", "fractions of the frame"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["frobnicate"], "No such command"),
        (["ask"], "Give a video and a question"),
        (["ask", "missing.mp4", "Who?"], "missing.mp4"),
        (["ask", ".", "Who?"], "directory"),
        (["ask", __file__, "Who?"], "test_cli.py"),
        (["ask", "--fps", "x", "a.mp4", "Who?"], "--fps"),
        (["ask", "a.mp4", "Who?", "--skip", "nothing"], "a.mp4"),
        (["ask", "--batch", "q.jsonl"], "--out"),
        (["ask", "CLIP", "Who?", "--num-frames", "0"], "num_frames"),
        (["ask", "CLIP", "Who?", "--start", "99"], "99"),
        (["ask", "CLIP", "Who?", "--skip", "thinking"], "thinking"),
        (["ask", "CLIP", "Who?", "--llm", "nowhere"], "nowhere"),
        (["ask", "CLIP", "Who?", "--checkpoint", "nowhere"], "nowhere"),
        (["encode", "CLIP"], "--out"),
        (["encode", "CLIP", "--out", "x.bin"], ".safetensors"),
        (["info", "--model", "huge"], "nano, small, base, large"),
        (["eval", "digitworld", "--out", "x.txt"], ".json"),
    ],
)
def test_mistakes_are_one_sentence(vot, words, sentence, tmp_path, monkeypatch):
    clip = str(digitworld_clip()[0])
    monkeypatch.chdir(tmp_path)
    code, out, err = vot(*(clip if word == "CLIP" else word for word in words))
    assert code == 2 and out == ""
    assert sentence in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_info(vot):
    code, out, _ = vot("info")
    assert code == 0 and "hybrid_attention" in out
    code, out, _ = vot("info", "--model", "nano", "--json")
    assert json.loads(out)["model"]["parameters"] <= 1_500_000


def test_encode(vot, tmp_path):
    code, out, err = vot("encode", str(digitworld_clip()[0]), "--out", str(tmp_path / "e.safetensors"))
    assert code == 0 and out.strip() == str(tmp_path / "e.safetensors")
    assert "1024 tokens" in " ".join(err.split())
