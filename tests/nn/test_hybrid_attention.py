"""The HybridAttention module: options, gradients, rotary hook, streams."""

import pytest
import torch

from vot_kernels.nn.hybrid_attention import HybridAttention
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
        assert max_error(torch.cat(outputs), module(x, layout)) < 1e-6


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
