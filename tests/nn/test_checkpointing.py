"""Selective checkpointing computes again what is cheap, keeps what is costly, and changes no gradient."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vot_kernels import PackedLayout
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.nn import AutonomyOfExperts, HybridAttention
from vot_kernels.nn.checkpointing import keeping

LAYOUT = PackedLayout.from_grid_thw([[3, 2, 2], [1, 3, 3]])


class Counted(TorchDispatchMode):
    """Counts the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vot_kernels":
            self.calls[func.name().removeprefix("vot_kernels::")] += 1
        return func(*args, **(kwargs or {}))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = HybridAttention(32, 2, window=1)
        self.experts = AutonomyOfExperts(32, num_experts=4, top_k=2, hidden=16)

    def forward(self, x):
        return self.experts(x + self.attention(x, LAYOUT))


@pytest.mark.parametrize(
    ("kinds", "again"),
    [
        ((), {"aoe_fwd"}),
        (("attention",), {"aoe_fwd"}),
        (("experts",), {"hybrid_attention_fwd"}),
        (("attention", "experts"), set()),
    ],
)
def test_what_is_kept_runs_once(kinds, again):
    block = Block()
    x = torch.randn(LAYOUT.num_tokens, 32, requires_grad=True)
    block(x).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in block.parameters())]
    x.grad = None
    block.zero_grad()
    with Counted() as counted:
        y = checkpoint(block, x, use_reentrant=False, context_fn=keeping(*kinds))
        y.square().sum().backward()
    forwards = {
        name: calls for name, calls in counted.calls.items() if name in ("aoe_fwd", "hybrid_attention_fwd")
    }
    assert forwards == {name: 1 + (name in again) for name in ("aoe_fwd", "hybrid_attention_fwd")}
    for found, true in zip([x.grad, *(p.grad for p in block.parameters())], wanted, strict=True):
        torch.testing.assert_close(found, true)


def test_a_model_of_transformers_takes_it():
    config = VotEncoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=4,
        expert_rank=8,
    )
    model = VotEncoder(config).train()
    grid = torch.tensor([[2, 2, 2], [1, 3, 1]])
    pixels = torch.randn(11, 48)
    model(pixels, grid).pooler_output.sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keeping("attention")})
    with Counted() as counted:
        model(pixels, grid).pooler_output.sum().backward()
    attention = sum(calls for name, calls in counted.calls.items() if name.endswith("attention_fwd"))
    assert counted.calls["aoe_fwd"] == 2  # of the one block that has experts
    assert attention < 2 * config.num_hidden_layers + 1
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, msg=name)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        keeping("mlp")
