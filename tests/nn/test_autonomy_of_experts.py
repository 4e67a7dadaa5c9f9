"""The layer of experts that select themselves: initialisation, width, balance."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vot_kernels.nn import autonomy_of_experts
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts, expert_usage, matched_hidden
from vot_kernels.nn.mlp import SwiGLU
from vot_kernels.ops.aoe import reference
from vot_kernels.testing import make_tensor, shifted


def test_is_the_op_on_any_leading_shape():
    layer = AutonomyOfExperts(24, 5, 2, hidden=16, rank=8).double()
    x = make_tensor(3, 7, 24, dtype=torch.float64)
    weights = (layer.w_down, layer.w_up, layer.w_p, layer.w_o)
    y, *expected = reference.aoe(x.view(21, 24), *weights, 2)
    torch.testing.assert_close(layer(x), y.view(3, 7, 24))
    found, aux = layer(x, return_aux=True)
    assert torch.equal(found, layer(x)) and found.shape == x.shape
    torch.testing.assert_close(tuple(aux), tuple(expected))


def test_a_forward_leaves_nothing_on_the_module():
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8)
    before = set(vars(layer))
    layer(make_tensor(9, 16), return_aux=True)
    assert set(vars(layer)) == before


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_without(use_reentrant):
    """With the balance loss, and with two forwards to a step, each of which has its own."""
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, shared_hidden=8).double()
    inputs = [make_tensor(9, 16, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1)]
    leaves = [*inputs, *layer.parameters()]

    def run(x):
        y, aux = layer(x, return_aux=True)
        return y, aux.balance_loss

    def gradients(call):
        for leaf in leaves:
            leaf.grad = None
        sum(y.square().mean() + 0.01 * loss for y, loss in map(call, inputs)).backward()
        return [leaf.grad for leaf in leaves]

    found = gradients(lambda x: checkpoint(run, x, use_reentrant=use_reentrant))
    for a, b in zip(found, gradients(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_experts_start_with_equal_norms():
    torch.manual_seed(shifted(0))
    layer = AutonomyOfExperts(64, 8, 2, d_ffn=128)
    frobenius = torch.linalg.vector_norm(layer.w_down, dim=(1, 2))
    torch.testing.assert_close(frobenius, torch.full((8,), layer.w_down.shape[1] ** 0.5))
    _, aux = layer(torch.randn(20_000, 64), return_aux=True)
    torch.testing.assert_close(aux.load, torch.full((8,), 0.25), rtol=0, atol=0.1)


def test_activations_start_near_unit_scale():
    torch.manual_seed(shifted(0))
    layer = AutonomyOfExperts(64, 8, 2, d_ffn=128)
    assert 0.1 < layer(torch.randn(500, 64)).std() < 1.0


@pytest.mark.parametrize(("dim", "d_ffn", "rank"), [(512, 1408, 64), (768, 2048, 256), (96, 256, 32)])
def test_parameters_match_a_swiglu_expert(dim, d_ffn, rank):
    layer = AutonomyOfExperts(dim, 3, 1, d_ffn=d_ffn, rank=rank)
    hidden = layer.w_up.shape[1]
    assert hidden % 8 == 0 and hidden == matched_hidden(dim, d_ffn, rank)
    expected = 3 * (3 * dim * d_ffn)
    # Rounding to a multiple of 8 moves an expert by at most 4 rows.
    assert abs(sum(p.numel() for p in layer.parameters()) - expected) <= 3 * 4 * (rank + 2 * dim)


def test_bias_balances_the_load_without_a_gradient():
    torch.manual_seed(shifted(0))
    layer = AutonomyOfExperts(16, 4, 1, hidden=8, rank=8, bias_rate=0.02)
    with torch.no_grad():
        layer.w_down[1] *= 1.5  # a favourite
    x = torch.randn(2000, 16)
    before = layer(x, return_aux=True)[1].load
    for _ in range(200):
        _, aux = layer(x, return_aux=True)
        layer.update_selection_bias(aux.load)
    assert before.max() > 0.6 and aux.load.max() < 0.3
    assert not layer.selection_bias.requires_grad and "selection_bias" in layer.state_dict()
    assert layer.selection_bias[1] == layer.selection_bias.min() < 0


def test_one_step_of_the_bias_rule():
    layer = AutonomyOfExperts(16, 4, 1, hidden=8, rank=8, bias_rate=0.5)
    layer.update_selection_bias(torch.tensor([0.1, 0.25, 0.4, 0.25]))
    assert torch.equal(layer.selection_bias, torch.tensor([0.5, 0.0, -0.5, 0.0]))


def test_the_bias_takes_the_load_of_a_whole_step():
    layer = AutonomyOfExperts(16, 4, 1, hidden=8, rank=8, bias_rate=0.5)
    loads = torch.tensor([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])  # two micro-batches
    layer.update_selection_bias(loads.mean(0))
    assert torch.equal(layer.selection_bias, torch.tensor([-0.5, 0.0, 0.0, 0.5]))
    with pytest.raises(ValueError, match=r"load must have the shape \[4\]"):
        layer.update_selection_bias(loads)


def test_usage_counts_imbalance_and_idle_experts():
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8)
    layer.selection_bias.copy_(torch.tensor([0.0, 1e6, 0.0, -1e6]))
    load = layer(make_tensor(50, 16), return_aux=True)[1].load
    assert load[1] == 1 and load[3] == 0 and load.sum() == pytest.approx(2) and not load.requires_grad
    imbalance, idle = expert_usage(load)
    assert imbalance == pytest.approx(2.0)  # every token, where half of them would be even
    assert idle == 1 and idle.dtype == torch.int64
    layers = expert_usage(torch.stack([load, torch.full((4,), 0.5)]))
    assert torch.equal(layers.imbalance, torch.stack([imbalance, torch.tensor(1.0)]))
    assert layers.idle.tolist() == [1, 0]


def test_forward_usage_and_bias_wait_for_no_number():
    """Fake tensors have a device and no contents, so reading a number from one is an error."""
    with FakeTensorMode():
        layer, x = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, shared_hidden=8), torch.randn(9, 16)
        y, aux = layer(x, return_aux=True)
        assert y.shape == (9, 16) and aux.load.shape == (4,)
        assert [value.shape for value in expert_usage(aux.load)] == [(), ()]
        layer.update_selection_bias(aux.load)
        with pytest.raises(DataDependentOutputException):
            expert_usage(aux.load).idle.item()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_shared_expert_is_a_swiglu_that_is_added(autocast):
    torch.manual_seed(shifted(0))
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, shared_hidden=12)
    x = make_tensor(3, 9, 16)
    routed = copy.deepcopy(layer)
    routed.shared = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, parts = layer(x), (routed(x), layer.shared(x))
    assert isinstance(layer.shared, SwiGLU) and parts[1].std() > 0.1
    assert torch.equal(y, parts[0] + parts[1])
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.shared.parameters())


def test_without_a_shared_expert_its_parameters_do_not_exist():
    sizes = {"num_experts": 4, "top_k": 2, "rank": 8, "d_ffn": 24}
    plain, shared = AutonomyOfExperts(16, **sizes), AutonomyOfExperts(16, **sizes, shared_hidden=12)
    assert list(plain.state_dict()) == ["w_down", "w_up", "w_p", "w_o", "selection_bias"]
    assert shared.state_dict().keys() - plain.state_dict().keys() == {
        "shared.gate_up.weight",
        "shared.down.weight",
    }
    assert plain.w_p.shape == shared.w_p.shape, "d_ffn matches the routed experts alone"
    plain.load_state_dict(plain.state_dict())
    before = shared.shared.gate_up.weight.clone()
    shared.reset_parameters()
    assert not torch.equal(shared.shared.gate_up.weight, before)
    assert shared.shared.gate_up.weight.std().item() == pytest.approx(0.25, rel=0.2)


def test_the_backend_is_that_of_the_op(monkeypatch):
    seen = []

    def spied(*arguments, **options):
        seen.append(options["backend"])
        return op(*arguments, **options)

    op = autonomy_of_experts.aoe
    monkeypatch.setattr(autonomy_of_experts, "aoe", spied)
    layer, x = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, backend="reference"), make_tensor(9, 16)
    y = layer(x)
    layer.backend = "torch"
    torch.testing.assert_close(layer(x), y)
    assert seen == ["reference", "torch"] and "backend='torch'" in repr(layer)


@pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
def test_trains(weighting):
    """Without the balance loss unselected experts stay as they are; with it every w_down learns."""
    torch.manual_seed(shifted(0))
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, weighting=weighting)
    layer.selection_bias[3] = -1e6
    x = torch.randn(200, 16)
    layer(x).square().mean().backward()
    assert (layer.w_up.grad[3] == 0).all() and (layer.w_up.grad[:3] != 0).any()
    assert (layer.w_down.grad[3] == 0).all() == (weighting == "topk_softmax")
    layer.zero_grad()
    y, aux = layer(x, return_aux=True)
    (y.square().mean() + 0.01 * aux.balance_loss).backward()
    assert (layer.w_down.grad[3] != 0).any()
    target = torch.randn(200, 16)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_computes_in_its_dtype_and_norms_in_float32():
    layer, x = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8), make_tensor(9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = layer(x, return_aux=True)
    half = copy.deepcopy(layer).bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, half(x.bfloat16()))
    assert aux.balance_loss.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_can_be_copied_after_a_forward():
    layer, x = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8), make_tensor(9, 16)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)


@pytest.mark.parametrize("shared_hidden", [0, 8])
def test_compiles_in_one_graph(shared_hidden):
    layer = AutonomyOfExperts(16, 4, 2, hidden=8, rank=8, shared_hidden=shared_hidden)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = make_tensor(9, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x, return_aux=True), layer(x, return_aux=True))


def test_a_bad_argument_is_named():
    with pytest.raises(ValueError, match="exactly one of d_ffn and hidden"):
        AutonomyOfExperts(16, 4, 2)
    with pytest.raises(ValueError, match="exactly one of d_ffn and hidden"):
        AutonomyOfExperts(16, 4, 2, d_ffn=8, hidden=8)
    with pytest.raises(ValueError, match="top_k must be from 1 to num_experts, got 5 of 4"):
        AutonomyOfExperts(16, 4, 5, hidden=8)
    with pytest.raises(ValueError, match="hidden must be an int >= 1, got 0"):
        AutonomyOfExperts(16, 4, 2, hidden=0)
    with pytest.raises(ValueError, match="weighting must be one of"):
        AutonomyOfExperts(16, 4, 2, hidden=8, weighting="sum")
    with pytest.raises(ValueError, match="shared_hidden must be an int >= 0, got -1"):
        AutonomyOfExperts(16, 4, 2, hidden=8, shared_hidden=-1)
