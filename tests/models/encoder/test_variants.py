"""What ablations put in the place of our parts: each against its definition."""

import pytest
import torch
import torch.nn.functional as F

from tests.marks import COMPUTING
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.models.encoder.cost import encoder_cost
from vot_kernels.models.encoder.variants import GatedAttention, RoutedExperts
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import shifted

GRID = (4, 2, 2)


def generator():
    return torch.Generator().manual_seed(shifted(3))


def test_gated_attention_is_a_gated_sum_of_two_normalised_parts():
    layout = PackedLayout.from_grid_thw([[5, 1, 3], [2, 1, 2]])  # the second clip has no far tokens
    attention = GatedAttention(8, 2, window=1, beta_init=0.4).double()
    x = torch.randn(layout.num_tokens, 8, dtype=torch.float64, generator=generator())
    q, k, v = (t.transpose(0, 1) for t in attention.project(x, layout))
    groups, segments = layout.token_groups, layout.token_segments
    same = segments[:, None] == segments
    near = same & ((groups[:, None] - groups).abs() <= 1)
    far = same & ~near
    exact = (q @ k.transpose(1, 2) * 4**-0.5).masked_fill(~near, -torch.inf).softmax(-1) @ v
    kernel = (q.softmax(-1) @ k.softmax(-1).transpose(1, 2)) * far
    linear = kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-300) @ v
    linear = torch.where(far.any(-1)[None, :, None], linear, exact)
    gate = torch.tensor(0.4, dtype=torch.float64).sigmoid()
    expected = attention.out(((1 - gate) * exact + gate * linear).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attention(x, layout), expected, rtol=1e-9, atol=1e-9)


def test_the_gate_learns():
    layout = PackedLayout.from_grid_thw([[4, 1, 2]])
    attention = GatedAttention(8, 2, window=1)
    attention(torch.randn(8, 8, generator=generator()), layout).square().sum().backward()
    assert attention.beta.grad.abs().min() > 0


@pytest.mark.parametrize("backend", COMPUTING)
def test_routed_experts_are_those_of_the_largest_logits(backend):
    experts = RoutedExperts(8, num_experts=4, top_k=2, hidden=6, backend=backend)
    x = torch.randn(10, 8, generator=generator())
    y, aux = experts(x, return_aux=True)
    logits = x @ experts.router.weight.T
    for row in range(len(x)):
        chosen = logits[row].topk(2)
        expected = torch.zeros(8)
        for weight, n in zip(chosen.values.softmax(0), chosen.indices, strict=True):
            gate, up = (experts.gate_up[n] @ x[row]).chunk(2)
            expected = expected + weight * experts.down[n] @ (F.silu(gate) * up)
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experts(x), y)
    assert aux.load.sum() == pytest.approx(2)
    assert aux.balance_loss.item() == pytest.approx((4 * aux.load * logits.softmax(-1).mean(0)).sum().item())
    (y.sum() + aux.balance_loss).backward()
    assert experts.router.weight.grad.abs().sum() > 0


def test_evenly_routed_tokens_have_a_balance_of_top_k():
    experts = RoutedExperts(4, num_experts=4, top_k=1, hidden=2)
    with torch.no_grad():
        experts.router.weight.copy_(torch.eye(4))
    assert experts(torch.eye(4), return_aux=True)[1].balance_loss.item() == pytest.approx(1)


@pytest.mark.parametrize("changes", [{"attention": "gated"}, {"expert_choice": "routed"}])
def test_encoders_with_variants_train_and_are_saved(changes, tmp_path):
    config = VotEncoderConfig.preset("nano", hidden_size=12, num_attention_heads=2, **changes)
    model = VotEncoder(config).train()
    pixels = torch.randn(16, config.patch_numbers, generator=generator())
    grid = torch.tensor([GRID])
    seen = model(pixels, grid)
    (seen.pooler_output.square().sum() + seen.balance_loss).backward()
    assert all(p.grad is not None for p in model.parameters()) and len(seen.expert_load) == 2
    model.save_pretrained(tmp_path)
    again = VotEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(pixels, grid).pooler_output, model.eval()(pixels, grid).pooler_output
        )


def test_the_cost_of_routed_experts_is_that_of_those_chosen():
    dense = encoder_cost(VotEncoderConfig.preset("nano", aoe_every=0), GRID)
    routed = encoder_cost(VotEncoderConfig.preset("nano", expert_choice="routed"), GRID)
    router = 2 * 96 * 4 * routed.tokens  # in each of two blocks
    assert routed.linear_flops == dense.linear_flops + 2 * router


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "both"}, "attention must be one of hybrid, softmax, linear, gated, got 'both'"),
        ({"attention": "gated", "causal": "group"}, "no causal form"),
        ({"expert_choice": "random"}, 'must be "autonomous" or "routed", got \'random\''),
        ({"expert_choice": "routed", "shared_expert_size": 8}, "no shared expert, got shared_expert_size=8"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VotEncoderConfig.preset("nano", **changes)
