"""The HybridAttention module: options, gradients, rotary hook, streams."""

import pytest
import torch

from tests.rounding import nearly_equal
from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor, max_error, with_slack

LAYOUT = PackedLayout.from_lengths((18, 7), group_size=4)


@pytest.mark.parametrize("causal", [None, "group", "token"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_every_parameter_learns(causal, kv_heads):
    module = HybridAttention(32, 4, num_kv_heads=kv_heads, causal=causal, bias=True, window=0)
    x = make_tensor(25, 32)
    out = module(x, LAYOUT)
    assert out.shape == x.shape
    (out * make_tensor(25, 32, seed=1)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_beta_counts_and_exact_attention_has_none():
    x = make_tensor(25, 32)
    module = HybridAttention(32, 4)
    before = module(x, LAYOUT)
    with torch.no_grad():
        module.beta.fill_(2.0)
    assert max_error(before, module(x, LAYOUT)) > 1e-3
    assert HybridAttention(32, 4, window=None).beta is None
    module.reset_parameters()
    assert torch.equal(module(x, LAYOUT), before)


@pytest.mark.parametrize("window", [0, 1])
def test_a_far_weight_of_zero_is_window_attention_that_training_leaves(window):
    module, alone = (
        HybridAttention(32, 4, window=window, far_init=0.0),
        HybridAttention(32, 4, window=window, beta_init=-torch.inf),
    )
    assert module.beta is None and torch.equal(module.far_weight, torch.zeros(4))
    alone.load_state_dict(
        {"beta": alone.beta} | {n: x for n, x in module.state_dict().items() if n != "far_weight"}
    )
    x = make_tensor(25, 32)
    start = module(x, LAYOUT)
    assert torch.equal(start, alone(x, LAYOUT))
    (start * make_tensor(25, 32, seed=1)).sum().backward()
    assert (module.far_weight.grad != 0).all()
    with torch.no_grad():
        module.far_weight.sub_(0.1 * module.far_weight.grad)
    assert not torch.equal(module(x, LAYOUT), start)
    module.reset_parameters()
    assert torch.equal(module(x, LAYOUT), start)


def test_a_far_weight_is_exp_of_beta_and_counts_by_its_size():
    module, logarithmic = HybridAttention(32, 4, window=0, far_init=2.0), HybridAttention(32, 4, window=0)
    states = {n: x for n, x in module.state_dict().items() if n != "far_weight"}
    logarithmic.load_state_dict(states | {"beta": torch.full((4,), 2.0).log()})
    x = make_tensor(25, 32)
    assert max_error(module(x, LAYOUT), logarithmic(x, LAYOUT)) < 1e-5
    expected = module(x, LAYOUT)
    with torch.no_grad():
        module.far_weight.neg_()
    assert torch.equal(module(x, LAYOUT), expected)
    assert HybridAttention(32, 4, window=None, far_init=0.0).far_weight is None
    with pytest.raises(ValueError, match=r"^far_init must be a weight >= 0 or None, got -1.0\.$"):
        HybridAttention(32, 4, far_init=-1.0)


@torch.no_grad()
def test_a_stream_knows_the_far_weight():
    module = HybridAttention(32, 4, window=0, causal="group", far_init=0.5)
    layout = PackedLayout.from_lengths((12,), group_size=4)
    x, state, parts = make_tensor(12, 32), None, []
    for group in x.split(4):
        part, state = module.step(group, PackedLayout.from_lengths((4,)), state)
        parts.append(part)
    assert max_error(torch.cat(parts), module(x, layout)) < 1e-5


def test_a_converted_module_has_a_far_weight():
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    ours = HybridAttention.from_attention(theirs, window=0, far_init=0.0)
    assert torch.equal(ours.far_weight, torch.zeros(4)) and ours.beta is None


def test_without_beta_the_far_part_has_weight_1():
    module, plain = HybridAttention(32, 4), HybridAttention(32, 4, beta_init=None)
    assert plain.beta is None
    plain.load_state_dict({name: x for name, x in module.state_dict().items() if name != "beta"})
    x = make_tensor(25, 32)
    assert nearly_equal(plain(x, LAYOUT), module(x, LAYOUT))


@pytest.mark.parametrize(("causal", "mode"), [(False, None), (True, "token")])
def test_causal_may_be_a_bool(causal, mode):
    module = HybridAttention(32, 4, causal=causal)
    other = HybridAttention(32, 4, causal=mode)
    other.load_state_dict(module.state_dict())
    x = make_tensor(25, 32)
    assert module.causal == mode and torch.equal(module(x, LAYOUT), other(x, LAYOUT))


def by_hand(module, x, phi, norm):
    """Projections, norm, hybrid attention of the reference with features phi(q) and phi(k), and the output."""
    heads = (x @ module.qkv.weight.T).unflatten(-1, (12, 8))
    q, k, v = heads[:, :4], heads[:, 4:8], heads[:, 8:]
    if norm:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.weight
    options = {"window": 0, "beta": module.beta, "q_features": phi(q), "k_features": phi(k)}
    out, _ = reference.hybrid_attention(q, k, v, LAYOUT, **options)
    return out.flatten(1) @ module.out.weight.T


FEATURE_MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_map_norm_and_beta_by_hand(name, norm):
    module = HybridAttention(32, 4, window=0, feature_map=name, qk_norm=norm, beta_init=0.7)
    assert torch.equal(module.beta, torch.full((4,), 0.7))
    assert sum("norm" in parameter for parameter, _ in module.named_parameters()) == (2 if norm else 0)
    with torch.no_grad():
        module.beta += make_tensor(4)
        for parameter in (*module.q_norm.parameters(), *module.k_norm.parameters()):
            parameter += 0.3 * make_tensor(8)
    x = make_tensor(25, 32)
    found = module(x, LAYOUT)
    assert max_error(found, by_hand(module, x, FEATURE_MAPS[name], norm)) < 1e-5
    if norm:
        assert max_error(found, by_hand(module, x, FEATURE_MAPS[name], False)) > 1e-3
    for other in FEATURE_MAPS.keys() - {name}:
        assert max_error(found, by_hand(module, x, FEATURE_MAPS[other], norm)) > 1e-3


def test_beta_learns_how_much_the_far_groups_matter():
    """Descent from 0 towards outputs that were made with beta = 2."""
    module, x = HybridAttention(32, 4, window=0), make_tensor(25, 32)
    with torch.no_grad():
        module.beta.fill_(2.0)
        target = module(x, LAYOUT)
        module.beta.zero_()
    optimizer = torch.optim.Adam([module.beta], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (module(x, LAYOUT) - target).square().sum().backward()
        optimizer.step()
    assert max_error(module.beta, torch.full((4,), 2.0)) < 0.1


def test_backends_agree_and_an_unknown_one_is_refused():
    module, x = HybridAttention(32, 4), make_tensor(25, 32)
    assert module.backend == "auto" and not any("backend" in name for name in module.state_dict())
    expected = module(x, LAYOUT)
    module.backend = "reference"
    assert 0 < max_error(module(x, LAYOUT), expected) < 1e-5
    module.backend = "cuda"
    with pytest.raises(ValueError, match="backend must be one of 'auto', .* got 'cuda'"):
        module(x, LAYOUT)


def test_rotary_comes_after_the_norm_and_sees_the_layout():
    seen = []

    def rotary(q, k, layout):
        seen.append((q.pow(2).mean(-1), layout))
        return q * 2, k

    module = HybridAttention(32, 4, rotary=rotary)
    plain = HybridAttention(32, 4)
    plain.load_state_dict(module.state_dict())
    x = make_tensor(25, 32) * 5
    assert max_error(module(x, LAYOUT), plain(x, LAYOUT)) > 1e-3
    mean_square, layout = seen[0]
    assert max_error(mean_square, torch.ones_like(mean_square)) < 1e-3 and layout is LAYOUT


def test_slack_rows():
    module = HybridAttention(32, 4)
    x = make_tensor(25, 32)
    out = module(with_slack(x, 2), LAYOUT)
    assert torch.equal(out[:25], module(x, LAYOUT)) and (out[25:] == 0).all()


def test_stream_equals_the_whole_segment():
    module = HybridAttention(32, 4, causal="group", num_kv_heads=2)
    layout = PackedLayout.from_lengths((22,), group_size=4)
    x, state, outputs = make_tensor(22, 32), None, []
    with torch.no_grad():
        for group in x.split(4):
            out, state = module.step(group, PackedLayout.from_lengths((len(group),)), state)
            outputs.append(out)
        assert nearly_equal(torch.cat(outputs), module(x, layout))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("multiple of num_kv_heads, got 4 and 3", {"num_kv_heads": 3}),
        ("dim must be a multiple", {"num_heads": 5}),
        ("causal must be one of", {"causal": "frame"}),
        ("feature_map must be one of", {"feature_map": "exp"}),
        ("window must be", {"window": -1}),
    ],
)
def test_bad_options(message, options):
    with pytest.raises(ValueError, match=message):
        HybridAttention(**({"dim": 32, "num_heads": 4} | options))


def test_bad_calls():
    with pytest.raises(ValueError, match=r"x must have the shape \[tokens, 32\], got \[25, 16\]"):
        HybridAttention(32, 4)(make_tensor(25, 16), LAYOUT)
    with pytest.raises(ValueError, match='needs causal="group"'):
        HybridAttention(32, 4).step(make_tensor(18, 32), LAYOUT)
