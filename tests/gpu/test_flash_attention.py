"""The functions of the flash-attn package on a GPU."""

import pytest
import torch

from vot_kernels import PackedLayout, flash_attn_func, flash_attn_varlen_func, packed_attention
from vot_kernels.testing import check_against_reference, make_qkv, make_tensor

OP = "packed_attention"
pytestmark = pytest.mark.gpu

LENGTHS = (300, 0, 129, 1)


def make_inputs(rows, keys, device, dtype=torch.bfloat16, head_dim=64):
    shapes = [(sum(rows), 4), *[(sum(keys), 2)] * 2]
    return [make_tensor(*s, head_dim, seed=i, dtype=dtype, device=device) for i, s in enumerate(shapes)]


def bounds(lengths, device):
    return PackedLayout.from_lengths(lengths, device=device).cu_seqlens


@pytest.mark.parametrize("causal", [False, True])
def test_equal_lengths_are_packed_attention(causal, backend, device):
    q, k, v = make_qkv(sum(LENGTHS), 4, 64, kv_heads=2, dtype=torch.bfloat16, device=device)
    layout = PackedLayout.from_lengths(LENGTHS, device=device)
    cu = layout.cu_seqlens
    found = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300, causal=causal, backend=backend)
    packed = packed_attention(q, k, v, layout, causal=causal, backend=backend)
    if backend == "triton":
        assert torch.equal(found, packed)
    else:  # PyTorch's attention there, tiled matmuls here
        torch.testing.assert_close(found, packed, rtol=0.02, atol=0.02)  # two roundings of bfloat16 or so


@pytest.mark.parametrize(
    "causal, window", [(False, (-1, -1)), (True, (-1, -1)), (True, (100, 0)), (False, (3, 70))]
)
def test_lengths_of_q_and_k_that_differ(causal, window, backend, device):
    rows, keys = (300, 5, 129, 0, 1), (200, 0, 400, 3, 700)

    def call(q, k, v, backend=backend):
        options = {"causal": causal, "window_size": window, "backend": backend}
        cu_rows, cu_keys = bounds(rows, device), bounds(keys, device)
        return [flash_attn_varlen_func(q, k, v, cu_rows, cu_keys, 300, 700, **options)]

    inputs = make_inputs(rows, keys, device)
    check_against_reference(call, lambda *x: call(*x, backend="reference"), inputs, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_of_equal_lengths(dtype, backend, device):
    inputs = [x.unflatten(0, (3, -1)) for x in make_inputs([50] * 3, [130] * 3, device, dtype)]
    roundings = 16.0 if dtype == torch.float32 else 4.0
    check_against_reference(
        lambda *x: [flash_attn_func(*x, causal=True, backend=backend)],
        lambda *x: [flash_attn_func(*x, causal=True, backend="reference")],
        inputs,
        roundings=roundings,
        floor=1.0,
    )
