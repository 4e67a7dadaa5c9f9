"""A patched model still works with videos, adapters, compilation, sharding and a trainer."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import vot_kernels
from tests.integrations.tiny import (
    TEXT,
    VISION_LANGUAGE,
    image_and_text,
    prompts,
    qwen2,
    spread,
    video_and_text,
)
from vot_kernels.integrations import attention
from vot_kernels.testing import make_tensor

both_models = pytest.mark.parametrize("kind", VISION_LANGUAGE)
OUTPUT, GRADIENT = 2e-5, 2e-4  # relative to the largest number


@pytest.fixture
def calls(monkeypatch):
    """The queries of every call of the op."""
    seen = []
    op = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention, "flash_attn_varlen_func", lambda q, *a, **o: seen.append(q) or op(q, *a, **o)
    )
    return seen


def run(model, inputs):
    """Logits of real rows, and the gradients of every parameter that has one."""
    model.zero_grad()
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_close(found, expected):
    (logits, gradients), (expected_logits, expected_gradients) = found, expected
    assert (logits - expected_logits).abs().max() <= OUTPUT * expected_logits.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= GRADIENT * gradient.abs().max() or error <= 1e-6 * largest, name


@both_models
def test_generate_after_a_video_finds_the_same_tokens(kind, calls):
    model, inputs = VISION_LANGUAGE[kind](), video_and_text(kind)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert not calls
    with vot_kernels.patched(model):
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert calls


@both_models
def test_a_video_is_the_same(kind):
    model, inputs = VISION_LANGUAGE[kind](), video_and_text(kind)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = run(model, inputs)
    with vot_kernels.patched(model):
        check_close(run(model, inputs), expected)


@pytest.mark.parametrize("patch_first", [True, False])
@both_models
def test_adapters_train_alone(kind, patch_first, calls):
    peft = pytest.importorskip("peft")
    layers = r".*(qkv|[qkvo]_proj|gate_proj|up_proj|down_proj|linear_fc1|patch_embed\.proj)"
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    inputs = image_and_text()
    results = []
    for patched in (False, True):
        model = VISION_LANGUAGE[kind]()
        if patched and patch_first:
            vot_kernels.patch(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        if patched and not patch_first:
            vot_kernels.patch(adapted)
        results.append(run(adapted, inputs))
    check_close(*results[::-1])
    assert len(calls) == 4
    gradients = results[1][1]
    assert gradients and all("lora_" in name for name in gradients)
    assert any("patch_embed" in name for name in gradients)
    vot_kernels.unpatch(model if patch_first else adapted)
    again = run(adapted, inputs)
    assert torch.equal(again[0], results[0][0])


def mixtral():
    config = MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return spread(MixtralForCausalLM(config))


def test_adapters_on_fused_experts():
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=targets, lora_dropout=0.0, init_lora_weights=False
    )
    model = peft.get_peft_model(mixtral(), config)
    ids = prompts(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = run(model, inputs)
    with vot_kernels.patched(model) as report:
        found = run(model, inputs)
    assert [row.after for row in report.replaced].count("moe") == 2
    check_close(found, expected)
    assert len(expected[1]) == 8 and all("lora_" in name for name in expected[1])


@both_models
def test_autocast_is_as_far_from_full_precision_as_it_was(kind, calls):
    model, inputs = VISION_LANGUAGE[kind](), image_and_text()
    exact, _ = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        before, _ = run(model, inputs)
        with vot_kernels.patched(model):
            after, gradients = run(model, inputs)
    assert {q.dtype for q in calls} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (after - exact).square().mean() <= 4 * (before - exact).square().mean()


@both_models
def test_a_layer_of_a_tower_compiles_whole_for_all_packings(kind):
    """Unpatched, it reads the lengths of all images from the device, which no whole graph can."""
    tower = VISION_LANGUAGE[kind]().model.visual.eval()
    vot_kernels.patch(tower)
    seen = []
    tower.blocks[0].register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(tower.blocks[0].forward, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for clips in ([[1, 4, 4], [1, 8, 4]], [[3, 4, 4]], [[1, 8, 8], [2, 4, 4], [1, 4, 4]]):
            grid = torch.tensor(clips)
            tower(torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14), grid)
        for arguments, keywords, expected in seen:
            torch.testing.assert_close(compiled(*arguments, **keywords), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3
    assert counter.frame_count < len(seen), "an image or clip more is no other graph"


@pytest.mark.parametrize("given", ["position_ids", "attention_mask", "nothing"])
@both_models
def test_the_language_model_of_a_vision_language_model_compiles_whole(kind, given):
    model = VISION_LANGUAGE[kind]()
    vot_kernels.patch(model)
    stack, mask = model.model.language_model, torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    more = {"position_ids": torch.arange(9).expand(3, 2, 9), "attention_mask": mask}
    inputs = {"inputs_embeds": make_tensor(2, 9, 32), "use_cache": False, given: more.get(given)}
    inputs.pop("nothing", None)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = stack(**inputs).last_hidden_state
        found = torch.compile(stack, backend="eager", fullgraph=True)(**inputs).last_hidden_state
    rows = mask.bool() if given == "attention_mask" else mask >= 0
    assert (found - expected)[rows].abs().max() <= OUTPUT * expected[rows].abs().max()


SHALLOW = TEXT | {"num_hidden_layers": 1}
WINDOW = {"use_sliding_window": True, "sliding_window": 3}
LANGUAGE = {
    "llama": lambda: spread(LlamaForCausalLM(LlamaConfig(**SHALLOW))),
    "mistral, window": lambda: spread(MistralForCausalLM(MistralConfig(**SHALLOW, sliding_window=3))),
    "qwen2": lambda: qwen2(num_hidden_layers=1),
    "qwen2, window": lambda: qwen2(**WINDOW, layer_types=["full_attention", "sliding_attention"]),
}


@pytest.mark.parametrize(
    ("kind", "given", "use_cache"),
    [
        *((kind, "nothing", False) for kind in LANGUAGE),
        ("mistral, window", "nothing", True),
        ("mistral, window", "attention_mask", False),
    ],
)
def test_a_language_model_trains_in_one_graph_without_positions(kind, use_cache, given):
    model, ids = LANGUAGE[kind](), prompts(2, 9)
    mask = torch.ones_like(ids)
    if given == "attention_mask":
        mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = run(model, inputs)
    torch._dynamo.reset()
    with vot_kernels.patched(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        shown = inputs if given == "attention_mask" else {"input_ids": ids}
        logits = compiled(**shown, use_cache=use_cache).logits[mask.bool()]
        model.zero_grad()
        logits.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    check_close((logits.detach(), gradients), expected)
    assert not any(module._forward_pre_hooks for module in model.modules()), "unpatch leaves hooks behind"


def test_a_compiled_language_model_keeps_packed_sequences_apart():
    """A graph for no positions was made before; positions of packed sequences are still looked at."""
    model, ids = LANGUAGE["mistral, window"](), prompts(1, 8)
    options = [{}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = [model(ids, **more, use_cache=False).logits for more in options]
        assert (expected[0] - expected[1]).abs().max() > 0.01 * expected[0].abs().max()
        vot_kernels.patch(model)
        compiled = torch.compile(model, backend="eager")
        for more, logits in zip(options, expected, strict=True):
            found = compiled(ids, **more, use_cache=False).logits
            assert (found - logits).abs().max() <= OUTPUT * logits.abs().max()


def test_a_forward_leaves_nothing_known_of_its_positions(monkeypatch):
    """A graph of another model of the same config, which is not watched, would take it for its own."""
    model = LANGUAGE["mistral, window"]()
    with vot_kernels.patched(model):
        monkeypatch.setattr(attention._traced, "unpacked", model.config)
        model(prompts(1, 8), use_cache=False)
        assert attention._traced.unpacked is None
    assert not any(module._forward_hooks for module in model.modules()), "unpatch leaves hooks behind"


def bart():
    parts = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in BART.items()}
    return spread(BartForConditionalGeneration(BartConfig(vocab_size=100, d_model=32, dropout=0.0, **parts)))


BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
STATIC = LANGUAGE | {"mixtral": mixtral, "bart": bart}


def static_options(ids):
    """Options of `generate`, with the first row padded on the left; the masks are made before the model is called."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    return options | {"cache_implementation": "static"}


@pytest.mark.parametrize("more", [{}, {"attention_mask": None}, {"num_beams": 2}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("kind", STATIC)
def test_generate_with_a_static_cache_finds_the_same_tokens(kind, more, calls):
    if kind == "bart" and "prefill_chunk_size" in more:
        pytest.skip("transformers itself finds others when it cuts the prompt of an encoder")
    model, ids = STATIC[kind](), prompts(2, 9)
    options = static_options(ids) | {"disable_compile": True} | more
    expected = model.generate(ids, **options)
    assert not calls
    with vot_kernels.patched(model):
        assert torch.equal(model.generate(ids, **options), expected)
    assert calls


def test_a_compiled_static_cache_finds_the_same_tokens():
    model, ids = LANGUAGE["llama"](), prompts(2, 9)
    options, everywhere = static_options(ids), CompileConfig(backend="eager", mode=None)
    everywhere._compile_all_devices = True
    expected = model.generate(ids, disable_compile=True, **options)
    torch._dynamo.reset()
    with vot_kernels.patched(model):
        assert torch.equal(model.generate(ids, compile_config=everywhere, **options), expected)


def test_a_graph_refuses_a_window_over_padding_between_tokens():
    model, mask = LANGUAGE["mistral, window"](), torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    vot_kernels.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="between their tokens"):
        compiled(prompts(1, 9), attention_mask=mask, use_cache=False)


def test_a_compiled_language_model_says_the_same_with_padding_and_without():
    model, ids = qwen2(), prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "use_cache": False}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**inputs).logits, model(**inputs, attention_mask=mask).logits[mask.bool()]
        vot_kernels.patch(model)
        compiled = torch.compile(model, backend="eager")
        found = compiled(**inputs).logits, compiled(**inputs, attention_mask=mask).logits[mask.bool()]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= OUTPUT * other.abs().max()


@both_models
def test_a_step_of_accelerate_is_a_step(kind, calls):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    inputs = image_and_text()
    weights = []
    for prepared in (False, True):
        model = VISION_LANGUAGE[kind]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if prepared:
            vot_kernels.patch(model)
            model, optimizer = accelerator.prepare(model, optimizer)
        loss = model(**inputs).logits[inputs["attention_mask"].bool()].square().mean()
        accelerator.backward(loss) if prepared else loss.backward()
        optimizer.step()
        weights.append(dict(accelerator.unwrap_model(model).named_parameters()))
    assert len(calls) == 4
    before = dict(VISION_LANGUAGE[kind]().named_parameters())
    for name, weight in weights[0].items():
        step = (weight - before[name]).abs().max()
        assert (weights[1][name] - weight).abs().max() <= 2e-3 * step + 1e-6, name


def test_a_hook_of_accelerate_still_brings_the_weights():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = VISION_LANGUAGE["qwen3_vl"](), image_and_text()
    with torch.no_grad():
        expected = model(**inputs).logits
        states = copy.deepcopy(model.state_dict())
        for name, module in model.named_modules():
            if module._parameters and not list(module.children()):
                weights = {
                    key: states[f"{name}.{key}"] for key in module._parameters if f"{name}.{key}" in states
                }
                hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights)
                hooks.add_hook_to_module(module, hook)
        with vot_kernels.patched(model) as report:
            found = model(**inputs).logits
    rows = inputs["attention_mask"].bool()
    assert [row.after for row in report.replaced].count("linear") == 1
    assert (found - expected)[rows].abs().max() <= OUTPUT * expected.abs().max()
