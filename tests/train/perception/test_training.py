"""Training is resumable bit for bit, refuses other settings, and learns."""

import copy
import csv
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vot_kernels.models.perception import VotPerceptionModel
from vot_kernels.train.perception.batches import TrainingBatches, digitworld_config
from vot_kernels.train.perception.metrics import perception_metrics
from vot_kernels.train.perception.run import publish, run
from vot_kernels.train.perception.stage import (
    PerceptionTraining,
    make_processor,
    recoloured,
    stage_batches,
    train_dynamics,
    train_names,
    train_perception,
)
from vot_kernels.train.report import format_metrics

SETTINGS = PerceptionTraining(steps=4, batch_size=2, warmup=2, dynamics_steps=2, name_steps=2, num_frames=4)


@pytest.fixture(autouse=True)
def short_domain(monkeypatch):
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_STEPS", 3)
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_HELD_OUT", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    losses = []
    model = train_perception(out, SETTINGS, report=lambda step, terms: losses.append(terms["loss"]))
    return out, model, losses


def test_resuming_gives_the_same_weights(trained, tmp_path):
    _, straight, losses = trained
    train_perception(tmp_path, SETTINGS, stop_at=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    seen = []
    resumed = train_perception(
        tmp_path, SETTINGS, report=lambda step, terms: seen.append((step, terms["loss"]))
    )
    assert seen == [(n + 1, losses[n]) for n in range(2, 8)]  # two steps of each stage
    for name, value in straight.state_dict().items():
        if not name.startswith("domain_"):
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_second_stage_is_resumed_and_skipped_when_done(trained, tmp_path):
    _, straight, losses = trained
    train_perception(tmp_path, SETTINGS, stop_at=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "dynamics"]
    assert [p.name for p in (tmp_path / "dynamics").iterdir()] == ["checkpoint-1"]
    seen = []
    for _ in range(2):  # the second time there is nothing left to train
        resumed = train_perception(
            tmp_path, SETTINGS, report=lambda step, terms: seen.append((step, terms["loss"]))
        )
        assert seen == [(n + 1, losses[n]) for n in range(5, 8)]
        for name, value in straight.state_dict().items():
            if not name.startswith("domain_"):
                assert torch.equal(value, resumed.state_dict()[name]), name


def test_names_are_learnt_without_touching_anything_else(trained, tmp_path):
    _, model, _ = trained
    model = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = train_names(tmp_path, model, make_processor(model), SETTINGS)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert done == 2 and {name.split(".")[1] for name in changed} == {"namer"}
    parts = {name.split(".")[2] for name in changed}
    assert parts == {"glimpse", "label", "attribute"}


def test_a_stage_that_would_train_more_or_less_stops(trained, tmp_path):
    model = copy.deepcopy(trained[1]).requires_grad_(True)
    model.encoder.patch_embedding.weight.grad = torch.ones_like(model.encoder.patch_embedding.weight)
    with pytest.raises(RuntimeError, match=r"trains head\.dynamics.*patch_embedding\.weight'\] are too many"):
        train_dynamics(tmp_path / "more", model, SETTINGS)
    model.zero_grad(set_to_none=True)
    name, frozen = next(iter(model.head.namer.named_parameters(prefix="head.namer")))
    frozen.requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"trains head\.namer.*\['{name}'\] are missing"):
        train_names(tmp_path / "less", model, make_processor(model), SETTINGS)


def test_crops_change_their_colour_and_nothing_else():
    """Black stays black; the brightness of every pixel stays, in one colour for an object in all frames."""
    crops = torch.rand(2, 3, 4, 3 * 5 * 5) * 2 - 1
    crops.view(2, 3, 4, 3, 25)[..., 0] = -1
    found = recoloured(crops, torch.rand(2, 3, 3)).view(2, 3, 4, 3, 25)
    assert (found[..., 0] == -1).all()
    brightness = crops.view(2, 3, 4, 3, 25).amax(3) + 1
    torch.testing.assert_close(found.amax(3) + 1, brightness)
    colour = (found[..., 1:] + 1) / brightness[..., None, 1:]
    torch.testing.assert_close(colour, colour[:, :, :1, :, :1].expand_as(colour), rtol=1e-3, atol=1e-4)


def test_nothing_is_published_before_it_is_measured(trained, tmp_path):
    _, model, _ = trained

    def interrupt(published):
        assert not (tmp_path / "model").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(model, tmp_path / "model", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_run_publishes_the_model_and_how_it_was_made(trained):
    out, _, _ = trained
    table = run(out, SETTINGS, eval_clips=1)
    record = json.loads((out / "model" / "training.json").read_text())
    assert table == format_metrics(record["metrics"]) and "five_objects" in record["metrics"]
    assert record["command"] == (
        "vot train perception --steps 4 --batch-size 2 --learning-rate 0.002 --warmup 2 --weight-decay 0.02 "
        "--clip 1.0 --seed 0 --precision float32 --accumulation 1 --validate-every 0 --validation-clips 16 "
        "--dynamics-steps 2 --name-steps 2 --num-frames 4 --attention hybrid"
    )


def test_a_run_in_bfloat16_and_parts_measures_as_it_goes(tmp_path):
    settings = dataclasses.replace(
        SETTINGS, steps=3, precision="bfloat16", accumulation=2, validate_every=2, validation_clips=1
    )
    table = run(tmp_path, settings, eval_clips=1)
    assert "test, before" in table
    with (tmp_path / "log.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows] == list(range(1, 8))  # through all stages
    measured = [row["step"] for row in rows if row["held_out/presence"]]
    assert measured == ["2", "4", "6"]
    precise = dataclasses.replace(settings, precision="float32", validate_every=0)
    losses = []
    train_perception(tmp_path / "precise", precise, report=lambda step, terms: losses.append(terms["loss"]))
    for row, loss in zip(rows, losses, strict=True):
        assert float(row["loss"]) == pytest.approx(loss, rel=0.05)
    assert float(rows[0]["loss"]) != losses[0]


def test_a_step_has_the_same_clips_in_parts():
    settings = dataclasses.replace(SETTINGS, batch_size=4)
    with mock.patch("vot_kernels.train.perception.batches.TRAIN_SIZES", [(64, 64)]):
        whole = stage_batches(settings, "whole")[1].clips
        batches = stage_batches(dataclasses.replace(settings, accumulation=2), "whole")
        parts = [batches[index].clips for index in (2, 3)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_dry_run_says_what_each_stage_takes_and_writes_nothing(tmp_path):
    text = run(tmp_path / "out", SETTINGS, dry_run=True)
    for stage in ("the whole model", "relations and events", "labels and attributes"):
        assert text.count(f"({stage})") == 1
    assert text.count("GFLOP") == 3 and "for 4 steps" in text
    model = VotPerceptionModel(digitworld_config())
    whole, unused = (sum(p.numel() for p in m.parameters()) for m in (model, model.encoder.pooling))
    assert f"{whole - unused:,} trained (the whole model) of {whole:,}" in text
    assert not (tmp_path / "out").exists()


def test_a_finished_run_prints_its_table_again_and_does_nothing_else(trained, monkeypatch):
    out, _, _ = trained
    table = run(out, SETTINGS, eval_clips=1)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with monkeypatch.context() as patched:
        for name in ("train_perception", "perception_metrics", "publish"):
            patched.setattr(f"vot_kernels.train.perception.run.{name}", None)
        assert run(out, SETTINGS, eval_clips=1) == table
        with pytest.raises(TypeError):  # other metrics are measured
            run(out, SETTINGS, eval_clips=2)
    with pytest.raises(ValueError, match="batch_size was 2, now 3"):
        run(out, dataclasses.replace(SETTINGS, batch_size=3), eval_clips=1)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_a_device_that_torch_lacks_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="The device 'cuda:99' cannot be used"):
        train_perception(tmp_path, SETTINGS, device="cuda:99")
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_not_resumed(trained):
    out, _, _ = trained
    with pytest.raises(ValueError, match="batch_size was 2, now 3"):
        train_perception(
            out, PerceptionTraining(steps=4, batch_size=3, warmup=2, dynamics_steps=2, name_steps=2)
        )


def test_a_model_of_another_size_is_resumed(tmp_path):
    config = digitworld_config(hidden_size=24, num_hidden_layers=1, intermediate_size=32)
    for stop_at in (1, 2):
        train_perception(tmp_path, SETTINGS, stop_at=stop_at, config=config)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_interrupted_run_leaves_a_whole_checkpoint(tmp_path):
    def interrupt(step, terms):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_perception(tmp_path, SETTINGS, report=interrupt)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "checkpoint-2"
    assert json.loads((folder / "state.json").read_text())["step"] == 2
    assert (
        load_file(folder / "model.safetensors").keys()
        == VotPerceptionModel(train_perception(tmp_path, SETTINGS, stop_at=3).config).state_dict().keys()
    )


def test_the_published_checkpoint_is_small_and_the_same(trained, tmp_path):
    _, model, _ = trained
    folder = tmp_path / "model"
    record = publish(model, folder, lambda published: {"finite": bool(published.domain_threshold.isfinite())})
    assert json.loads((folder / "training.json").read_text()) == record == {"finite": True}
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 6_000_000
    assert all(f.suffix in (".json", ".safetensors") for f in folder.iterdir())
    again = VotPerceptionModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(again.domain_precision, model.domain_precision)
    batch = TrainingBatches(1, 2)[0]
    inputs = make_processor(model)(list(batch.clips), fps=batch.fps)
    with torch.no_grad():
        before, after = model(**inputs).clips[0], again(**inputs).clips[0]
    torch.testing.assert_close(before.centers, after.centers, rtol=0, atol=5e-3)


def test_metrics_of_an_untrained_model_are_poor_and_complete(trained):
    _, model, _ = trained
    metrics = perception_metrics(model, make_processor(model), "test", 4)
    expected = {
        "presence",
        "exact_count",
        "center_error_px",
        "label_accuracy",
        "attribute_accuracy",
        "in_domain",
    }
    assert expected | {"hits_f1", "bounces_f1", "relations_f1"} == metrics.keys()
    assert metrics["label_accuracy"] < 0.6 and metrics["hits_f1"] < 0.5
    assert "center_error_px" in format_metrics({"test": metrics})


def test_batches_are_a_pure_function_of_seed_and_step():
    first, again, other = TrainingBatches(5, 3)[7], TrainingBatches(5, 3)[7], TrainingBatches(6, 3)[7]
    assert (first.clips == again.clips).all() and torch.equal(first.targets.centers, again.targets.centers)
    assert first.clips.shape != other.clips.shape or (first.clips != other.clips).any()
