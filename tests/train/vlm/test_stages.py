"""The stages of the video-language model: what they train, what they learn from, bit-equal resuming, the record."""

import copy
import csv
import dataclasses
import json
import shutil
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from tests.models.vot.tiny import tiny_tokenizer
from vot_kernels.data.digitworld import generate_episode
from vot_kernels.integrations.patching import patched
from vot_kernels.models.checkpoint import load_checkpoint
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.vot import VotForConditionalGeneration
from vot_kernels.train.perception.batches import digitworld_config
from vot_kernels.train.projector import run as projector_run
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.projector.stage import describe, train_projector
from vot_kernels.train.sft import run as sft_run
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.sft.stage import reason, train_sft
from vot_kernels.train.vlm import answers
from vot_kernels.train.vlm import model as vlm
from vot_kernels.train.vlm.answers import Asked, replies
from vot_kernels.train.vlm.conversations import ConversationBatches, encode, render
from vot_kernels.train.vlm.stage import nats_per_token

SHORT = ProjectorTraining(steps=2, batch_size=2, warmup=2)
SHORT_SFT = SftTraining(steps=2, batch_size=2, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A tokenizer of few episodes, and replies that end early."""
    patch = pytest.MonkeyPatch()
    patch.setattr(vlm, "_TOKENIZER_EPISODES", 6)
    patch.setattr(answers, "MAX_NEW_TOKENS", 4)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
    """A folder with a perception model of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("perception") / "random"
    VotPerceptionModel(digitworld_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def nano(perception):
    return vlm.build_model("nano", perception, seed=0)


@pytest.fixture(scope="module")
def published(perception, tmp_path_factory):
    out = tmp_path_factory.mktemp("projector")
    table = projector_run.run(out, SHORT, perception, eval_clips=2)
    return out / "model", table


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# --- what the model learns from -----------------------------------------------------------------------------


@pytest.mark.parametrize("speak", [describe, reason])
def test_exactly_the_replies_are_learnt(nano, speak):
    _, processor = nano
    conversations = [speak(generate_episode("train", n), np.random.default_rng(n)) for n in range(3)]
    batch = encode(processor, conversations)
    ids, labels, positions = (batch[name][0] for name in ("input_ids", "labels", "position_ids"))
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    assert len(starts) == len(conversations) + 1
    for start, stop, conversation in zip(starts, starts[1:], conversations, strict=False):
        assert positions[start:stop].tolist() == [*range(stop - start)]
        learnt = [*(labels[start:stop] >= 0).nonzero().flatten() + start]
        assert torch.equal(labels[learnt], ids[learnt])
        said = "".join(f"{turn.reply}<|im_end|>" for turn in conversation.turns)
        assert processor.tokenizer.decode(labels[learnt]) == said
        text = processor.tokenizer.decode(ids[start:stop])
        assert all(turn.prompt in text for turn in conversation.turns)


def test_packed_conversations_do_not_see_one_another(nano):
    model, processor = nano
    speakers = [describe, reason, reason]
    conversations = [
        s(generate_episode("train", n), np.random.default_rng(n)) for n, s in enumerate(speakers)
    ]
    with patched(model), torch.no_grad():
        packed = model(**encode(processor, conversations), use_cache=False).logits
        alone = [model(**encode(processor, [one]), use_cache=False).logits for one in conversations]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_a_graph_may_be_shown_without_its_clip(nano):
    _, processor = nano
    rng = np.random.default_rng(0)
    shown = [reason(generate_episode("train", n), rng, frames=0.5).clip is not None for n in range(24)]
    assert 4 <= sum(shown) <= 20
    batch = encode(processor, [reason(generate_episode("train", 0), rng, frames=0.0)])
    assert "pixel_values_videos" not in batch and "graph_nodes" in batch


def test_a_prompt_is_tokenized_in_training_as_for_an_answer(nano):
    _, processor = nano
    conversation = reason(generate_episode("train", 3), np.random.default_rng(0))
    ids = encode(processor, [conversation])["input_ids"][0]
    content = [{"type": "video", "video": conversation.clip}, {"type": "graph", "graph": conversation.graph}]
    message = {"role": "user", "content": [*content, {"type": "text", "text": conversation.turns[0].prompt}]}
    prompt = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)


def test_batches_depend_on_seed_and_step_alone(nano):
    _, processor = nano
    one, again, other = (ConversationBatches(processor, reason, 0, 2)[step] for step in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])


def test_a_conversation_has_as_many_questions_as_wanted(nano):
    counts = {
        wanted: [
            len(
                reason(
                    generate_episode("train", n), np.random.default_rng(n), frames=0, questions=wanted
                ).turns
            )
            for n in range(8)
        ]
        for wanted in (1, 3, 14)
    }
    assert {*counts[1]} == {1} and max(counts[3]) == 3 and max(counts[14]) > 7


# --- what is trained ----------------------------------------------------------------------------------------


def test_a_new_model_finds_again_what_it_reads(nano):
    """Heads of the first layer look back by one token, two, …, some of the second at what followed the same words."""
    model, processor = nano
    llama = model.model.language_model
    llama.set_attn_implementation("eager")
    names = "red digit 5", "cyan digit 2", "blue digit 7", "green digit 1", "white digit 3", "orange digit 8"
    graph = "\n".join(f"o{n}={name}" for n, name in enumerate(names))
    found = []
    for n, name in enumerate(names):
        ids = processor.tokenizer(f"{graph}\no{n}={name[:-2]}")["input_ids"]
        with torch.no_grad():
            first, second, *_ = llama(torch.tensor([ids]), output_attentions=True).attentions
        for head, weights in enumerate(first[0]):
            assert weights[-1].argmax() == len(ids) - 2 - head
        words = [processor.tokenizer.decode([token]).strip() for token in ids]
        follows = words.index(name.split()[0]) + 2
        found.append(second[0, :, -1, follows].max().item() * len(ids))
    assert np.median(found) > 4, found  # times chance


def test_the_encoder_is_that_of_the_perception_checkpoint(nano, perception):
    model, processor = nano
    encoder = load_checkpoint(VotPerceptionModel, perception).encoder
    for name, weight in encoder.state_dict().items():
        assert torch.equal(model.model.encoder.state_dict()[name], weight)
    assert sum(vlm.count_parameters(model).values()) == sum(p.numel() for p in model.parameters()) < 8_000_000
    assert processor.tokenizer.decode(processor.tokenizer("Σ ≥ o1=red digit 37")["input_ids"]) == (
        "Σ ≥ o1=red digit 37"
    )


def test_each_stage_trains_its_parts(nano, tmp_path):
    model, processor = nano
    before = parameters(model)
    assert train_projector(tmp_path / "a", model, processor, SHORT, stop_at=2) == 2
    assert {vlm.part_of(name) for name in changed(model, before)} == {"projector", "graph", "text"}
    before = parameters(model)
    assert train_sft(tmp_path / "b", model, processor, SHORT_SFT, stop_at=2) == 2
    assert {vlm.part_of(name) for name in changed(model, before)} == {"projector", "graph", "text"}


def test_a_frozen_language_model_and_adapters(perception, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft: pip install 'vot-kernels[rl]'")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = tmp_path / "language"
    language = LlamaForCausalLM(text)
    copy.deepcopy(language).half().save_pretrained(folder)  # as SmolLM2 is kept
    tokenizer.save_pretrained(folder)
    model, processor = vlm.build_model("smollm2", perception, 0, folder)
    weights = language.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, weights.half().float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    settings = dataclasses.replace(SHORT, language_model="smollm2")
    before = parameters(model)
    train_projector(tmp_path / "a", model, processor, settings, stop_at=2)
    assert {vlm.part_of(name) for name in changed(model, before)} == {"projector", "graph"}

    adapted = vlm.add_lora(model, seed=0)
    before = parameters(adapted)
    train_sft(tmp_path / "b", adapted, processor, dataclasses.replace(SHORT_SFT, text="lora"), stop_at=2)
    assert {vlm.part_of(name) for name in changed(adapted, before)} == {"projector", "graph", "lora"}
    merged = adapted.merge_and_unload()
    assert isinstance(merged, VotForConditionalGeneration)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_other_parts_are_found(nano):
    model, _ = nano
    vlm.train_only(model, ("projector",))
    vlm.check_trained(model, ("projector",))
    with pytest.raises(RuntimeError, match="is not trained, but the stage trains exactly projector, graph"):
        vlm.check_trained(model, ("projector", "graph"))
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="is trained, but the stage trains exactly projector"):
        vlm.check_trained(model, ("projector",))
    with pytest.raises(ValueError, match="A part must be one of encoder"):
        vlm.train_only(model, ("eyes",))
    with pytest.raises(ValueError, match="no parameters of the part 'lora'"):
        vlm.train_only(model, ("lora",))


def test_metrics_are_of_all_clips(nano):
    """Of three clips in batches of two, the last batch has one."""
    model, processor = nano
    by_two, by_one = (ConversationBatches(processor, describe, 0, size, split="test") for size in (2, 1))
    assert [int((batch["position_ids"] == 0).sum()) for batch in by_two.first(3)] == [2, 1]
    likelihood = nats_per_token(model, by_two, 3)
    assert likelihood == pytest.approx(nats_per_token(model, by_one, 3), abs=1e-3)
    assert likelihood != pytest.approx(nats_per_token(model, by_two, 2), abs=1e-3)


@pytest.mark.parametrize("count", [0, -1])
def test_metrics_need_clips(tmp_path, count):
    """That is found out before a model is loaded: there is none in these folders."""
    for run in (
        lambda: projector_run.run(tmp_path / "out", SHORT, tmp_path, eval_clips=count),
        lambda: sft_run.run(tmp_path / "out", tmp_path, SHORT_SFT, eval_clips=count),
    ):
        with pytest.raises(ValueError, match=f"eval_clips must be at least 1, got {count}"):
            run()
    assert not list(tmp_path.iterdir())


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "settings"),
    [
        (train_projector, SHORT),
        (train_sft, SHORT_SFT),
        (train_sft, dataclasses.replace(SHORT_SFT, accumulation=2, frames=0.0)),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(perception, tmp_path, train, settings):
    results = []
    for name, stops in (("whole", (None,)), ("parts", (1, None))):
        for stop in stops:
            model, processor = vlm.build_model("nano", perception, seed=0)
            train(tmp_path / name, model, processor, settings, stop_at=stop)
        results.append(parameters(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    other, processor = vlm.build_model("nano", perception, seed=1)
    with pytest.raises(ValueError, match="start was"):
        train(tmp_path / "whole", other, processor, settings)


def test_a_step_in_parts_is_the_step_as_a_whole(perception, tmp_path):
    """Each token of the replies counts equally, however many a part has."""
    settings, seen = SftTraining(steps=1, batch_size=4, warmup=0, frames=0.0), {}
    for parts in (1, 2, 4):
        model, processor = vlm.build_model("nano", perception, seed=0)
        cut = dataclasses.replace(settings, accumulation=parts)
        reports = []
        with (  # the gradients stay
            mock.patch("torch.optim.AdamW.step", lambda self: None),
            mock.patch("torch.optim.AdamW.zero_grad", lambda self, set_to_none: None),
        ):
            train_sft(
                tmp_path / str(parts),
                model,
                processor,
                cut,
                report=lambda step, terms, to=reports: to.append(terms["loss"]),
            )
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        seen[parts] = (reports[0], gradients)
    for parts in (2, 4):
        assert seen[parts][0] == pytest.approx(seen[1][0], rel=1e-5)
        torch.testing.assert_close(seen[parts][1], seen[1][1], rtol=1e-3, atol=1e-5)


def test_the_record_says_from_which_step_its_seconds_count(published, tmp_path, monkeypatch):
    """The time of what was done before an interruption is not known."""

    def record(out, settings=SHORT_SFT):
        sft_run.run(out, published[0], settings, eval_clips=1)
        return json.loads((out / "model" / "training.json").read_text())

    assert "resumed_at_step" not in record(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            sft_run, "STAGE", dataclasses.replace(sft_run.STAGE, train=partial(train_sft, stop_at=1))
        )
        record(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    assert record(tmp_path / "parts")["resumed_at_step"] == 1


@pytest.mark.parametrize("adapters", [False, True])
def test_sft_measures_as_it_goes(published, tmp_path, adapters):
    """What it measures after the last step is what is measured at the end."""
    settings = dataclasses.replace(
        SHORT_SFT, validate_every=2, validation_clips=2, text="lora" if adapters else "all"
    )
    sft_run.run(tmp_path, published[0], settings, eval_clips=2)
    check_log(tmp_path, "nats")


def test_projector_measures_as_it_goes(perception, tmp_path):
    settings = dataclasses.replace(SHORT, validate_every=2, validation_clips=2)
    projector_run.run(tmp_path, settings, perception, eval_clips=2)
    check_log(tmp_path, "both")


def check_log(out, name):
    with (out / "log.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    after = json.loads((out / "model" / "training.json").read_text())["metrics"]["after"]
    assert [row[f"held_out/{name}"] for row in rows[:-1]] == [""]
    assert float(rows[-1][f"held_out/{name}"]) == pytest.approx(after[name], rel=1e-4)


@pytest.mark.fixed_seed  # a few steps of training
def test_training_lowers_the_loss(nano, tmp_path):
    model, processor = nano
    batches = ConversationBatches(processor, describe, 0, 2)
    before = nats_per_token(model.eval(), batches, 2)
    train_projector(tmp_path, model, processor, ProjectorTraining(steps=12, batch_size=2, warmup=2))
    assert nats_per_token(model, batches, 2) < before - 0.5


def test_the_published_model_and_its_record(published, perception):
    folder, table = published
    record = json.loads((folder / "training.json").read_text())
    assert record["metrics"].keys() == {"before", "after"} and "graph" in table
    assert record["trained"] == ["projector", "graph", "text"]
    assert record["command"].startswith(f"vot train projector --checkpoint {perception} --eval-clips 2 --")
    model, processor = vlm.load_vlm(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = AutoModelForImageTextToText.from_pretrained(folder)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    assert processor.num_frames == vlm.NUM_FRAMES and processor.chat_template
    episode = generate_episode("test", 0)
    (reply,) = replies(model, processor, [Asked(render(episode), episode.stsg, "Who?", None)])
    assert isinstance(reply, str)
    assert (
        projector_run.run(folder.parent, SHORT, perception, eval_clips=2) == table
    )  # it is not trained again


def test_a_finished_run_is_one_that_began_with_the_same_weights(published, perception, tmp_path, monkeypatch):
    """Folders of the same name may hold other weights."""
    folder, table = published
    sft = tmp_path / "sft"
    sft_run.run(sft, folder, SHORT_SFT, eval_clips=1)
    others = tmp_path / folder.name, tmp_path / perception.name
    for source, other in zip((folder, perception), others, strict=True):
        shutil.copytree(source, other)
        weights = load_file(other / "model.safetensors")
        save_file({name: -w for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})

    class Trained(Exception):
        """The run was not taken for a finished one."""

    def trained(*_, **__):
        raise Trained

    monkeypatch.setattr(sft_run, "load_vlm", trained)
    monkeypatch.setattr(projector_run, "build_model", trained)
    assert projector_run.run(folder.parent, SHORT, perception, eval_clips=2) == table
    sft_run.run(sft, folder, SHORT_SFT, eval_clips=1)
    with pytest.raises(Trained):
        sft_run.run(sft, others[0], SHORT_SFT, eval_clips=1)
    with pytest.raises(Trained):
        projector_run.run(folder.parent, SHORT, others[1], eval_clips=2)


def test_sft_goes_on_from_a_published_model(published, tmp_path):
    folder, _ = published
    table = sft_run.run(tmp_path, folder, SHORT_SFT, eval_clips=7)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["metrics"]["after"]["nats"] < record["metrics"]["before"]["nats"]
    assert record["command"].startswith(f"vot train sft {folder} --eval-clips 7 --")
    assert " --text all" in record["command"]
    assert {"format", "accuracy", "counterfactual"} <= record["metrics"]["after"].keys()
    assert "accuracy" in table
