"""Linear attention on a GPU."""

import pytest
import torch

from vot_kernels import PackedLayout, linear_attention
from vot_kernels.reference import attention as reference
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    poison_segment,
    with_slack,
)

OP = "linear_attention"
pytestmark = pytest.mark.gpu


def check(layout, backend, device, dtype, *, heads=4, kv_heads=2, head_dim=64, **options):
    inputs = make_qkv(layout.num_tokens, heads, head_dim, kv_heads=kv_heads, dtype=dtype, device=device)

    def run(q, k, v):
        return (linear_attention(q, k, v, layout, backend=backend, **options),)

    def oracle(q, k, v):
        return (reference.linear_attention(q, k, v, layout, **options)[0],)

    # The gradients of q and k are small differences of larger terms: those round, too.
    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(run, oracle, inputs, roundings=roundings, floor=0.05)


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
