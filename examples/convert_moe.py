"""A transformers mixture of experts on these kernels, and its dense feed-forwards as Autonomy-of-Experts."""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vot_kernels.integrations.transformers import register_experts
from vot_kernels.nn import convert_mlp

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def mixture(tokens: torch.Tensor) -> None:
    """Routed experts: the same numbers from another implementation, which a model takes by its name."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4)).eval()
    expected = model(tokens).logits
    model.set_experts_implementation(register_experts())
    difference = float((model(tokens).logits - expected).abs().max())
    print(f"Mixtral's experts on vot_kernels.moe: the logits differ by {difference:.1e}")
    assert difference < 1e-4


def dense_to_experts(tokens: torch.Tensor) -> None:
    """Dense layers: an approximation, whose error is reported, to train on from."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=16)).eval()
    expected = model(tokens).logits
    for layer in model.model.layers:
        inputs = inputs_of(layer.mlp, model, tokens)
        options = {"num_experts": 6, "top_k": 3, "rank": 20, "shared_hidden": 48}
        layer.mlp, report = convert_mlp(layer.mlp, **options, calibration=inputs)
        print(f"a layer with 3 of 6 experts: {report}")
    error = float((model(tokens).logits - expected).norm() / expected.norm())
    print(f"the logits of the converted model are off by {error:.0%}, before any training")
    assert error < 0.5


def inputs_of(layer: nn.Module, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the layer sees when the model reads the tokens, `[tokens, dim]`."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(tokens)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 128, (8, 64))
    mixture(tokens)
    dense_to_experts(tokens)


if __name__ == "__main__":
    main()
