"""Pretraining the encoder: what is trained, bit-equal resuming, and what is learned on held-out clips."""

import csv
import dataclasses
import json
from unittest import mock

import pytest
import torch

from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.scene_graph.graph import STSG, Event, Relation, Tracklet
from vot_kernels.train.encoder.metrics import encoder_metrics
from vot_kernels.train.encoder.run import run
from vot_kernels.train.encoder.stage import (
    CaptionBatches,
    EncoderTraining,
    Teacher,
    assert_trainable,
    build,
    caption,
    load_teacher,
    make_processor,
    random_features,
    teach,
    train_encoder,
    trainable_parts,
)
from vot_kernels.train.perception.batches import digitworld_config

CONFIG = VotEncoderConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    patch_size=16,
    expert_rank=16,
    full_attention_every=2,
    projection_size=64,
)
SHORT = EncoderTraining(
    steps=6, batch_size=4, num_frames=2, warmup=2, caption_width=16, caption_layers=1, h264_share=0.25
)
OFF = {"both": {}, "distillation": {"contrastive": 0.0}, "contrast": {"distillation": 0.0}}


@pytest.fixture(scope="module")
def teacher():
    return random_features(CONFIG, seed=1)


def one_backward(settings, teacher):
    model = build(settings, CONFIG, teacher)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = CaptionBatches(settings)[0]
    inputs = make_processor(CONFIG)(batch.clips, fps=batch.fps)
    torch.stack(list(model.losses(inputs, batch.captions, teacher, settings).values())).sum().backward()
    return model, optimizer


def test_captions_name_colours_digits_motion_and_hits():
    stsg = STSG(
        frame_times_s=(0.0, 0.1, 0.2),
        tracklets=(
            Tracklet("o1", "digit 3", ("red",)),
            Tracklet("o2", "digit 7", ("blue",)),
            Tracklet("o3", "digit 0", ("cyan",)),
        ),
        relations=(
            Relation("o1", "moves left", "o1", 0, 2),
            Relation("o1", "moves down", "o1", 0, 1),
            Relation("o1", "near", "o2", 0, 1),
            Relation("o2", "moves up", "o2", 0, 1),
            Relation("o3", "moves up", "o3", 1, 2),
        ),
        events=(Event("bounces", 1, ("o1",)), Event("hits", 2, ("o1", "o2"))),
    )
    assert caption(stsg) == (
        "blue digit 7 moves up, cyan digit 0, red digit 3 moves down and left; blue digit 7 hits red digit 3"
    )


def test_captions_of_episodes_are_true():
    for index in range(20):
        episode = generate_episode("test", index)
        text = caption(episode.stsg)
        for colour, digit in zip(episode.scene.colours, episode.scene.digits, strict=True):
            assert f"{colour} digit {digit}" in text
        assert text.count(" hits ") == len(episode.motion.hits)


def test_batches_depend_on_seed_and_step_alone():
    one, again, other = CaptionBatches(SHORT)[3], CaptionBatches(SHORT)[3], CaptionBatches(SHORT)[4]
    assert one.captions == again.captions != other.captions
    assert all((a == b).all() for a, b in zip(one.clips, again.clips, strict=True))
    assert len({clip.shape for step in range(4) for clip in CaptionBatches(SHORT)[step].clips}) > 1


@pytest.mark.parametrize("off", OFF.values(), ids=OFF.keys())
def test_exactly_the_stage_is_trained(off, teacher):
    settings = dataclasses.replace(SHORT, **off)
    model, optimizer = one_backward(settings, teacher)
    assert_trainable(model, optimizer, teacher, settings)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == set(trainable_parts(settings))
    assert all(p.grad is None and not p.requires_grad for p in teacher.encoder.parameters())


def test_what_should_train_and_does_not_is_found(teacher):
    model, optimizer = one_backward(SHORT, teacher)
    model.encoder.patch_embedding.weight.grad = None
    with pytest.raises(RuntimeError, match=r"gradient \['encoder.patch_embedding.weight'\] are missing"):
        assert_trainable(model, optimizer, teacher, SHORT)


def test_what_trains_and_should_not_is_found():
    teacher = random_features(CONFIG)
    model, optimizer = one_backward(SHORT, teacher)
    optimizer.add_param_group({"params": [teacher.encoder.norm.weight]})
    with pytest.raises(RuntimeError, match=r"optimised .*\['teacher.norm.weight'\] are too many"):
        assert_trainable(model, optimizer, teacher, SHORT)


def test_resuming_is_bit_equal(tmp_path, teacher):
    before = teacher.fingerprint
    straight = train_encoder(tmp_path / "a", SHORT, CONFIG, teacher)
    train_encoder(tmp_path / "b", SHORT, CONFIG, teacher, stop_at=3)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["checkpoint-3"]
    steps = []
    resumed = train_encoder(
        tmp_path / "b", SHORT, CONFIG, teacher, report=lambda step, terms: steps.append(step)
    )
    assert steps == [4, 5, 6]
    ours, wanted = resumed.state_dict(), straight.state_dict()
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[n], wanted[n]) for n in wanted)
    start = build(SHORT, CONFIG, teacher).state_dict()
    assert not torch.equal(start["encoder.patch_embedding.weight"], wanted["encoder.patch_embedding.weight"])
    assert teacher.fingerprint == before


def test_another_teacher_or_encoder_cannot_go_on(tmp_path, teacher):
    train_encoder(tmp_path, SHORT, CONFIG, teacher, stop_at=1)
    with pytest.raises(ValueError, match="teacher_fingerprint was"):
        train_encoder(tmp_path, SHORT, CONFIG, random_features(CONFIG, seed=2))
    narrower = VotEncoderConfig(**{**CONFIG.to_dict(), "expert_rank": 8})
    with pytest.raises(ValueError, match=r"encoder.expert_rank was 16, now 8\.$"):
        train_encoder(tmp_path, SHORT, narrower, teacher)


@pytest.mark.slow
def test_learns_what_carries_over_to_held_out_clips(tmp_path, teacher):
    settings = dataclasses.replace(
        SHORT,
        steps=90,
        batch_size=32,
        learning_rate=4e-3,
        warmup=10,
        caption_width=48,
        h264_share=0.0,
    )
    losses = []
    trained = train_encoder(
        tmp_path, settings, CONFIG, teacher, report=lambda step, terms: losses.append(terms["loss"])
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before = encoder_metrics(build(settings, CONFIG, teacher), teacher, settings, clips=96)
    after = encoder_metrics(trained, teacher, settings, clips=96)
    assert after["distil_tokens"] < 0.7 * before["distil_tokens"]
    assert after["distil_pooled"] < before["distil_pooled"]
    for direction in ("video_to_caption_r1", "caption_to_video_r1"):
        assert before[direction] < 3 / 96 < 5 / 96 < after[direction]
    assert after["probe_colour"] > before["probe_colour"] + 0.05
    assert after["probe_count"] > before["probe_count"] + 0.05
    assert after["probe_colour"] > after["probe_colour_majority"] + 0.1


def test_metrics_of_what_is_switched_off_are_left_out(teacher):
    settings = dataclasses.replace(SHORT, contrastive=0.0)
    metrics = encoder_metrics(build(settings, CONFIG, teacher), teacher, settings, clips=8)
    assert "distil_tokens" in metrics and "r1_chance" not in metrics
    settings = dataclasses.replace(SHORT, distillation=0.0)
    metrics = encoder_metrics(build(settings, CONFIG, teacher), teacher, settings, clips=8)
    assert "distil_tokens" not in metrics and metrics["r1_chance"] == 1 / 8


def test_teachers_are_loaded_and_named_for_what_they_are(tmp_path, teacher):
    assert teacher.name == "random features"
    assert teacher.encoder.config.hidden_size == 2 * CONFIG.hidden_size
    small = VotPerceptionModel(digitworld_config())
    small.save_pretrained(tmp_path / "seer")
    loaded = load_teacher(tmp_path / "seer")
    assert loaded.name == "encoder of the perception checkpoint seer"
    assert loaded.fingerprint == Teacher("", small.encoder).fingerprint
    teacher.encoder.save_pretrained(tmp_path / "wide")
    assert load_teacher(tmp_path / "wide").fingerprint == teacher.fingerprint
    with pytest.raises(
        FileNotFoundError, match="not a perception checkpoint or an encoder checkpoint: it has no config.json"
    ):
        load_teacher(tmp_path / "nowhere")


def test_run_publishes_the_encoder_and_how_it_was_made(tmp_path, monkeypatch):
    settings = EncoderTraining(steps=1, batch_size=2, num_frames=2, caption_width=16)
    table = run(tmp_path, settings, None, eval_clips=6)
    assert table.startswith("Teacher: random features\n") and "trained" in table
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["metrics"].keys() == {"random weights", "trained"}
    assert record["command"].startswith("vot train encoder --teacher random --steps 1 ")
    encoder = VotEncoder.from_pretrained(tmp_path / "model", local_files_only=True)
    assert encoder.config.hidden_size == VotEncoderConfig.preset("nano").hidden_size
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "log.csv", "model", "tensorboard"}
    with pytest.raises(ValueError, match="batch_size was 2, now 3"):
        run(tmp_path, dataclasses.replace(settings, batch_size=3), None, eval_clips=6)
    for name in ("train_encoder", "encoder_metrics", "publish"):  # a finished run needs none of them
        monkeypatch.setattr(f"vot_kernels.train.encoder.run.{name}", None)
    assert run(tmp_path, settings, None, eval_clips=6) == table


def test_a_step_in_parts_learns_what_the_whole_step_does(tmp_path):
    """By distillation, a mean over tokens of clips that here are equally large; contrast is within a part."""
    settings = dataclasses.replace(SHORT, steps=3, contrastive=0.0, h264_share=0.0)
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    torch.set_default_dtype(torch.float64)
    try:
        teacher = random_features(CONFIG, seed=1)
        with mock.patch("vot_kernels.train.encoder.stage.TRAIN_SIZES", [(64, 64)]):
            for parts, seen in found.items():
                cut = dataclasses.replace(settings, accumulation=parts)
                out = tmp_path / str(parts)
                train_encoder(out, cut, CONFIG, teacher, report=lambda step, terms, to=seen: to.append(terms))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[1][-1]["loss"] < found[1][0]["loss"]
    for whole, parts in zip(found[1], found[2], strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


def test_a_run_in_bfloat16_and_parts_measures_as_it_goes(tmp_path):
    settings = EncoderTraining(
        steps=2,
        batch_size=4,
        num_frames=2,
        caption_width=16,
        precision="bfloat16",
        accumulation=2,
        validate_every=2,
        validation_clips=4,
    )
    run(tmp_path, settings, None, eval_clips=4)
    with (tmp_path / "log.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["1", "2"] and 0 < float(rows[0]["loss"]) < 20
    assert not rows[0].get("held_out/distil_tokens") and 0 < float(rows[1]["held_out/distil_tokens"]) < 3
    precise = dataclasses.replace(settings, precision="float32", validate_every=0)
    run(tmp_path / "precise", precise, None, eval_clips=4)
    with (tmp_path / "precise" / "log.csv").open() as lines:
        exact = float(next(csv.DictReader(lines))["distil_tokens"])
    assert float(rows[0]["distil_tokens"]) == pytest.approx(exact, rel=0.005)
    assert float(rows[0]["distil_tokens"]) != exact


def test_bfloat16_is_of_the_student_alone(teacher):
    """What it learns from, and the objectives, are as exact as without."""
    settings = dataclasses.replace(SHORT, precision="bfloat16")
    model, batch = build(settings, CONFIG, teacher), CaptionBatches(settings)[0]
    inputs = make_processor(CONFIG)(batch.clips, fps=batch.fps)
    wanted, taught = teach(teacher, inputs), []
    with mock.patch(
        "vot_kernels.train.encoder.stage.teach", lambda *given: taught.append(teach(*given)) or taught[0]
    ):
        terms = model.losses(inputs, batch.captions, teacher, settings)
    assert all(torch.equal(a, b) for a, b in zip(taught[0], wanted, strict=True))
    for name, term in terms.items():
        assert term.dtype == torch.float32
        if name != "balance":
            assert term.item() != term.bfloat16().item(), name


def test_parts_of_one_clip_are_enough_without_contrast():
    assert EncoderTraining(contrastive=0.0, batch_size=4, accumulation=4).part_size == 1


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(tmp_path):
    settings = EncoderTraining(steps=7, batch_size=2, num_frames=2, caption_width=16)
    text = run(tmp_path / "out", settings, None, dry_run=True)
    assert "trained (encoder, distillation, captions, contrast)" in text and "for 7 steps" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": 0.0, "contrastive": 0.0}, "distillation or contrastive must be positive"),
        ({"contrastive": -1.0}, "must be at least 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"batch_size": 6, "accumulation": 6}, "at least 2 per part of a step.* got 6 in 6"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderTraining(**options)


def test_a_teacher_with_other_patches_is_refused(teacher):
    config = VotEncoderConfig.preset("nano")
    with pytest.raises(ValueError, match="patch_size must be the student's, got 16 and 8"):
        build(SHORT, config, teacher)
