"""The Triton kernels, on the interpreter, on inputs that broke other packages; each mark names the report."""

import pytest
import torch

from tests.marks import interpreted
from vot_kernels import (
    PackedLayout,
    hybrid_attention,
    linear_attention,
    pack_patches,
    packed_attention,
    rope_qk_norm,
    size_aware_embedding,
)
from vot_kernels.testing import make_qkv, make_tensor, max_error, uninitialized_is_nan

pytest.importorskip("triton")

pytestmark = interpreted
report = pytest.mark.tested_on
OPS = (packed_attention, linear_attention, hybrid_attention)
FAR = 2**30  # numbers from one row to the next, so that the third lies beyond 2**31


@report("flash-attention#2333")
@pytest.mark.parametrize("place", [0, 63])
@pytest.mark.parametrize("op", OPS)
def test_one_token_among_empty_segments(op, place):
    lengths = [0] * 64
    lengths[place] = 1
    leaves = [x.requires_grad_() for x in make_qkv(1, 1, 16)]
    layout = PackedLayout.from_lengths(lengths, group_size=4)
    with uninitialized_is_nan():
        out = op(*leaves, layout, backend="triton")
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert max_error(out, leaves[2]) < 1e-5
    assert max_error(grads[2], torch.ones_like(out)) < 1e-5 and all(x.isfinite().all() for x in grads)


@report("flash-attention#2333")
@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_row_for_one_token_among_empty_segments(place):
    lengths = [0] * 64
    lengths[place] = 1
    shapes = ((1, 5), (3, 12), (3,), (5, 3), (5,))
    leaves = [make_tensor(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    results = []
    for backend in ("triton", "torch"):
        with uninitialized_is_nan():
            out = size_aware_embedding(
                leaves[0], PackedLayout.from_lengths(lengths), *leaves[1:], backend=backend
            )
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(max_error(a, b) < 1e-5 for a, b in zip(*results, strict=True))


@report("exllamav3#316")
def test_head_size_72_repeats_its_bits():
    leaves = [x.requires_grad_() for x in make_qkv(40, 2, 72, dtype=torch.float16)]
    layout = PackedLayout.from_lengths([40])
    runs = []
    for _ in range(2):
        with uninitialized_is_nan():
            out = packed_attention(*leaves, layout, backend="triton")
            runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    exact = packed_attention(*(x.detach().double() for x in leaves), layout, backend="reference")
    assert max_error(runs[0][0], exact) < 2e-3


@report("fla#1187")
@pytest.mark.parametrize("causal", [False, True])
def test_states_are_wider_than_half_precision(causal):
    """The sum of 160 values of a thousand lies beyond the largest float16."""
    q, k, v = make_qkv(160, 1, 16, dtype=torch.float16)
    layout, v = PackedLayout.from_lengths([160]), v.abs() * 1e3
    with uninitialized_is_nan():
        out = linear_attention(q, k, v, layout, causal=causal, backend="triton")
    exact = linear_attention(q.double(), k.double(), v.double(), layout, causal=causal, backend="reference")
    assert v.sum() > torch.finfo(torch.float16).max
    assert out.isfinite().all() and max_error(out, exact) < 4


def far_apart(values):
    """The same numbers, with 2**30 of them from one row to the next; untouched memory costs nothing."""
    memory = torch.empty(2 * FAR + values[0].numel(), dtype=values.dtype)
    spread = memory.as_strided(values.shape, (FAR, *values.stride()[1:]))
    return spread.copy_(values)


@report("axolotl#3667", "Liger#1248")
def test_heads_of_rows_more_than_two_to_the_31_numbers_apart():
    q, k, positions = make_tensor(3, 1, 8), make_tensor(3, 1, 8, seed=1), torch.arange(9).view(3, 3)
    weights = {"q_weight": make_tensor(8, seed=2), "k_weight": make_tensor(8, seed=3)}
    expected = rope_qk_norm(q, k, positions, **weights, backend="triton")
    found = rope_qk_norm(far_apart(q), k, positions, **weights, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@report("axolotl#3667", "Liger#1248")
def test_frames_more_than_two_to_the_31_numbers_apart():
    clip = (make_tensor(3, 2, 4, 4) * 60).to(torch.uint8)
    expected, _ = pack_patches([clip], 2, backend="reference")
    assert torch.equal(pack_patches([far_apart(clip)], 2, backend="triton")[0], expected)


@report("axolotl#3667", "Liger#1248")
@pytest.mark.parametrize("op", OPS)
def test_rows_more_than_two_to_the_31_numbers_apart(op):
    q, k, v = make_qkv(3, 1, 16)
    layout = PackedLayout.from_lengths([3], group_size=4)
    expected = op(q, k, v, layout, backend="triton")
    assert torch.equal(op(far_apart(q), k, v, layout, backend="triton"), expected)
