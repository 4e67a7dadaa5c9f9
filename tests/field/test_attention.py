"""Attention on inputs that broke other packages; each mark names the report."""

import pytest
import torch

from vot_kernels import (
    PackedLayout,
    flash_attn_func,
    flash_attn_varlen_func,
    linear_attention,
    packed_attention,
)
from vot_kernels.ops.flash_attention.reference import cross_attention
from vot_kernels.testing import check_against_reference, make_qkv, make_tensor, max_error

report = pytest.mark.tested_on


def bounds(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def by_segments(q, k, v, cu_q, cu_k, causal=False):
    """Segment by segment with the reference; rows past the last segment are zero."""
    out = torch.zeros_like(q)
    for row, row_end, key, key_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if row < row_end and key < key_end:
            keys = slice(key, key_end)
            found = cross_attention(
                q[row:row_end], k[keys], v[keys], None, 0 if causal else None, q.shape[2] ** -0.5
            )
            out = torch.cat([out[:row], found[0], out[row_end:]])
    return out


@report("flash-attention#1537")
def test_empty_segments_of_queries_and_keys():
    cu_q, cu_k = bounds(0, 0, 1, 1, 2), bounds(0, 0, 3, 3, 8)
    q, k, v = make_tensor(2, 9, 64), make_tensor(8, 3, 64, seed=1), make_tensor(8, 3, 64, seed=2)
    check_against_reference(
        lambda q, k, v: [flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, 5)],
        lambda q, k, v: [by_segments(q, k, v, cu_q, cu_k)],
        [q, k, v],
    )


@report("flash-attention#2562")
def test_keys_of_segments_without_queries_get_no_gradient():
    cu_q, cu_k = bounds(0, 0, 1208, 2048, 2048), bounds(0, 2538, 4280, 5120, 8192)
    q, k, v = make_tensor(2048, 4, 256), make_tensor(8192, 1, 256, seed=1), make_tensor(8192, 1, 256, seed=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, cu_q, cu_k, 1208, 3072)
    grads = torch.autograd.grad(out, leaves, make_tensor(2048, 4, 256, seed=3))
    assert all(grad.isfinite().all() for grad in (out, *grads))
    for grad in grads[1:]:
        assert (grad[:2538] == 0).all() and (grad[5120:] == 0).all() and (grad[2538:5120] != 0).any()


@report("flash-attention#2324")
@pytest.mark.parametrize("memory", ["as it comes", "NaN"])
def test_gradients_of_rows_past_the_end_are_zero(memory):
    layout = PackedLayout.from_cu_seqlens([0, 7, 12])
    leaves = [x.requires_grad_() for x in make_qkv(20)]
    if memory == "NaN":
        with torch.no_grad():
            for x in leaves:
                x[12:] = torch.nan
    for out in (
        packed_attention(*leaves, layout),
        flash_attn_varlen_func(*leaves, bounds(0, 7, 12), bounds(0, 7, 12), 7, 7),
        linear_attention(*leaves, layout, causal=True),
    ):
        grads = torch.autograd.grad(out, leaves, torch.full_like(out, 2.0))
        assert all((x[12:] == 0).all() and x[:12].isfinite().all() for x in (out, *grads))


@report("flash-attention#2333")
@pytest.mark.parametrize("place", [0, 31, 63])
def test_one_token_among_empty_segments(place):
    lengths = [0] * 64
    lengths[place] = 1
    q, k, v = make_qkv(1)
    layout = PackedLayout.from_lengths(lengths)
    assert max_error(packed_attention(q, k, v, layout), v) < 1e-6
    cu = layout.cu_seqlens
    assert max_error(flash_attn_varlen_func(q, k, v, cu, cu, 1, 1, causal=True), v) < 1e-6


@report("exllamav3#316")
def test_head_size_72_repeats_its_bits():
    q, k, v = make_qkv(512, 16, 72, dtype=torch.float16)
    layout = PackedLayout.from_lengths([512])
    first, *others = (packed_attention(q, k, v, layout) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    exact = packed_attention(q.double(), k.double(), v.double(), layout, backend="reference")
    assert max_error(first, exact) < 2e-3


@report("verl#4670", "LlamaFactory#10639")
@pytest.mark.parametrize("head_dim", [72, 80])
@pytest.mark.parametrize("longest", [12, torch.tensor(12), None], ids=["int", "tensor", "None"])
def test_tower_head_sizes_and_any_type_of_max_seqlen(head_dim, longest):
    cu = torch.arange(0, 65 * 12, 12, dtype=torch.int32)
    q, k, v = make_qkv(64 * 12, 2, head_dim)
    out = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)
    assert (
        max_error(out, packed_attention(q, k, v, PackedLayout.from_cu_seqlens(cu), backend="reference"))
        < 1e-5
    )


@report("transformers#47170")
def test_a_missing_max_length_does_not_join_segments():
    q, k, v = make_qkv(10)
    cu = bounds(0, 4, 10)
    out = flash_attn_varlen_func(q, k, v, cu, cu, None, None)
    assert torch.equal(out[:4], flash_attn_varlen_func(q[:4], k[:4], v[:4], cu[:2], cu[:2], 4, 4))
    assert max_error(out, by_segments(q, k, v, cu, cu)) < 1e-6


@report("fla#1187")
@pytest.mark.parametrize("causal", [False, True])
def test_large_values_in_half_precision(causal):
    q, k, v = make_qkv(8192, 1, 16, dtype=torch.float16)
    layout = PackedLayout.from_lengths([8192])
    out = linear_attention(q, k, v.abs() * 1e3, layout, causal=causal)
    exact = linear_attention(q.double(), k.double(), v.double().abs() * 1e3, layout, causal=causal)
    assert out.isfinite().all() and max_error(out, exact) < 4


@report("pytorch#148752")
def test_a_training_step_on_varied_lengths():
    lengths = (5 + torch.arange(64) * 3).clamp(max=200)
    layout = PackedLayout.from_lengths(lengths)
    leaves = [x.requires_grad_() for x in make_qkv(layout.num_tokens, 2, 32)]
    grads = torch.autograd.grad(packed_attention(*leaves, layout, causal=True).square().sum(), leaves)
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)


@report("axolotl#3667", "Liger#1248")
def test_rows_more_than_two_to_the_31_numbers_apart():
    memory = torch.empty(2**31 + 64)  # only its ends are touched, so it costs no memory
    q = memory.as_strided((3, 1, 16), (2**30, 16, 1))
    values = make_qkv(3, 1, 16)
    q.copy_(values[0])
    k, v = values[1:]
    layout = PackedLayout.from_lengths([3])
    assert torch.equal(packed_attention(q, k, v, layout), packed_attention(values[0], k, v, layout))
    assert torch.equal(linear_attention(q, k, v, layout), linear_attention(values[0], k, v, layout))
    found = flash_attn_func(q[None], k[None], v[None])
    assert torch.equal(found, flash_attn_func(values[0][None], k[None], v[None]))
