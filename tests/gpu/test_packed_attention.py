"""Packed softmax attention on a GPU."""

import pytest
import torch

from vot_kernels import PackedLayout, packed_attention
from vot_kernels.ops.packed_attention import reference
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    max_error,
    poison_segment,
    with_slack,
)

OP = "packed_attention"
pytestmark = pytest.mark.gpu


def check(layout, backend, device, dtype, *, heads=4, kv_heads=2, head_dim=64, causal=False, variant=None):
    inputs = make_qkv(layout.num_tokens, heads, head_dim, kv_heads=kv_heads, dtype=dtype, device=device)

    def run(q, k, v):
        options = {"causal": causal, "backend": backend, "_variant": variant}
        return packed_attention(q, k, v, layout, return_lse=True, **options)

    def oracle(q, k, v):
        return reference.packed_attention(q, k, v, layout, causal=causal)

    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(run, oracle, inputs, roundings=roundings, names=["out", "lse"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
def test_packings(lengths, causal, backend, device, dtype):
    check(PackedLayout.from_lengths(lengths, device=device), backend, device, dtype, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_and_dtypes_at_lengths_around_blocks(size, causal, backend, device):
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    check(layout, backend, device, dtype, head_dim=head_dim, causal=causal)


@pytest.mark.parametrize("kv_heads", [1, 8])
def test_large(kv_heads, backend, device):
    layout = PackedLayout.from_lengths((4096, 777), device=device)
    check(layout, backend, device, torch.bfloat16, heads=8, kv_heads=kv_heads, head_dim=128)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_backward_at_lengths_around_blocks(size, causal, backend, device):
    dtype, head_dim = size
    layout = PackedLayout.from_lengths((127, 128, 129, 1, 0, 640), device=device)
    options = {"head_dim": head_dim, "causal": causal, "variant": "fused"}
    check(layout, backend, device, dtype, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fused_backward_of_many_tiles(head_dim, backend, device):
    """Check that many programs can add to the same rows of dq."""
    layout = PackedLayout.from_lengths((8192, 777), device=device)
    options = {"heads": 4, "kv_heads": 1, "head_dim": head_dim, "variant": "fused"}
    check(layout, backend, device, torch.bfloat16, **options)


def test_fused_backward_neither_leaks_nor_touches_slack(backend, device):
    layout = PackedLayout.from_lengths((100, 129, 64), device=device)
    q, k, v = make_qkv(layout.num_tokens, 4, 128, kv_heads=2, dtype=torch.bfloat16, device=device)
    poisoned = [with_slack(poison_segment(x, layout, 1), 70) for x in (q, k, v)]
    results = []
    for tensors in ((q, k, v), poisoned):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = packed_attention(*leaves, layout, backend=backend, _variant="fused")
        results.append(torch.autograd.grad(out, leaves, out.detach()))
    for name, a, b in zip(("dq", "dk", "dv"), *results, strict=True):
        for own in (slice(0, 100), slice(229, 293)):
            assert max_error(b[own], a[own]) <= 0.02 * float(a[own].abs().max()), name
        assert (b[293:] == 0).all(), name


def test_strides_beyond_two_to_the_31(backend, device):
    """Views into a wide buffer: the last row begins past the reach of 32-bit offsets."""
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB free")
    rows, width = 2304, 2**20
    buffer = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    q, k, v = (buffer[:, i * 512 : (i + 1) * 512].unflatten(1, (4, 128)) for i in range(3))
    layout = PackedLayout.from_lengths((rows - 1, 1), device=device)
    out = packed_attention(q, k, v, layout, backend=backend)
    compact = packed_attention(*(x.contiguous() for x in (q, k, v)), layout, backend=backend)
    assert torch.equal(out, compact)


@pytest.mark.tested_on("exllamav3#316")
def test_head_size_72_repeats_its_bits(backend, device):
    leaves = [x.requires_grad_() for x in make_qkv(512, 16, 72, dtype=torch.float16, device=device)]
    layout = PackedLayout.from_lengths([512], device=device)
    runs = []
    for _ in range(4):
        out = packed_attention(*leaves, layout, backend=backend)
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.tested_on("flash-attention#2333")
def test_one_token_among_empty_segments(backend, device):
    q, k, v = make_qkv(1, device=device)
    for place in (0, 31, 63):
        lengths = [0] * 64
        lengths[place] = 1
        layout = PackedLayout.from_lengths(lengths, device=device)
        torch.testing.assert_close(packed_attention(q, k, v, layout, backend=backend), v)


@pytest.mark.tested_on("axolotl#3667", "Liger#1248")
def test_rows_more_than_two_to_the_31_numbers_apart(backend, device):
    if device.type != "cuda":
        pytest.skip("that is a test of tests/field for the CPU")
    q, k, v = make_qkv(3, 1, 64, dtype=torch.bfloat16, device=device)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((3, 1, 64), (2**30, 64, 1)).copy_(q)
    layout = PackedLayout.from_lengths([3], device=device)
    found, expected = (packed_attention(x, k, v, layout, backend=backend) for x in (far, q))
    assert torch.equal(found, expected)
