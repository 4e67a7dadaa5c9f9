"""Linearization: errors fall, runs are resumed, and the result is a checkpoint with a record of the run."""

import copy
import json

import pytest
import torch

import vot_kernels
from tests.integrations.tiny import qwen3_vl
from vot_kernels.models.checkpoint import load_checkpoint
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.testing import make_tensor
from vot_kernels.train.linearize import linearize
from vot_kernels.train.linearize.run import convert, run
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.linearize.stage import layer_errors
from vot_kernels.train.perception.batches import digitworld_config

SETTINGS = Linearization(layer_steps=20, steps=10, warmup=2, layer_learning_rate=1e-2, learning_rate=1e-3)
NAMES = ["blocks.0.attn", "blocks.1.attn"]
GRID = torch.tensor([[4, 4, 4], [2, 4, 8]])


def outputs(model, batch):
    return [model(batch, grid_thw=GRID).last_hidden_state]


def batches(start, stop):
    return (make_tensor(128, 3 * 2 * 14 * 14, seed=step % 4) for step in range(start, stop))


@pytest.fixture
def pair():
    """A tower of transformers with softmax attention over each clip, and its copy with a window of one frame."""
    teacher = qwen3_vl().model.visual.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    vot_kernels.patch(teacher, attention="hybrid", window=None)
    vot_kernels.patch(student, attention="hybrid", window=0, far=0.1)
    return teacher, student


def test_errors_fall_layer_by_layer_and_end_to_end(pair, tmp_path):
    seen = []
    errors = linearize(
        tmp_path, *pair, NAMES, batches, outputs, SETTINGS, report=lambda step, terms: seen.append(step)
    )
    assert seen == list(range(1, 31)) and list(errors) == ["converted", "layer by layer", "end to end"]
    assert all(list(row) == [*NAMES, "outputs"] for row in errors.values())
    assert errors["layer by layer"]["blocks.0.attn"] < 0.9 * errors["converted"]["blocks.0.attn"]
    assert errors["end to end"]["outputs"] < 0.9 * errors["converted"]["outputs"]


def test_a_run_is_resumed_and_a_finished_one_computes_nothing_again(pair, tmp_path):
    teacher, student = pair
    again = copy.deepcopy(student)
    straight = linearize(tmp_path / "a", teacher, student, NAMES, batches, outputs, SETTINGS)

    def interrupt(step, terms):
        if step == 25:
            raise KeyboardInterrupt

    arguments = (NAMES, batches, outputs, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        linearize(tmp_path / "b", teacher, copy.deepcopy(again), *arguments, report=interrupt)
    resumed = linearize(tmp_path / "b", teacher, copy.deepcopy(again), *arguments)
    seen = []
    finished = linearize(tmp_path / "b", teacher, again, *arguments, report=lambda *x: seen.append(x))
    assert straight["end to end"] == resumed["end to end"] == finished["end to end"] and not seen


def test_the_same_model_has_no_error(pair):
    teacher, _ = pair
    errors = layer_errors(teacher, teacher, NAMES, next(iter(batches(0, 1))), outputs)
    assert set(errors.values()) == {0.0}


def test_names_must_be_modules_of_both(pair, tmp_path):
    for names, word in (([], "none"), (["blocks.7.attn"], "blocks.7.attn")):
        with pytest.raises(ValueError, match=f"^names must be modules of the teacher, got {word}"):
            linearize(tmp_path, *pair, names, batches, outputs, SETTINGS)


def test_a_perception_checkpoint_is_converted(tmp_path, monkeypatch):
    monkeypatch.setattr("vot_kernels.train.linearize.run._BATCH", 1)
    torch.manual_seed(0)
    teacher = VotPerceptionModel(digitworld_config("softmax"))
    teacher.save_pretrained(tmp_path / "teacher")
    settings = Linearization(layer_steps=1, steps=1)
    paths = tmp_path / "run", tmp_path / "teacher"
    table = run(*paths, settings, window=1, eval_clips=1)
    assert "fewer operations" in table
    student = load_checkpoint(VotPerceptionModel, tmp_path / "run/model")
    assert student.config.encoder.attention == "hybrid" and student.config.encoder.layer_windows == [1] * 4
    record = json.loads((tmp_path / "run/model/training.json").read_text())
    assert list(record["metrics"]) == ["softmax", "converted", "distilled"]
    flops = record["attention_flops"]
    assert 0 < flops["hybrid"] < 0.5 * flops["softmax"]
    with pytest.raises(ValueError, match="window was 1, now 2"):
        run(*paths, settings, window=2, eval_clips=1)
    for name in ("linearize", "perception_metrics", "publish"):  # a finished run needs none of them
        monkeypatch.setattr(f"vot_kernels.train.linearize.run.{name}", None)
    assert run(*paths, settings, window=1, eval_clips=1) == table


def test_a_window_over_all_frames_changes_nothing(tmp_path):
    torch.manual_seed(0)
    teacher = VotPerceptionModel(digitworld_config("softmax")).eval()
    student = convert(teacher, 16).eval()
    x = make_tensor(4 * 4 * 4, 3 * 8 * 8)
    inputs = {"pixel_values": x, "image_grid_thw": torch.tensor([[4, 4, 4]]), "fps": torch.tensor([8.0])}
    with torch.no_grad():
        expected, found = (m.encoder(**inputs).last_hidden_state for m in (teacher, student))
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="\"softmax\" attention, got 'hybrid'"):
        convert(student, 1)
