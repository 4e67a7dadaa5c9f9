"""Hybrid attention on a GPU."""

import pytest
import torch

from vot_kernels import PackedLayout, hybrid_attention, packed_attention
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    make_tensor,
    poison_segment,
    with_slack,
)

OP = "hybrid_attention"
pytestmark = pytest.mark.gpu


def check(layout, backend, device, dtype, *, heads=4, kv_heads=2, head_dim=64, variant=None, **options):
    inputs = make_qkv(layout.num_tokens, heads, head_dim, kv_heads=kv_heads, dtype=dtype, device=device)
    beta = make_tensor(heads, dtype=dtype, device=device, seed=5)

    def run(q, k, v, beta):
        choices = {"backend": backend, "_variant": variant}
        return hybrid_attention(q, k, v, layout, beta=beta, return_lse=True, **choices, **options)

    def oracle(q, k, v, beta):
        return reference.hybrid_attention(q, k, v, layout, beta=beta, **options)

    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(run, oracle, [*inputs, beta], roundings=roundings, names=["out", "lse"])


@pytest.mark.parametrize("causal", [None, "group", "token"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal, backend, device, dtype):
    layout = PackedLayout.from_lengths(lengths, group_size=8, device=device)
    check(layout, backend, device, dtype, causal=causal)


def test_head_dims_and_dtypes(size, backend, device):
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((300, 1, 77), group_size=64, device=device)
    check(layout, backend, device, dtype, head_dim=head_dim)


@pytest.mark.parametrize("feature_map, causal", [("elu", "group"), ("relu", "token"), ("softmax", None)])
@pytest.mark.parametrize("window", [0, (2, 0)])
def test_large_and_ragged(window, feature_map, causal, backend, device):
    layout = PackedLayout.from_lengths((2048, 1025, 0, 511, 3), group_size=256, device=device)
    options = {"window": window, "feature_map": feature_map, "causal": causal, "head_dim": 64}
    check(layout, backend, device, torch.bfloat16, **options)


@pytest.mark.parametrize("window, causal", [(0, "group"), ((2, 0), "token"), (1, None)])
def test_fused_backward(window, causal, backend, device, dtype):
    layout = PackedLayout.from_lengths((2048, 1025, 0, 511, 3), group_size=256, device=device)
    check(layout, backend, device, dtype, window=window, causal=causal, variant="fused")


def test_fused_backward_of_head_dims_and_dtypes(size, backend, device):
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((300, 1, 77), group_size=64, device=device)
    check(layout, backend, device, dtype, head_dim=head_dim, variant="fused")


def test_given_features(backend, device, dtype):
    layout = PackedLayout.from_lengths((300, 1, 77), group_size=64, device=device)
    inputs = make_qkv(378, 4, 64, kv_heads=2, dtype=dtype, device=device)
    features = [make_tensor(378, h, 32, seed=h, dtype=dtype, device=device).abs() for h in (4, 2)]

    def arguments(q, k, v, q_features, k_features):
        return (q, k, v, layout), {"q_features": q_features, "k_features": k_features, "window": 0}

    def run(*tensors):
        given, named = arguments(*tensors)
        return hybrid_attention(*given, **named, return_lse=True, backend=backend)

    def oracle(*tensors):
        given, named = arguments(*tensors)
        return reference.hybrid_attention(*given, **named)

    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(run, oracle, [*inputs, *features], roundings=roundings, names=["out", "lse"])


def test_the_gradient_of_a_sum(backend, device):
    """It is one number with strides of 0."""
    layout = PackedLayout.from_lengths((300, 77), group_size=64, device=device)
    leaves = [x.requires_grad_() for x in make_qkv(377, 4, 64, dtype=torch.bfloat16, device=device)]
    out = hybrid_attention(*leaves, layout, backend=backend)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


def test_a_window_over_everything_is_exact_attention_bit_for_bit(backend, device, dtype):
    layout = PackedLayout.from_lengths((1000, 300, 40), group_size=100, device=device)
    q, k, v = make_qkv(layout.num_tokens, 4, 64, dtype=dtype, device=device)
    exact = packed_attention(q, k, v, layout, backend=backend)
    assert torch.equal(hybrid_attention(q, k, v, layout, window=9, backend=backend), exact)


def test_nothing_leaks_and_runs_repeat(backend, device, dtype):
    layout = PackedLayout.from_lengths((100, 129, 64), group_size=32, device=device)
    q, k, v = make_qkv(layout.num_tokens, 4, 64, dtype=dtype, device=device)
    expected = _results(q, k, v, layout, backend)
    again = _results(q, k, v, layout, backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    poisoned = [with_slack(poison_segment(x, layout, 1), 7) for x in (q, k, v)]
    begin, end = layout.host_cu_seqlens[1:3].tolist()
    for a, b in zip(expected, _results(*poisoned, layout, backend), strict=True):
        assert torch.equal(a[:begin], b[:begin]) and torch.equal(a[end:], b[end : len(a)])
        assert (b[len(a) :] == 0).all()


def _results(q, k, v, layout, backend):
    """Output and gradients for a gradient of the output that is the output itself."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = hybrid_attention(*leaves, layout, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]
