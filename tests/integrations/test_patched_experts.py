"""`patch` puts the experts of a model on `moe`: outputs and gradients of eager, rows, reasons, and back."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import vot_kernels
from tests.integrations.tiny import ROPE, TEXT, TOKENS, VISION, image_and_text, prompts, spread
from vot_kernels.integrations import transformers as integration
from vot_kernels.integrations.attention import NAME

MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": []}
FAMILIES = {
    "mixtral": {"num_local_experts": 5},
    "olmoe": MOE,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE | {"head_dim": 8},
}


def causal(name, **changes):
    config = AutoConfig.for_model(name, **TEXT | FAMILIES.get(name, {}) | changes)
    return spread(AutoModelForCausalLM.from_config(config)).double()


def qwen3_vl_moe():
    text = TEXT | MOE | {"rope_parameters": ROPE, "head_dim": 8}
    vision = VISION | {"deepstack_visual_indexes": [0], "patch_size": 14}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, vision_end_token_id=93, **TOKENS)
    return spread(Qwen3VLMoeForConditionalGeneration(config)).double()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the op."""
    seen = []
    op = integration.moe
    monkeypatch.setattr(integration, "moe", lambda *a: seen.append(a) or op(*a))
    return seen


def run(model, inputs):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    rows = inputs["attention_mask"].bool()
    logits[rows].square().mean().backward()
    return logits[rows].detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_vl_moe"])
def test_a_patched_model_computes_what_eager_does(name, calls):
    if name == "qwen3_vl_moe":
        model, inputs = qwen3_vl_moe(), image_and_text()
        inputs["pixel_values"] = inputs["pixel_values"].double()
    else:
        model, ids = causal(name), prompts(2, 9)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][0, :3] = 0
    model.set_experts_implementation("eager")
    expected, gradients = run(model, inputs)
    with vot_kernels.patched(model) as report:
        found, found_gradients = run(model, inputs)
    rows = [row for row in report.replaced if row.after == "moe"]
    assert len(calls) == len(rows) == 2 and {row.before for row in rows} == {"eager"}
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert found_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        error = (found_gradients[parameter] - gradient).abs().max()
        assert error <= 1e-7 * gradient.abs().max() + 1e-10 * largest, parameter
    assert torch.equal(run(model, inputs)[0], expected) and len(calls) == 2


def test_the_configs_around_them_agree_and_are_given_back():
    model = qwen3_vl_moe()
    configs = [model.config, model.config.text_config]
    before = [config._experts_implementation for config in configs]
    with vot_kernels.patched(model):
        assert [config._experts_implementation for config in configs] == ["vot_kernels"] * 2
        model.set_experts_implementation(model.get_experts_implementation())
        assert [config._experts_implementation for config in configs] == ["vot_kernels"] * 2
    assert [config._experts_implementation for config in configs] == before


def test_they_can_be_left_alone(calls):
    model = causal("mixtral").float()  # the experts of transformers take float64 only in eager mode
    with vot_kernels.patched(model, experts=False) as report:
        model(prompts(1, 5))
    assert not calls and {row.after for row in report.modules} == {"flash_attn_varlen_func"}


def test_experts_that_stay_have_a_reason_and_attention_is_patched_all_the_same(calls):
    model = causal("mixtral", hidden_act="gelu").float()
    with vot_kernels.patched(model) as report:
        model(prompts(1, 5))
    assert not calls and len(report.replaced) == len(report.left) == 2
    assert {row.reason for row in report.left} == {"their activation is GELUActivation, not SiLU"}


def test_what_one_layer_cannot_none_does():
    model = causal("mixtral")
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()
    report = vot_kernels.patch(model)
    assert [row.reason for row in report.left] == ["their activation is GELU, not SiLU"] * 2


def test_quantised_experts_stay():
    model = causal("mixtral")
    for layer in model.model.layers:
        codes = torch.zeros_like(layer.mlp.experts.gate_up_proj, dtype=torch.uint8)
        layer.mlp.experts.gate_up_proj = nn.Parameter(codes, requires_grad=False)
    report = vot_kernels.patch(model)
    assert {row.reason for row in report.left} == {"their weights are torch.uint8"}


def test_experts_that_are_on_the_op_already_stay_there():
    model = causal("mixtral")
    integration.register_experts()
    model.set_experts_implementation("vot_kernels")
    with vot_kernels.patched(model) as report:
        pass
    assert {row.reason for row in report.left} == {"they are on vot_kernels already"}
    assert model.config._experts_implementation == "vot_kernels"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("last", ["_vot_kernels_patch", "_experts_implementation_internal"])
def test_a_patch_that_fails_on_the_way_leaves_nothing(last, monkeypatch):
    """Whichever write fails, the writes before it are undone."""
    model = qwen3_vl_moe()
    kind = type(model) if last.endswith("patch") else type(model.config.text_config)
    original = kind.__setattr__
    states = []

    def fail(self, name, value):
        if name == last:
            states.append(model.config.vision_config._attn_implementation)
            raise MemoryError
        original(self, name, value)

    before = snapshot(model)
    monkeypatch.setattr(kind, "__setattr__", fail)
    with pytest.raises(MemoryError):
        vot_kernels.patch(model)
    monkeypatch.undo()
    assert states == [NAME], "it failed on the way"
    assert snapshot(model) == before
    with vot_kernels.patched(model):
        assert snapshot(model) != before


def snapshot(model):
    configs = [model.config, model.config.text_config, model.config.vision_config]
    written = [(c._attn_implementation, c._experts_implementation) for c in configs]
    return written, [sorted(vars(module)) for module in model.modules()]
