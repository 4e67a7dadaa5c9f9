"""The experts of transformers' models on the `moe` op: the same results as eager, computed by the op."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from vot_kernels.integrations import transformers as integration
from vot_kernels.integrations.transformers import experts_forward, register_experts
from vot_kernels.testing import make_tensor, shifted

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=5)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            intermediate_size=24,
            moe_intermediate_size=20,
            num_experts=6,
            head_dim=16,
            norm_topk_prob=True,
        )
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=24, num_experts=5)),
}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the op."""
    seen = []

    def counted(*arguments):
        seen.append(arguments)
        return op(*arguments)

    op = integration.moe
    monkeypatch.setattr(integration, "moe", counted)
    return seen


@pytest.fixture
def name(monkeypatch):
    monkeypatch.setattr(
        type(ALL_EXPERTS_FUNCTIONS), "_global_mapping", dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    )
    return register_experts()


def make(kind):
    torch.manual_seed(shifted(0))
    model = MODELS[kind]().double()
    for parameter in model.parameters():  # the default is so small that routing hardly differs from uniform
        nn.init.normal_(parameter, std=0.3)
    return model


def run(model, implementation):
    """Logits and the gradients of every parameter, with some padding in the batch."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    tokens = torch.arange(22).view(2, 11) * 7 % 64
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    (logits * make_tensor(*logits.shape, dtype=logits.dtype)).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_eager_computes(kind, name, calls):
    model = make(kind)
    eager, eager_grads = run(model, "eager")
    assert not calls
    logits, grads = run(model, name)
    assert len(calls) == 2, "one call a layer"
    torch.testing.assert_close(logits, eager, rtol=1e-9, atol=1e-9)
    assert grads.keys() == eager_grads.keys()
    for parameter in grads:
        scale = eager_grads[parameter].abs().max().item()
        torch.testing.assert_close(
            grads[parameter],
            eager_grads[parameter],
            rtol=1e-7,
            atol=1e-7 * scale,
            msg=lambda m, name=parameter: f"{name}: {m}",
        )
    experts = [grad for parameter, grad in grads.items() if "gate_up_proj" in parameter]
    assert len(experts) == 2 and all(grad.abs().sum() > 0 for grad in experts)


def test_a_model_is_loaded_with_it(name, calls, tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
    assert model.config._experts_implementation == name
    model(torch.arange(5)[None])
    assert len(calls) == 2
    assert name not in (tmp_path / "config.json").read_text()


def test_a_wrong_op_would_be_noticed(name, monkeypatch):
    model = make("mixtral")
    eager, _ = run(model, "eager")
    op = integration.moe
    monkeypatch.setattr(integration, "moe", lambda x, a, b, i, w: op(x, a, b, i.flip(1), w))
    assert (run(model, name)[0] - eager).abs().max() > 1e-3


def make_experts(options=None, *, activation=None, dtype=torch.float64, **overrides):
    """A tiny experts module of transformers, its weights and a routing: (module, x, ids, weights)."""
    transposed = (options or {}).get("is_transposed", False)

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 4
            gate_up = make_tensor(4, 2 * 6, 10, seed=1, dtype=dtype) / 3
            down = make_tensor(4, 10, 6, seed=2, dtype=dtype) / 3
            if transposed:
                gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
            self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
            self.act_fn = activation or nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for expert in range(self.num_experts):
                gate_up, down = self.gate_up_proj[expert], self.down_proj[expert]
                if not transposed:
                    gate_up, down = gate_up.T, down.T
                gate, up = (hidden_states @ gate_up).chunk(2, -1)
                chosen = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
                out = out + chosen * ((nn.functional.silu(gate) * up) @ down)
            return out

    for attribute, value in overrides.items():
        setattr(Experts, attribute, value)
    accepted = inspect.signature(use_experts_implementation).parameters
    decorated = use_experts_implementation(**{k: v for k, v in (options or {}).items() if k in accepted})(
        Experts
    )
    module = decorated(SimpleNamespace(_experts_implementation="eager"))
    for option, value in (options or {}).items():  # an older transformers does not know these
        setattr(module, option, value)
    x = make_tensor(9, 10, dtype=dtype)
    ids = torch.stack([torch.arange(9) % 4, (torch.arange(9) + 1 + torch.arange(9) % 3) % 4], 1)
    return module, x, ids, make_tensor(9, 2, seed=5, dtype=dtype).softmax(-1)


def both(module, name, *arguments):
    module.config._experts_implementation = "eager"
    eager = module(*arguments)
    module.config._experts_implementation = name
    return module(*arguments), eager


def test_silu_may_be_a_function(name, calls):
    found, eager = both(*make_experts(activation=nn.functional.silu)[:1], name, *make_experts()[1:])
    torch.testing.assert_close(found, eager, rtol=1e-10, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_both_layouts_and_gradients(name, calls, transposed):
    module, x, ids, weights = make_experts({"is_transposed": transposed})
    x.requires_grad_()
    weights.requires_grad_()
    leaves = [x, weights, *module.parameters()]
    results = [
        (y, *torch.autograd.grad(y.square().sum(), leaves)) for y in both(module, name, x, ids, weights)
    ]
    assert len(calls) == 1
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_experts_of_other_ranks_are_skipped(name):
    """Expert parallelism marks them with the number of local experts."""
    module, x, ids, weights = make_experts()
    ids = torch.where(ids == 2, 4, ids)
    found, eager = both(module, name, x, ids, weights)
    torch.testing.assert_close(found, eager, rtol=1e-10, atol=1e-12)
    assert (ids == 4).any() and (ids[:, 0] != 4).any()


def test_mixed_precision_follows_transformers(name, calls):
    module, x, ids, weights = make_experts(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, eager = both(module, name, x, ids, weights)
    assert calls[0][0].dtype == calls[0][1].dtype == torch.bfloat16
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, eager.to(x.dtype), rtol=0.05, atol=0.02)
    module.bfloat16().config._experts_implementation = name
    assert module(x, ids, weights).dtype == torch.float32 and calls[-1][0].dtype == torch.bfloat16


def test_compiles_in_one_graph(name):
    module, x, ids, weights = make_experts()
    module.config._experts_implementation = name
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"options": {"has_bias": True}}, "they have biases"),
        ({"options": {"has_gate": False}}, "they have no gate"),
        ({"options": {"is_concatenated": False}}, "interleaved"),
        ({"options": {"has_post_expert_norm": True}}, "a norm behind them"),
        ({"activation": nn.GELU()}, "their activation is GELU, not SiLU"),
        ({"activation": nn.functional.gelu}, "their activation is gelu, not SiLU"),
        ({"_apply_gate": lambda self, both: both}, "a gate of their own"),
    ],
)
def test_what_the_op_cannot_serve_is_refused_in_one_sentence(name, calls, options, reason):
    module, *arguments = make_experts(**options)
    module.config._experts_implementation = name
    with pytest.raises(ValueError, match=rf'cannot serve Experts: .*{reason}.*; use .*"eager"\.$'):
        module(*arguments)
    assert not calls


def test_quantised_weights_are_refused(name):
    module, *arguments = make_experts()
    module.config._experts_implementation = name
    module.gate_up_proj = nn.Parameter(torch.zeros(4, 12, 10, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="their weights are torch.uint8"):
        module(*arguments)


def test_registering_again_changes_nothing(name):
    before = dict(ALL_EXPERTS_FUNCTIONS)
    assert register_experts() == name == "vot_kernels"
    assert dict(ALL_EXPERTS_FUNCTIONS) == before and before[name] is experts_forward
    assert register_experts("mine") == "mine" and ALL_EXPERTS_FUNCTIONS["mine"] is experts_forward


@pytest.mark.parametrize("taken", ["eager", "grouped_mm"])
def test_other_implementations_are_not_replaced(name, taken):
    before = dict(ALL_EXPERTS_FUNCTIONS)
    with pytest.raises(ValueError, match=f"must not be that of another .* got '{taken}'"):
        register_experts(taken)
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
