"""The LinearAttention module: what it passes to the op, and its decay, none, fixed or learned."""

import pytest
import torch

from tests.rounding import nearly_equal
from vot_kernels.nn.linear_attention import LinearAttention
from vot_kernels.ops.linear_attention import reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor, max_error

LAYOUT = PackedLayout.from_lengths((18, 7))
X = make_tensor(25, 32)


def by_hand(module, log_decay=None):
    """Projections and norm, linear attention of the reference, and the output."""
    heads = (X @ module.qkv.weight.T).unflatten(-1, (12, 8))
    q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (heads[:, :4], heads[:, 4:8]))
    options = {"feature_map": module.feature_map, "causal": module.causal == "token", "log_decay": log_decay}
    out, _ = reference.linear_attention(q, k, heads[:, 8:], LAYOUT, **options)
    return out.flatten(1) @ module.out.weight.T


@pytest.mark.parametrize("causal", [None, "token"])
def test_without_decay_by_hand(causal):
    module = LinearAttention(32, 4, causal=causal, feature_map="elu")
    assert module.log_decay is None and "decay_logit" not in module.state_dict()
    assert max_error(module(X, LAYOUT), by_hand(module)) < 1e-5


def test_causal_may_be_a_bool():
    token = LinearAttention(32, 4, causal="token")
    for causal, wanted in ((True, "token"), (False, None)):
        module = LinearAttention(32, 4, causal=causal)
        assert module.causal == wanted
    module = LinearAttention(32, 4, causal=True)
    module.load_state_dict(token.state_dict())
    assert torch.equal(module(X, LAYOUT), token(X, LAYOUT))


def test_it_has_neither_stream_nor_window_nor_beta():
    module = LinearAttention(32, 4)
    assert not any(hasattr(module, name) for name in ("step", "window", "beta"))
    for option in ("window", "beta_init"):
        with pytest.raises(TypeError, match=option):
            LinearAttention(32, 4, **{option: 1})


@pytest.mark.parametrize("decay", ["fixed", "learned"])
def test_reset_parameters_restores_the_decays(decay):
    module = LinearAttention(32, 4, causal="token", decay=decay, decay_init=[0.9, 0.8, 0.7, 0.6])
    before = module.decay_logit.detach().clone()
    with torch.no_grad():
        module.decay_logit.zero_()
    module.reset_parameters()
    assert torch.equal(module.decay_logit, before)


@pytest.mark.parametrize("decay", ["fixed", "learned"])
def test_default_decays_are_those_of_retention(decay):
    module = LinearAttention(32, 4, causal="token", decay=decay)
    expected = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], dtype=torch.float64)
    assert max_error(module.log_decay, expected.log()) < 1e-8
    assert max_error(module(X, LAYOUT), by_hand(module, expected.log())) < 1e-5
    assert max_error(module(X, LAYOUT), by_hand(module)) > 1e-4


@pytest.mark.parametrize("heads", [16, 64])
def test_default_decays_of_many_heads_are_finite_and_grow(heads):
    module = LinearAttention(8 * heads, heads, causal="token", decay="learned")
    found = module.log_decay.detach()
    assert module.decay_logit.isfinite().all() and (found < 0).all() and (found.diff() >= 0).all()
    assert float(found[15]) == pytest.approx(-(2**-20.0))


def test_given_decays_one_and_almost_none_among_them():
    decays = [1.0, 0.9, 0.5, 1e-9]
    module = LinearAttention(32, 4, causal="token", decay="fixed", decay_init=decays)
    assert nearly_equal(module.log_decay.exp(), torch.tensor(decays))
    assert max_error(module(X, LAYOUT), by_hand(module, torch.tensor(decays).log())) < 1e-5


def test_a_fixed_decay_is_a_buffer_and_a_learned_one_a_parameter_of_the_same_name():
    fixed = LinearAttention(32, 4, causal="token", decay="fixed", decay_init=[0.9, 0.8, 0.7, 0.6])
    learned = LinearAttention(32, 4, causal="token", decay="learned")
    names = dict(learned.named_parameters())
    assert "decay_logit" in names and "decay_logit" not in dict(fixed.named_parameters())
    learned.load_state_dict(fixed.state_dict())
    assert torch.equal(fixed(X, LAYOUT), learned(X, LAYOUT))


def test_every_parameter_learns():
    module = LinearAttention(32, 4, num_kv_heads=2, causal="token", decay="learned", bias=True)
    (module(X, LAYOUT) * make_tensor(25, 32, seed=1)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_descent_finds_the_decays_that_made_the_targets():
    module = LinearAttention(32, 4, causal="token", decay="learned", decay_init=[0.9, 0.8, 0.6, 0.4])
    target, wanted = module(X, LAYOUT).detach(), module.decay_logit.detach().clone()
    with torch.no_grad():
        module.decay_logit.zero_()
    optimiser = torch.optim.Adam([module.decay_logit], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        (module(X, LAYOUT) - target).square().sum().backward()
        optimiser.step()
    assert max_error(module.decay_logit.sigmoid(), wanted.sigmoid()) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_decay_of_a_converted_module(dtype):
    """log_decay has float32 at least: the decays of slow heads are not rounded to 1."""
    module = LinearAttention(32, 4, causal="token", decay="fixed").to(dtype)
    assert module.log_decay.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rates = torch.tensor([-(2.0**-n) for n in (5, 6, 7, 8)])
    assert max_error(module.log_decay / rates, torch.ones(4)) < 0.03
    assert module(X.to(dtype), LAYOUT).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "slow"}, "decay must be one of None, 'fixed', 'learned', got 'slow'"),
        ({"decay": "fixed", "causal": None}, "decay='fixed' needs causal=\"token\", got causal=None"),
        ({"causal": "group"}, "causal must be one of None, 'token', False, True, got 'group'"),
        ({"decay_init": [0.5] * 4}, 'decay_init needs decay="fixed" or "learned", got decay=None'),
        (
            {"decay": "fixed", "decay_init": [0.5] * 3},
            r"decay_init must have 4 numbers, one per head, got shape \[3\]",
        ),
        (
            {"decay": "fixed", "decay_init": [0.5, 0.5, 0.5, 1.5]},
            "decay_init must be above 0 and at most 1, got 1.5",
        ),
        ({"decay": "fixed", "decay_init": [0.5, 0.0, 0.5, 1.0]}, "above 0 and at most 1, got 0"),
        ({"decay": "fixed", "decay_init": [float("nan"), 0.5, 0.5, 1.0]}, "above 0 and at most 1, got nan"),
        (
            {"decay": "learned", "decay_init": [0.5, 0.5, 0.5, 1.0]},
            "decay_init must be above 0 and below 1 to be learned, got 1",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        LinearAttention(32, 4, **{"causal": "token", **options})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
