"""The command line: help explains units, mistakes are one sentence on stderr and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reasoning.scripted import ScriptedLanguageModel
from vot_kernels import cli
from vot_kernels.data.sample_clips import digitworld_clip

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "missing.mp4", "Who?"],
        ["ask", __file__, "Who?"],
        ["ask", "CLIP", "Who?", "--start", "99"],
        ["ask", "CLIP", "Who?", "--skip", "thinking"],
        ["ask", "CLIP", "Who?", "--checkpoint", "nowhere"],
        ["ask", "CLIP", "Who?", "--llm", "nowhere"],
        ["ask", "--batch", "missing.jsonl", "--out", "answers.jsonl"],
        ["encode", "CLIP", "missing.mp4", "--out", "x.safetensors"],
        ["encode", "CLIP", "--checkpoint", "nowhere", "--out", "x.safetensors"],
    ],
)
def test_mistakes_are_found_before_torch_is_imported(words, tmp_path):
    clip = str(digitworld_clip()[0])
    argv = ["vot", *(clip if word == "CLIP" else word for word in words)]
    code = (
        "import sys; sys.path.append(sys.argv.pop(1)); sys.argv[0] = 'vot'\n"
        "sys.modules['torch'] = None  # an import of it would fail\n"
        "from vot_kernels import cli; cli.main()"
    )
    run = [sys.executable, "-c", code, str(ROOT), *argv[1:]]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "torch" not in done.stderr and "Traceback" not in done.stderr


def test_ask_opens_its_video_once(vot, monkeypatch):
    from vot_kernels.data.video import reader
    from vot_kernels.pipelines import video_qa

    opened, real = [], reader.av.open
    monkeypatch.setattr(reader.av, "open", lambda name, *a, **k: opened.append(name) or real(name, *a, **k))
    monkeypatch.setattr(video_qa, "load_language_model", lambda path: ScriptedLanguageModel())
    clip, question, candidates = digitworld_clip()
    code, out, _ = vot("ask", str(clip), question, "--candidates", "|".join(candidates), "--json")
    assert code == 0 and json.loads(out)["in_domain"]
    assert opened == [f"file:{clip.absolute()}"]


def test_info(vot):
    code, out, _ = vot("info")
    assert code == 0 and "hybrid_attention" in out
    code, out, _ = vot("info", "--model", "nano", "--json")
    assert json.loads(out)["model"]["parameters"] <= 1_500_000


def test_encode(vot, tmp_path):
    code, out, err = vot("encode", str(digitworld_clip()[0]), "--out", str(tmp_path / "e.safetensors"))
    assert code == 0 and out.strip() == str(tmp_path / "e.safetensors")
    assert "1024 tokens" in " ".join(err.split())
