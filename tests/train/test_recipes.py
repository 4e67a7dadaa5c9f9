"""Settings, their YAML files, and the options of the command that are made of them."""

import dataclasses
import math
import re
import sys

import pytest
import yaml

from vot_kernels import cli
from vot_kernels.train.config import identity, meanings, read_settings, recipe_text
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.recipes import STAGES, recipe
from vot_kernels.train.rl.settings import GrpoPerception, GrpoReasoning
from vot_kernels.train.sft.settings import SftTraining


@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_is_that_of_its_settings(stage, tmp_path):
    text, settings = recipe(stage), STAGES[stage]
    assert text == recipe_text(stage, settings), "run python -m vot_kernels.train.recipes"
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")][1:]
    assert comments == list(meanings(settings).values())
    assert list(yaml.safe_load(text)) == [field.name for field in dataclasses.fields(settings)]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert read_settings(settings, file, {}) == settings()


@pytest.mark.parametrize("settings", STAGES.values(), ids=STAGES)
def test_every_setting_says_what_it_means(settings):
    for name, meaning in meanings(settings).items():
        assert meaning.endswith(".") and meaning[0].isupper() or meaning.startswith("nano"), name


def test_another_default_keeps_the_meaning():
    assert SftTraining.steps == 1200 and meanings(SftTraining)["steps"] == "Optimiser steps."
    assert meanings(SftTraining)["seed"] == "Seed of adapters and data."


def test_stages_are_the_commands_of_train():
    from typer.main import get_command

    assert {*STAGES, "recipe", "export"} == set(get_command(cli.app.app).commands["train"].commands)
    with pytest.raises(ValueError, match="A stage must be one of perception, .* got 'stage'"):
        recipe("stage")


def test_what_is_given_wins_over_the_file(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("steps: 7\nlearning_rate: 1e-4\nclip: 2\n")
    read = read_settings(SftTraining, file, {"steps": 3})
    assert read == SftTraining(steps=3, learning_rate=1e-4, clip=2.0) and isinstance(read.clip, float)


@pytest.mark.parametrize(
    "text, said",
    [
        ("stepz: 7", "'stepz' is not a setting of this stage; these are: steps, batch_size,"),
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("steps: true", "steps must be a whole number, got True"),
        ("clip: big", "clip must be a number, got 'big'"),
        ("text: some", "text must be all or lora, got 'some'"),
        ("steps", "must hold lines of `setting: value`, got str"),
        ("steps: [", "is not YAML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_a_sentence(tmp_path, text, said):
    file = tmp_path / "sft.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_settings(SftTraining, file, {})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_settings(SftTraining, tmp_path / "no.yaml", {})


@pytest.fixture
def vot(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "words, steps",
    [
        ([], 9),
        (["--steps", "3"], 3),
        (["--steps", str(STAGES["perception"].steps)], STAGES["perception"].steps),
    ],
)
def test_options_win_over_the_file(vot, monkeypatch, tmp_path, words, steps):
    """Even an option that is given as its default."""
    seen = []
    monkeypatch.setattr(
        "vot_kernels.train.perception.run.run", lambda out, settings, *_: seen.append(settings) or "done"
    )
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 9\nbatch_size: 2\n")
    out = str(tmp_path / "run")
    assert vot("train", "perception", "--out", out, "--config", str(file), *words)[:2] == (0, "done\n")
    assert (seen[0].steps, seen[0].batch_size, seen[0].seed) == (steps, 2, 0)


def test_the_command_says_what_is_wrong(vot, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("steps: many\n")
    code, out, err = vot("train", "perception", "--out", str(tmp_path / "run"), "--config", str(file))
    assert code == 2 and not out and err.endswith("steps must be a whole number, got 'many'.\n")
    assert vot("train", "recipe", "grpo-reasoning")[1] == recipe("grpo-reasoning")
    assert "got 'stage'" in vot("train", "recipe", "stage")[2]


@pytest.mark.parametrize("settings", STAGES.values(), ids=STAGES)
def test_numbers_out_of_their_bounds_are_refused(settings):
    """Each by its name, with what is allowed."""
    for name in ("steps", "warmup", "learning_rate"):
        with pytest.raises(ValueError, match=rf"^{name} must be at least [01], got -1\.$"):
            settings(**{name: -1})
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^{name} must be a number, got {value}\.$"):
                settings(**{name: value})
    assert settings(clip=math.inf).clip == math.inf
    with pytest.raises(ValueError, match=r"^clip must be more than 0, got 0\.$"):
        settings(clip=0)
    if settings is Linearization:
        return
    for name in ("batch_size", "accumulation", "validation_clips"):
        with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got 0\.$"):
            settings(**{name: 0})
    with pytest.raises(ValueError, match=r"^accumulation must divide the \d+ \w+ of a step, got 1000\.$"):
        settings(accumulation=1000)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (SftTraining, {"frames": 1.5}, "frames must lie between 0 and 1, got 1.5."),
        (SftTraining, {"questions": 0}, "questions must be at least 1, got 0."),
        (EncoderTraining, {"h264_share": -0.1}, "h264_share must lie between 0 and 1, got -0.1."),
        (EncoderTraining, {"num_frames": 1}, "num_frames must be at least 2, got 1."),
        (EncoderTraining, {"caption_width": 20}, "caption_width must be a multiple of 8, got 20."),
        (EncoderTraining, {"distillation": math.inf}, "distillation must be a number, got inf."),
        (PerceptionTraining, {"num_frames": 1}, "num_frames must be at least 2, got 1."),
        (GrpoReasoning, {"temperature": 0}, "temperature must be more than 0, got 0."),
        (GrpoReasoning, {"sigma_s": 0}, "sigma_s must be more than 0, got 0."),
        (GrpoReasoning, {"accuracy_weight": math.inf}, "accuracy_weight must be a number, got inf."),
        (PerceptionTraining, {"dynamics_steps": -1}, "dynamics_steps must be at least 0, got -1."),
    ],
)
def test_bounds_of_single_stages(settings, given, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        settings(**given)


def test_another_default_keeps_the_bounds():
    assert GrpoReasoning(frames=0).frames == 0
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        GrpoPerception(frames=0)


def test_what_only_watches_does_not_make_another_run():
    """Nor do its settings keep a run from being resumed."""
    assert identity(SftTraining()) == identity(SftTraining(validate_every=5, validation_clips=2))
    assert identity(SftTraining()) != identity(SftTraining(accumulation=2))
