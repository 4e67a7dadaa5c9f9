"""Softmax attention over ranges in PyTorch: cases that torch's CPU kernel would get wrong or make expensive."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vot_kernels import PackedLayout, flash_attn_varlen_func, hybrid_attention, packed_attention
from vot_kernels.ops.flash_attention import torch as flash_torch
from vot_kernels.ops.parts.range_attention import torch as ranges_torch
from vot_kernels.ops.parts.range_attention.blocks import stretches
from vot_kernels.ops.parts.range_attention.torch import plan_pass, range_attention, range_attention_backward
from vot_kernels.testing import make_tensor

LAYOUT = PackedLayout.from_lengths([24, 0, 17], group_size=4)
BOUNDS = torch.tensor([0, 24, 24, 41], dtype=torch.int32)


def make_qkv(dtype=torch.float64):
    shapes = [(41, 4, 16), (41, 2, 16), (41, 2, 16)]
    return [make_tensor(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


CALLS = {
    "packed": lambda *x, **o: packed_attention(*x, LAYOUT, **o),
    "packed causal": lambda *x, **o: packed_attention(*x, LAYOUT, causal=True, **o),
    "hybrid": lambda *x, **o: hybrid_attention(*x, LAYOUT, **o),
    "hybrid causal": lambda *x, **o: hybrid_attention(*x, LAYOUT, causal="token", **o),
    "flash window": lambda *x, scale, **o: flash_attn_varlen_func(
        *x, BOUNDS, BOUNDS, 24, 24, softmax_scale=scale, window_size=(3, 2), **o
    ),
    "flash causal": lambda *x, scale, **o: flash_attn_varlen_func(
        *x, BOUNDS, BOUNDS, 24, 24, softmax_scale=scale, causal=True, **o
    ),
}


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.7, 0.3])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_any_scale(call, scale):
    inputs = make_qkv()
    weights = make_tensor(41, 4, 16, seed=9, dtype=torch.float64)
    found, expected = (call(*inputs, scale=scale, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 3, 15, 16, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_of_nan_shows(length, causal):
    layout = PackedLayout.from_lengths([length, 5])
    q, k, v = make_tensor(3, length + 5, 2, 16)
    q[0, 0, 3] = torch.nan
    q.requires_grad_()
    out, lse = packed_attention(q, k, v, layout, causal=causal, return_lse=True)
    assert (
        out[0, 0].isnan().all()
        and lse[0, 0].isnan()
        and torch.autograd.grad(out.sum(), q)[0][0, 0].isnan().all()
    )
    assert out[1:].isfinite().all() and out[:, 1].isfinite().all() and lse[:, 1].isfinite().all()


def test_a_key_of_nan_shows():
    q, k, v = make_tensor(3, 1, 2, 16)
    k[0, 1, 2] = torch.nan
    out = packed_attention(q, k, v, PackedLayout.from_lengths([1]))
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()


class Storages(TorchDispatchMode):
    """Bytes of the storage of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.sizes += [x.untyped_storage().nbytes() for x in made]
        return result


def test_query_heads_that_share_keys_are_rows_of_one_head():
    """The kernel gets the keys of a head once, for all query heads that read them."""
    q, k, v = make_tensor(32, 1, 16), make_tensor(4, 3000, 16, seed=1), make_tensor(4, 3000, 16, seed=2)
    passes = [plan_pass(np.array([[0, 1, 0, 3000]]), False, q.device)]
    with Storages() as seen:
        out, lse = range_attention(q, k, v, passes, 0.25)
        dq, dk, dv = range_attention_backward(out, None, q, k, v, out, lse, passes, 0.25)
    assert max(seen.sizes) <= k.untyped_storage().nbytes()
    scores = 0.25 * q @ k.repeat_interleave(8, 0).transpose(1, 2)
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(8, 0))
    assert dk.shape == k.shape and dv.shape == v.shape and dq.shape == q.shape


# --- segments as views ---


def packed_in_one(lengths, heads=2, head_dim=24, seed=0):
    """q, k and v of one projection: no row of them follows another in memory."""
    tokens = sum(lengths)
    qkv = make_tensor(tokens, 3, heads, head_dim, seed=seed)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return qkv, (*qkv.unbind(1), bounds, bounds, max(lengths), max(lengths))


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([250] * 4, 1),  # frames of a clip: one batch
        ([250, 180, 250, 250, 180], 4),  # the third and the fourth are one batch
        ([250, 2, 2, 3, 2, 250], 4),  # those of 2 are gathered
        ([250, 0, 250], 1),
    ],
)
def test_segments_are_views_unless_they_are_short(lengths, calls, monkeypatch):
    qkv, call = packed_in_one(lengths)
    seen, attend = [], ranges_torch._attend

    def recorded(*tensors):
        seen.append(tensors[:3])
        return attend(*tensors)

    monkeypatch.setattr(ranges_torch, "_attend", recorded)
    found = flash_attn_varlen_func(*call, backend="torch")
    torch.testing.assert_close(found, flash_attn_varlen_func(*call, backend="reference"))
    assert len(seen) == calls
    begin, end = qkv.data_ptr(), qkv.data_ptr() + qkv.nbytes
    for q, k, v in seen:
        assert all(begin <= x.data_ptr() < end for x in (q, k, v)) == (q.shape[2] > 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[70, 40, 70, 3, 70, 3, 3, 40], [64] * 3, [5] * 6, [0, 33, 0]])
def test_views_have_the_gradients_of_the_reference(lengths, causal):
    weights = make_tensor(sum(lengths), 2, 24, seed=5)
    gradients = []
    for backend in ("torch", "reference"):
        qkv, call = packed_in_one(lengths, seed=3)
        qkv.requires_grad_()
        out = flash_attn_varlen_func(*qkv.unbind(1), *call[3:], causal=causal, backend=backend)
        gradients.append(torch.autograd.grad((out * weights).sum(), qkv)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_what_torch_cannot_read_as_it_lies_is_converted(monkeypatch):
    monkeypatch.setattr(flash_torch, "attend_rows", None)
    _, (q, k, v, *rest) = packed_in_one([30, 20])
    for changed in ((q.half(), k.half(), v.half()), (q, k[:, :1], v[:, :1])):
        assert flash_attn_varlen_func(*changed, *rest, backend="torch").isfinite().all()
    with pytest.raises(TypeError, match="NoneType"):
        flash_attn_varlen_func(q, k, v, *rest, backend="torch")


@pytest.mark.parametrize(
    ("starts", "expected"),
    [([0], [1]), ([0, 5], [2]), ([0, 6], [1, 1]), ([0, 5, 10, 17, 22, 30], [3, 2, 1])],
)
def test_stretches_are_adjacent_in_every_column(starts, expected):
    columns = np.stack([starts, 100 + np.array(starts)], axis=1)
    parts = stretches(columns, (5, 5))
    assert [len(columns[part]) for part in parts] == expected
    assert np.array_equal(np.concatenate([columns[part] for part in parts]), columns)
    columns[:, 1] *= 2
    assert len(stretches(columns, (5, 5))) == len(starts)
