"""`patch`, `unpatch` and `patched`: the same results, computed by the op, and one sentence for unsupported cases."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    PreTrainedConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.masking_utils import create_causal_mask

import vot_kernels
from tests.integrations.tiny import (
    TEXT,
    VISION_LANGUAGE,
    image_and_text,
    prompts,
    qwen2,
    qwen2_5_vl,
    spread,
)
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.integrations import attention, patching, transformers
from vot_kernels.integrations.attention import NAME, attention_forward
from vot_kernels.testing import make_tensor

OUTPUT, GRADIENT = 2e-5, 2e-4  # relative to the largest number


@pytest.fixture
def calls(monkeypatch):
    """The queries of every call of the op."""
    seen = []

    def counted(q, *arguments, **options):
        seen.append(q)
        return op(q, *arguments, **options)

    op = attention.flash_attn_varlen_func
    monkeypatch.setattr(attention, "flash_attn_varlen_func", counted)
    return seen


def run(model, rows=None, **inputs):
    """Logits where `rows` are real, and the gradients of every parameter that has one."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits = logits if rows is None else logits[rows.bool()]
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_close(found, found_gradients, expected, gradients):
    assert (found - expected).abs().max() <= OUTPUT * expected.abs().max()
    assert found_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():  # the gradient of a key's bias is 0 but for rounding
        error = (found_gradients[name] - gradient).abs().max()
        assert error <= GRADIENT * gradient.abs().max() or error <= 1e-6 * largest, name


def check_same(model, rows=None, **inputs):
    """Outputs and gradients agree, patched and not; they are bitwise equal once it is unpatched."""
    expected, gradients = run(model, rows, **inputs)
    with vot_kernels.patched(model):
        found, found_gradients = run(model, rows, **inputs)
    check_close(found, found_gradients, expected, gradients)
    again, again_gradients = run(model, rows, **inputs)
    assert torch.equal(again, expected)
    assert all(torch.equal(again_gradients[name], gradient) for name, gradient in gradients.items())


def implementations(model):
    """What the configs of a model say, which a patch writes to."""
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if isinstance(getattr(m, "config", None), PreTrainedConfig)
    }
    return [config._attn_implementation for config in configs.values()]


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_a_vision_language_model_is_the_same(kind):
    inputs = image_and_text()
    check_same(VISION_LANGUAGE[kind](), inputs["attention_mask"], **inputs)


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_every_layer_is_one_call_for_the_whole_batch(kind, calls):
    model, inputs = VISION_LANGUAGE[kind](), image_and_text()
    with vot_kernels.patched(model) as report:
        model(**inputs)
    assert len(calls) == 4
    assert [row.after for row in report.replaced] == ["flash_attn_varlen_func"] * 4 + ["linear"]
    assert sorted(q.shape[0] for q in calls) == [26, 26, 48, 48]


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_generate_finds_the_same_tokens(kind):
    model, inputs = VISION_LANGUAGE[kind](), image_and_text()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with vot_kernels.patched(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_gradient_checkpointing(kind, calls):
    model, inputs = VISION_LANGUAGE[kind](), image_and_text()
    model.train()
    expected, gradients = run(model, inputs["attention_mask"], **inputs)
    vot_kernels.patch(model)
    model.gradient_checkpointing_enable()
    found, found_gradients = run(model, inputs["attention_mask"], **inputs)
    assert len(calls) == 8  # every layer twice
    check_close(found, found_gradients, expected, gradients)


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_weights_are_saved_and_loaded_under_the_same_keys(kind, tmp_path):
    model, inputs = VISION_LANGUAGE[kind](), image_and_text()
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs).logits
    vot_kernels.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == keys and NAME not in implementations(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_either_side_and_in_between(implementation):
    model = qwen2(attn_implementation=implementation)
    ids = prompts(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 6:] = mask[2, 3:5] = 0
    check_same(model, mask, input_ids=ids, attention_mask=mask)


def test_padding_is_left_out_of_the_batch(calls, monkeypatch):
    ids = prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = qwen2()
    bounds = []
    op = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention, "flash_attn_varlen_func", lambda *a, **o: bounds.append((a[3], a[4])) or op(*a, **o)
    )
    with vot_kernels.patched(model):
        model(input_ids=ids, attention_mask=mask)
    assert [attending(*pair) for pair in bounds] == [[(5, 5), (9, 9)]] * 2


def attending(cu_q, cu_k):
    """The numbers of queries and keys of the segments that have both."""
    return [pair for pair in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True) if all(pair)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_at_an_end_of_rows_moves_nothing(causal, left):
    """The plan for padding between tokens, which sorts the rows, gives the same; padding may hold anything."""
    real = torch.arange(9) < torch.tensor([[4], [9], [0], [1]])
    real = real.flip(1) if left else real
    q, k, v = (make_tensor(4, 2, 9, 8, seed=i) for i in range(3))
    q, k, v = (x.masked_fill(~real[:, None, :, None], torch.nan) for x in (q, k, v))
    plan = attention._plan_runs(causal, (-1, -1), real, real, 9)
    bounds, order = attention._packed_order(real)
    moving = attention.AttentionPlan(causal, (-1, -1), bounds, bounds, order, order, order.argsort())
    assert plan.rows is None and plan.keys is None and plan.places is None
    found, expected = (attention._attend(nn.Identity(), q, k, v, each, None, None) for each in (plan, moving))
    assert found.isfinite().all() and expected[real].abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_rows_with_padding_between_tokens_are_sorted():
    real = torch.tensor([[True, False, True], [True, True, False]])
    plan = attention._plan_padding(True, (-1, -1), real, real, 3)
    assert plan.keys.tolist() == [0, 2, 3, 4, 1, 5]


def test_a_tower_without_its_pooling_head_is_served():
    """The class declares no flash attention for the head's sake; models for language leave the head out."""
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vision_use_head=False,
    )
    report = vot_kernels.patch(Siglip2VisionModel(config))
    assert len(report.replaced) == 1 and not report.left


def test_keys_of_padding_are_left_out_of_a_padded_tower(monkeypatch):
    """SigLIP 2 declares no flash attention, because its head masks torch's own attention; that takes our mask too."""
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        num_patches=16,
    )
    model, bounds = spread(Siglip2VisionModel(config)), []
    mask = torch.ones(2, 16, dtype=torch.int32)
    mask[0, 8:] = 0
    inputs = {
        "pixel_values": make_tensor(2, 16, 48),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 4], [4, 4]]),
    }
    op = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention, "flash_attn_varlen_func", lambda *a, **o: bounds.append((a[3], a[4])) or op(*a, **o)
    )
    with torch.no_grad():
        expected = model(**inputs)
        with vot_kernels.patched(model) as report:
            found = model(**inputs)
    assert [attending(*pair) for pair in bounds] == [[(16, 8), (16, 16)]] * 2
    assert [row.kind for row in report.left] == ["Siglip2MultiheadAttentionPoolingHead"]
    for name in ("last_hidden_state", "pooler_output"):
        assert (found[name] - expected[name]).abs().max() <= OUTPUT * expected[name].abs().max()


def test_a_sliding_window_counts_as_the_mask_does():
    model = qwen2(
        use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"]
    )
    ids = prompts(2, 9)
    mask = torch.ones_like(ids)
    check_same(model, mask, input_ids=ids)
    mask[0, :2] = 0
    check_same(model, mask, input_ids=ids, attention_mask=mask)
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    with vot_kernels.patched(model):
        assert torch.equal(model.generate(ids, **options), expected)


def test_a_window_over_padding_between_tokens_is_refused():
    model = qwen2(use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 2)
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with vot_kernels.patched(model), pytest.raises(ValueError, match="between their tokens"):
        model(input_ids=prompts(1, 9), attention_mask=mask)


def test_packed_sequences_stay_apart():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]])
    for changes in (
        {},
        {"use_sliding_window": True, "sliding_window": 2, "layer_types": ["sliding_attention"] * 2},
    ):
        check_same(qwen2(**changes), input_ids=prompts(2, 8), position_ids=positions, use_cache=False)


def test_a_copy_of_a_mask_that_lost_its_plan_is_refused_or_as_good():
    model, ids = qwen2(), prompts(1, 8)
    q, k, v = (make_tensor(1, 2, 8, 8, seed=seed) for seed in range(3))
    options = {"inputs_embeds": model.model.embed_tokens(ids), "past_key_values": None}
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with vot_kernels.patched(model):
        packed = create_causal_mask(
            model.config,
            attention_mask=None,
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
            **options,
        )
        padded = create_causal_mask(model.config, attention_mask=padding, **options)
    with pytest.raises(ValueError, match="mask of its own"):
        attention_forward(nn.Module(), q, k, v, packed.clone())
    for queries in (1, 8):  # other attention cannot take it for a mask either
        with pytest.raises(RuntimeError, match="shape|size"):
            nn.functional.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=packed)
    found, expected = (attention_forward(nn.Module(), q, k, v, mask)[0] for mask in (padded.clone(), padded))
    assert torch.equal(found, expected) and (found[:, :3] == 0).all() and (found[:, 3:] != 0).any()


def test_a_prompt_in_two_parts_and_a_static_cache():
    model, ids = qwen2(), prompts(2, 9)
    cache, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        expected = model(ids[:, 5:], past_key_values=cache).logits
        tokens = [model.generate(ids, **options), model.generate(ids, attention_mask=mask, **options)]
        with vot_kernels.patched(model):
            model(ids[:, :5], past_key_values=ours)
            found = model(ids[:, 5:], past_key_values=ours).logits
            assert torch.equal(model.generate(ids, **options), tokens[0])
            assert torch.equal(model.generate(ids, attention_mask=mask, **options), tokens[1])
    assert (found - expected).abs().max() <= OUTPUT * expected.abs().max()


def test_autocast_computes_in_its_dtype(calls):
    model, ids = qwen2(), prompts(2, 9)
    with vot_kernels.patched(model), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
    assert {q.dtype for q in calls} == {torch.bfloat16} and logits.isfinite().all()


def test_values_may_be_narrower_than_keys_and_queries_shared():
    q, k, v = make_tensor(1, 2, 3, 8), make_tensor(2, 2, 5, 8, seed=1), make_tensor(2, 2, 5, 6, seed=2)
    module = nn.Module()
    out, weights = attention_forward(module, q, k, v, None, scaling=0.3, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, v, scale=0.3)
    assert weights is None and out.is_contiguous()
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("longest", [None, 0, 100, torch.tensor(1)])
def test_cumulative_lengths_are_obeyed_whatever_the_maximum_says(longest):
    q, k, v = (make_tensor(1, 2, 7, 8, seed=seed) for seed in range(3))
    bounds = torch.tensor([0, 3, 3, 7])
    lengths = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    out, _ = attention_forward(nn.Module(), q, k, v, None, is_causal=False, **lengths)
    parts = [
        nn.functional.scaled_dot_product_attention(*(x[:, :, begin:end] for x in (q, k, v)))
        for begin, end in ((0, 3), (3, 7))
    ]
    assert torch.allclose(out, torch.cat(parts, 2).transpose(1, 2), atol=1e-5)


def test_causality_comes_from_the_module_or_the_call():
    q, k, v = (make_tensor(1, 2, 5, 8, seed=seed) for seed in range(3))
    module = nn.Module()
    for of_module, of_call, causal in (
        (True, None, True),
        (False, None, False),
        (False, True, True),
        (True, False, False),
    ):
        module.is_causal = of_module
        out, _ = attention_forward(module, q, k, v, None, is_causal=of_call)
        expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def test_the_report():
    model = qwen2_5_vl()
    report = vot_kernels.patch(model)
    assert len(report.replaced) == 5 and report.left == ()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["replaced"] == 5 and found["left"] == 0
    assert found["modules"][0] == {
        "name": "model.visual.blocks.0.attn",
        "kind": "Qwen2_5_VLVisionAttention",
        "before": "sdpa",
        "after": "flash_attn_varlen_func",
        "backend": "cpp" if why_not_cpp("cpu") is None else "torch",
        "reason": "",
        "note": "",
    }
    text = str(report).splitlines()
    assert text[0] == "5 of 5 modules replaced" and len(text) == 4
    assert "model.visual.blocks.0.attn to model.visual.blocks.1.attn: sdpa -> " in text[1]
    assert text[3] == "  1 x Conv3d, model.visual.patch_embed.proj: conv -> linear (torch)"


def test_a_submodule_alone():
    model = qwen2_5_vl()
    before = implementations(model)
    vot_kernels.patch(model.model.visual)
    assert model.config.vision_config._attn_implementation == NAME
    assert model.config.text_config._attn_implementation == model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="patched already"):
        vot_kernels.patch(model)
    with pytest.raises(ValueError, match="the very module"):
        vot_kernels.unpatch(model)
    vot_kernels.unpatch(model.model.visual)
    assert implementations(model) == before


def test_a_copy_of_a_patched_model_is_patched_by_itself():
    model = qwen2()
    vot_kernels.patch(model)
    other = copy.deepcopy(model)
    vot_kernels.unpatch(other)
    assert set(implementations(model)) == {NAME} and set(implementations(other)) == {"sdpa"}
    vot_kernels.unpatch(model)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("part", ["all", "tower"])
def test_a_model_of_a_patched_config_has_its_attention(part, copied, calls):
    model, inputs = qwen2_5_vl(), image_and_text()
    target = model if part == "all" else model.model.visual
    vot_kernels.patch(target)
    config = copy.deepcopy(model.config) if copied else model.config
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    assert implementations(other) == implementations(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, other(**inputs).logits
    assert len(calls) == (8 if part == "all" else 4)
    assert (found - expected).abs().max() <= OUTPUT * expected.abs().max()
    vot_kernels.unpatch(target)
    assert set(implementations(model)) == {"sdpa"}
    assert (NAME in implementations(other)) == copied, "a copy of a config is by itself"


def test_a_model_of_a_copied_config_can_be_given_another_implementation_and_patched():
    model = qwen2()
    vot_kernels.patch(model)
    other = AutoModel.from_config(copy.deepcopy(model.config))
    other.set_attn_implementation("sdpa")
    assert set(implementations(other)) == {"sdpa"} and set(implementations(model)) == {NAME}
    vot_kernels.patch(other)
    vot_kernels.unpatch(other)
    assert set(implementations(other)) == {"sdpa"}


def test_a_model_of_a_patched_config_is_loaded_with_its_attention(tmp_path):
    model, ids = qwen2(), prompts(2, 9)
    vot_kernels.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, config=model.config).eval()
    assert set(implementations(loaded)) == {NAME}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_that_names_its_flash_attention_takes_ours_from_a_config(monkeypatch):
    model = qwen2()
    monkeypatch.setattr(
        type(model), "_compatible_flash_implementations", ["flash_attention_4"], raising=False
    )
    vot_kernels.patch(model)
    assert set(implementations(type(model)(model.config))) == {NAME}


def test_other_names_are_still_checked_when_a_model_is_built():
    config = qwen2().config
    attention.register_attention()
    config._attn_implementation = "none_such"
    with pytest.raises(ValueError, match="none_such"):
        AutoModel.from_config(config)


def test_an_implementation_set_since_is_kept():
    model = qwen2()
    vot_kernels.patch(model)
    model.config._attn_implementation = "eager"
    vot_kernels.unpatch(model)
    assert set(implementations(model)) == {"eager"}


def test_patched_ends_with_an_exception_too():
    model = qwen2()
    with pytest.raises(KeyError), vot_kernels.patched(model):
        raise KeyError
    assert set(implementations(model)) == {"sdpa"}
    with pytest.raises(ValueError, match="not patched"):
        vot_kernels.unpatch(model)


def test_twice_is_an_error_that_changes_nothing():
    model = qwen2()
    vot_kernels.patch(model)
    with pytest.raises(ValueError, match=r"^The model is patched already; call vot_kernels.unpatch first\.$"):
        vot_kernels.patch(model)
    vot_kernels.unpatch(model)
    assert set(implementations(model)) == {"sdpa"}


def test_no_module_is_a_type_error():
    with pytest.raises(TypeError, match="got str"):
        vot_kernels.patch("qwen2")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "GptOssAttention uses sinks"),
        ("gemma2", {}, r"Gemma2Attention uses softcap \(50.0\)"),
        ("bloom", {}, "BloomAttention: it does not look its function up"),
        ("t5", {}, "T5Attention"),
    ],
)
def test_what_cannot_be_served_is_named_and_left_alone(name, changes, reason):
    model = AutoModel.from_config(AutoConfig.for_model(name, **TEXT | changes))
    before = implementations(model)
    with pytest.raises(
        ValueError, match=f"^Nothing in .* can be replaced. Looked for .* and found .*{reason}"
    ):
        vot_kernels.patch(model)
    assert implementations(model) == before


def test_what_one_module_of_a_config_cannot_none_does():
    model = qwen2()
    model.model.layers[1].self_attn.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="softcap"):
        vot_kernels.patch(model)
    assert set(implementations(model)) == {"sdpa"}


def test_a_part_that_cannot_stays_and_the_report_says_why():
    model = nn.ModuleDict({"text": qwen2(), "other": nn.MultiheadAttention(8, 2)})
    report = vot_kernels.patch(model)
    assert len(report.replaced) == 2
    [left] = report.left
    assert (left.name, left.kind) == ("other", "MultiheadAttention") and "does not look" in left.reason
    assert (
        str(report).splitlines()[2].startswith("  1 x MultiheadAttention, other: stays as it is: it does not")
    )


def test_quantised_projections_are_mentioned():
    model = qwen2()
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_buffer("codes", torch.zeros(3, dtype=torch.int8))
    report = vot_kernels.patch(model)
    assert report.replaced[0].note == "its quantised projections stay as they are"
    assert report.replaced[1].note == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "position bias"),
        ({"output_attentions": True}, "attention weights"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "mask of its own for every pair of tokens"),
    ],
)
def test_a_call_that_asks_for_more_is_refused_in_one_sentence(options, words):
    q = make_tensor(1, 2, 5, 8)
    with pytest.raises(ValueError, match=words) as caught:
        attention_forward(nn.Module(), q, q, q, **{"attention_mask": None} | options)
    assert str(caught.value).count(". ") == 0


def test_a_mask_function_of_a_model_is_refused():
    model = qwen2()
    embeddings = torch.zeros(1, 5, 32)
    with vot_kernels.patched(model), pytest.raises(ValueError, match="this model asks for"):
        create_causal_mask(model.config, embeddings, None, None, or_mask_function=lambda b, h, q, k: q >= 0)


def test_the_names_are_the_same_everywhere():
    for name in ("patch", "unpatch", "patched"):
        assert getattr(vot_kernels, name) is getattr(patching, name) is getattr(transformers, name)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    model = qwen2()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"^Patching a model needs transformers: pip install 'vot-kernels\[llm\]'"
    ):
        vot_kernels.patch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_of_each_row_reads_the_cache_as_many_do(padded, dtype, calls):
    """A single query of a row goes to PyTorch, and says what the op does."""
    model = qwen2().to(dtype).eval()
    ids = torch.randint(5, 60, (3, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = mask[2, :8] = 0
    with torch.no_grad(), vot_kernels.patched(model):
        whole = model(ids, attention_mask=mask).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        before = len(calls)
        step = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert len(calls) == before > 0
    assert (step - whole).abs().max() <= (OUTPUT if dtype == torch.float32 else 0.03) * whole.abs().max()
