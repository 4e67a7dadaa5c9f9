"""The video-language model: loading, the places of features, generation, streams, and what others do with it."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import vot_kernels
from tests.models.vot.tiny import (
    conversation,
    prepare,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from vot_kernels.data.digitworld import generate_episode
from vot_kernels.models.encoder import VotEncoder
from vot_kernels.models.vot import PLACEHOLDERS, VotConfig, VotForConditionalGeneration, VotProcessor
from vot_kernels.models.vot.modeling import FEATURE_INPUTS, VotProjector
from vot_kernels.testing import shifted

CAUSAL = {"causal": "group", "full_attention_every": 0}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(shifted(0))
    return tiny_model()


@pytest.fixture(scope="module")
def fixed_model():
    """The model of tests that compare words, which near ties could turn."""
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(processor):
    return prepare(
        processor, conversation(0), conversation(1, frames=6, text="and this one, which is longer?")
    )


def greedy(model, inputs, **options):
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return new[:, inputs["input_ids"].shape[1] :]


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "50KB"])
def test_auto_classes_load_what_was_saved(model, processor, inputs, tmp_path, shards):
    model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    processor.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VotConfig)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again, VotForConditionalGeneration)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(reader, VotProcessor)
    other = prepare(reader, conversation(0), conversation(1, frames=6, text="and this one, which is longer?"))
    assert other.keys() == inputs.keys()
    assert all(torch.equal(other[name], inputs[name]) for name in inputs)


def test_tied_weights_stay_tied(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VotForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, again):
        assert one.lm_head.weight is one.get_input_embeddings().weight


def test_another_folder_is_refused(tmp_path):
    VotEncoder(tiny_config().vision_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a vot, but it holds a vot_encoder"):
        VotForConditionalGeneration.from_pretrained(tmp_path)


def test_parts_keep_their_weights():
    torch.manual_seed(shifted(1))
    config = tiny_config()
    encoder = VotEncoder(config.vision_config)
    text = copy.deepcopy(config.text_config)
    text.vocab_size -= 3  # the placeholders are new to it
    language_model = LlamaForCausalLM(text)
    whole = VotForConditionalGeneration.from_parts(config, encoder, copy.deepcopy(language_model))
    for name, weight in encoder.state_dict().items():
        assert torch.equal(whole.model.encoder.state_dict()[name], weight)
    table = whole.get_input_embeddings().weight
    assert torch.equal(table[: text.vocab_size], language_model.get_input_embeddings().weight)
    assert whole.lm_head.weight is table


def test_any_causal_language_model(processor):
    text = GPT2Config(vocab_size=len(processor.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=512)
    whole = tiny_model(tiny_config(text))
    batch = prepare(processor, conversation(2))
    assert whole(**batch).logits.shape == (*batch["input_ids"].shape, len(processor.tokenizer))
    assert greedy(whole, batch).shape == (1, 6)


def test_logits_changed_after_the_head_are_refused():
    text = {"model_type": "gemma2", "final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        VotConfig(text_config=text)


# --- features -----------------------------------------------------------------------------------------------


def test_squares_of_patches_are_merged():
    config = tiny_config()
    grid = torch.tensor([[2, 4, 6], [1, 2, 2]])
    tokens = torch.arange(52.0)[:, None].expand(-1, 32)
    projector = VotProjector(config, 8)
    seen = []
    projector.norm = torch.nn.Identity()
    projector.up.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    assert projector(tokens, grid).shape == (13, 8)
    squares = seen[0].view(13, 4, 32)[:, :, 0]
    assert squares[0].tolist() == [0, 1, 6, 7]
    assert squares[4].tolist() == [14, 15, 20, 21]
    assert squares[12].tolist() == [48, 49, 50, 51]
    with pytest.raises(ValueError, match="3 × 2 patches"):
        projector(tokens[:6], torch.tensor([[1, 3, 2]]))


def test_every_kind_of_input_reaches_the_logits(model, inputs):
    before = model(**inputs).logits
    for name in ("pixel_values", "pixel_values_videos", "graph_boxes"):
        changed = {**inputs, name: inputs[name] + 0.5}
        assert not torch.allclose(model(**changed).logits, before, atol=1e-4)


def test_a_clip_does_not_depend_on_its_neighbours(model, processor, inputs):
    alone = prepare(processor, conversation(1, frames=6, text="and this one, which is longer?"))
    together = model(**inputs).logits[1, -alone["input_ids"].shape[1] :]
    torch.testing.assert_close(together, model(**alone).logits[0], atol=1e-4, rtol=1e-4)


def test_times_stand_before_frames(processor):
    clip = generate_episode("train", 0).frames()[:3]
    metadata = {"fps": 10.0, "frames_indices": [0, 5, 21]}
    batch = processor(videos=[clip], text="<|video|>!", video_metadata=[metadata])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    frame = PLACEHOLDERS[1] * 16
    assert text == f"0.0s{frame}0.5s{frame}2.1s{frame}!"
    assert batch["video_fps"].tolist() == pytest.approx([2 / 2.1])


def test_frames_of_odd_sizes_become_whole_squares(processor, model):
    images = [np.zeros((h, w, 3), np.uint8) for h, w in ((50, 41), (64, 64), (33, 100))]
    batch = processor(images=images, text="<|image|>" * 3, return_tensors="pt")
    assert (batch["image_grid_thw"][:, 1:] % 2 == 0).all()
    assert torch.isfinite(model(**batch).logits).all()


def test_an_empty_graph_has_no_tokens(processor, model):
    from vot_kernels.scene_graph import STSG

    batch = processor(graphs=STSG((0.0, 1.0)), text="<|graph|>nothing", return_tensors="pt")
    assert batch["input_ids"].shape == (1, len("nothing"))
    assert torch.isfinite(model(**batch).logits).all()


def test_wrong_counts_are_one_sentence(processor, model, inputs):
    clip = generate_episode("train", 0).frames()[:2]
    with pytest.raises(ValueError, match=r"The text has 2 <\|video\|>, but 1 videos are given"):
        processor(videos=[clip], text="<|video|><|video|>")
    for kind in ("image", "video", "graph"):
        token = getattr(model.config, f"{kind}_token_id")
        ids = inputs["input_ids"].clone()
        ids[ids == token] = 7
        with pytest.raises(ValueError, match=f"The text has 0 {kind} tokens, but the {kind} features are"):
            model(**{**inputs, "input_ids": ids})
    without = {name: value for name, value in inputs.items() if name not in FEATURE_INPUTS}
    with pytest.raises(ValueError, match="image tokens, but the image features are 0"):
        model(**without)
    with pytest.raises(ValueError, match="one of them is None"):
        model(**{**inputs, "image_grid_thw": None})
    with pytest.raises(ValueError, match="do_sample_frames must be False"):
        processor(videos=[clip], text="<|video|>", do_sample_frames=True)
    with pytest.raises(ValueError, match="no token"):
        tokenizer = tiny_tokenizer()
        VotProcessor(processor.image_processor, _without_placeholders(tokenizer))


def _without_placeholders(tokenizer):
    known = tokenizer.get_vocab()
    tokenizer.get_vocab = lambda: {word: n for word, n in known.items() if word not in PLACEHOLDERS}
    return tokenizer


def test_half_precision_reads_the_same(inputs):
    torch.manual_seed(shifted(0))
    model = tiny_model(tiny_config(vision={"aoe_every": 0}))  # rounding may turn the choice of experts
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.set_attn_implementation(
        "eager"
    )  # PyTorch's kernel refuses bfloat16 on CPUs without vector instructions
    real = inputs["attention_mask"].bool()
    logits, expected = half(**inputs).logits[real], model(**inputs).logits[real]
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.02 * expected.norm()


# --- generation ---------------------------------------------------------------------------------------------


@pytest.mark.fixed_seed  # compares words
def test_the_cache_changes_nothing(fixed_model, inputs):
    assert torch.equal(greedy(fixed_model, inputs), greedy(fixed_model, inputs, use_cache=False))


@pytest.mark.fixed_seed  # compares words
def test_a_batch_answers_as_each_alone(fixed_model, processor, inputs):
    together = greedy(fixed_model, inputs)
    for row, text, frames in ((0, "what is it?", 4), (1, "and this one, which is longer?", 6)):
        alone = prepare(processor, conversation(row, frames=frames, text=text))
        assert torch.equal(greedy(fixed_model, alone)[0], together[row])


@pytest.mark.fixed_seed  # compares words
def test_samples_are_repeated_with_what_they_show(fixed_model, inputs):
    once = greedy(fixed_model, inputs)
    beams = greedy(fixed_model, inputs, num_beams=2, num_return_sequences=2)
    assert beams.shape[0] == 4
    torch.manual_seed(shifted(0))
    sampled = fixed_model.generate(
        **inputs, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=2
    )
    new = sampled[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, once[:, :3].repeat_interleave(2, 0))


def test_placeholders_are_never_generated(processor):
    torch.manual_seed(shifted(0))
    model = tiny_model(tiny_config(LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )))  # fmt: skip
    batch = prepare(processor, conversation(0, kinds=("image",)))
    with torch.no_grad():
        model.lm_head.weight[3] = (
            100 * model.model(**batch).last_hidden_state[0, -1]
        )  # wants to say <|image|>
    assert model(**batch).logits[0, -1].argmax() == model.config.image_token_id
    assert not (greedy(model, batch) == model.config.image_token_id).any()
    own = GenerationConfig(max_new_tokens=3, do_sample=False)  # as trainers pass it
    new = model.generate(**batch, generation_config=own)[:, batch["input_ids"].shape[1] :]
    assert not (new == model.config.image_token_id).any()


# --- training -----------------------------------------------------------------------------------------------


def test_checkpointing_changes_no_gradient(inputs):
    torch.manual_seed(shifted(0))
    model = tiny_model().train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    for block in (*model.model.encoder.blocks, *model.model.language_model.layers):
        assert block.gradient_checkpointing
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = gradients()
    assert len(calls) == 2 * 4  # each of the four blocks is computed twice
    assert plain.keys() == kept.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient, atol=1e-6, rtol=1e-4)


def test_every_parameter_learns(inputs):
    torch.manual_seed(shifted(0))
    model = tiny_model().train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    # The encoder pools for others, and its size embedding begins at 0.
    assert {name for name in idle if ".pooling." not in name and ".size_embedding.fc1." not in name} == set()


def test_lora_on_the_language_model(inputs, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(shifted(0))
    base = tiny_model()
    config = peft.LoraConfig(
        r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in name and "lora_" in name for name in trained)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert greedy(model, inputs).shape == (2, 6)


def test_language_model_on_our_attention(model, inputs):
    plain = model(**inputs).logits
    patched = copy.deepcopy(model)
    report = vot_kernels.patch(patched)
    assert [m for m in report.replaced if "language_model" in m.name]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(patched(**inputs).logits[real], plain[real], atol=1e-4, rtol=1e-4)
    for implementation in ("eager", "sdpa"):
        other = copy.deepcopy(model)
        other.set_attn_implementation(implementation)
        torch.testing.assert_close(other(**inputs).logits[real], plain[real], atol=1e-4, rtol=1e-4)


# --- streams ------------------------------------------------------------------------------------------------


def test_a_stream_equals_the_clip(processor):
    torch.manual_seed(shifted(0))
    model = tiny_model(tiny_config(vision=CAUSAL))
    clip = generate_episode("train", 0).frames()[:5]
    pieces = [processor(text="look: ", return_tensors="pt")]
    pieces += [processor(videos=[frame[None]], text="<|video|>", return_tensors="pt") for frame in clip]
    state = None
    for piece in pieces:
        state = model.stream(**piece, state=state)
    question = processor(text=" who moves?", return_tensors="pt")["input_ids"]
    ids = torch.cat([state.input_ids, question], 1)
    whole = processor(videos=[clip], text="look: <|video|> who moves?", return_tensors="pt")
    assert torch.equal(ids, whole["input_ids"])
    answer = model.generate(
        ids, past_key_values=copy.deepcopy(state.past_key_values), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(answer, model.generate(**whole, max_new_tokens=6, do_sample=False))
    outputs = model(question, past_key_values=state.past_key_values)
    expected = model(**whole).logits[:, -question.shape[1] :]
    torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_stream_needs_a_causal_encoder_and_single_frames(model, processor):
    clip = generate_episode("train", 0).frames()[:2]
    one = processor(videos=[clip[:1]], text="<|video|>", return_tensors="pt")
    with pytest.raises(ValueError, match="causal"):
        model.stream(**one)
    image = processor(images=[clip[0]], text="<|image|>", return_tensors="pt")
    with pytest.raises(ValueError, match="16 image tokens, but the image features are 0"):
        model.stream(image["input_ids"])
    two = processor(videos=[clip], text="<|video|>", return_tensors="pt")
    with pytest.raises(ValueError, match="one frame at a time"):
        model.stream(**two)
