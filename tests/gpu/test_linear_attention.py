"""Linear attention on a GPU."""

import pytest
import torch

from vot_kernels import PackedLayout, linear_attention
from vot_kernels.ops.linear_attention import reference
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    max_error,
    poison_segment,
    with_slack,
)

OP = "linear_attention"
pytestmark = pytest.mark.gpu


def check(layout, backend, device, dtype, *, heads=4, kv_heads=2, head_dim=64, log_decay=None, **options):
    inputs = make_qkv(layout.num_tokens, heads, head_dim, kv_heads=kv_heads, dtype=dtype, device=device)

    def run(q, k, v, d):
        return (linear_attention(q, k, v, layout, log_decay=d, backend=backend, **options),)

    def oracle(q, k, v, d):
        return (reference.linear_attention(q, k, v, layout, log_decay=d, **options)[0],)

    # The gradients of q and k are small differences of larger terms, which are rounded too.
    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(run, oracle, (*inputs, log_decay), roundings=roundings, floor=0.05)


def decays(device, dtype, *values):
    """Return log_decay, by default from no decay to one that leaves a token almost alone.

    It has the dtype of the tokens, to which the backward rounds it, and so its gradient.
    """
    return torch.tensor(values or (1.0, 0.99, 0.7, 1e-9), dtype=torch.float64).log().to(device, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal, backend, device, dtype):
    check(PackedLayout.from_lengths(lengths, device=device), backend, device, dtype, causal=causal)


def test_head_dims_and_dtypes(size, backend, device):
    """Causal, which takes every kernel of the other form and more."""
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    check(layout, backend, device, dtype, head_dim=head_dim, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_feature_maps(feature_map, causal, backend, device):
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    check(layout, backend, device, torch.bfloat16, feature_map=feature_map, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_long_segments(causal, backend, device):
    layout = PackedLayout.from_lengths((5000, 3, 2049), device=device)
    check(layout, backend, device, torch.bfloat16, head_dim=128, causal=causal)


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_decay_on_packings(lengths, backend, device, dtype):
    layout = PackedLayout.from_lengths(lengths, device=device)
    check(layout, backend, device, dtype, causal=True, log_decay=decays(device, dtype))


def test_decay_with_head_dims_and_dtypes(size, backend, device):
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    log_decay = decays(device, dtype)
    check(layout, backend, device, dtype, head_dim=head_dim, causal=True, log_decay=log_decay)


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_decay_with_feature_maps(feature_map, backend, device):
    options = {"feature_map": feature_map, "causal": True, "log_decay": decays(device, torch.bfloat16)}
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    check(layout, backend, device, torch.bfloat16, **options)


def test_decay_over_long_segments(backend, device):
    """Several tiles: sums that shrink from tile to tile, and pairs of different tiles in the gradient of the decay."""
    layout = PackedLayout.from_lengths((5000, 3, 2049), device=device)
    for dtype in (torch.bfloat16, torch.float32):
        log_decay = decays(device, dtype, 1.0, 0.9995, 0.99, 0.5)
        check(layout, backend, device, dtype, causal=True, log_decay=log_decay)


def test_strong_decays_leave_the_token_itself(backend, device, dtype):
    """Where inverse powers of the decay over a tile would overflow."""
    layout = PackedLayout.from_lengths((3000, 9), device=device)
    leaves = [x.requires_grad_() for x in make_qkv(3009, 3, 64, dtype=dtype, device=device)]
    log_decay = torch.tensor([-20.0, -300.0, -torch.inf], device=device, requires_grad=True)
    out = linear_attention(*leaves, layout, causal=True, log_decay=log_decay, backend=backend)
    grads = torch.autograd.grad(out, (*leaves, log_decay), torch.ones_like(out))
    assert (out - leaves[2]).abs().max() < 0.05 and (grads[2] - 1).abs().max() < 0.05
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks_and_runs_repeat(causal, backend, device, dtype):
    layout = PackedLayout.from_lengths((100, 129, 64), device=device)
    q, k, v = make_qkv(layout.num_tokens, 4, 64, dtype=dtype, device=device)
    expected = _results(q, k, v, layout, backend, causal)
    again = _results(q, k, v, layout, backend, causal)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    poisoned = [with_slack(poison_segment(x, layout, 1), 7) for x in (q, k, v)]
    begin, end = layout.host_cu_seqlens[1:3].tolist()
    for a, b in zip(expected, _results(*poisoned, layout, backend, causal), strict=True):
        assert torch.equal(a[:begin], b[:begin]) and torch.equal(a[end:], b[end : len(a)])
        assert (b[len(a) :] == 0).all()


def _results(q, k, v, layout, backend, causal):
    """Output and gradients for a gradient of the output that is the output itself."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, layout, causal=causal, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


@pytest.mark.tested_on("fla#1187")
@pytest.mark.parametrize("causal", [False, True])
def test_states_are_wider_than_half_precision(causal, backend, device):
    q, k, v = make_qkv(8192, 2, 64, dtype=torch.float16, device=device)
    layout, v = PackedLayout.from_lengths([8192], device=device), v.abs() * 1e3
    out = linear_attention(q, k, v, layout, causal=causal, backend=backend)
    exact = linear_attention(q.double(), k.double(), v.double(), layout, causal=causal, backend="reference")
    assert out.isfinite().all() and max_error(out, exact) < 4
