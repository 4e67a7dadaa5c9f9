"""flash_attn_varlen_func and flash_attn_func: the semantics of flash-attn, on every backend."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.marks import COMPUTING, compiled, cpp, interpreted
from vot_kernels.ops.flash_attention import flash_attn_func, flash_attn_varlen_func, op
from vot_kernels.ops.flash_attention import torch as flash_torch
from vot_kernels.ops.flash_attention.geometry import Geometry, Inputs, Saved
from vot_kernels.ops.flash_attention.reference import aligned_mask, flash_attention
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention import torch as _range_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    ToleranceError,
    assert_close_to_exact,
    check_against_reference,
    make_tensor,
    spread,
    uninitialized_is_nan,
)

ROWS, KEYS = (5, 0, 17, 1, 33, 4), (5, 3, 9, 0, 40, 4)
BACKENDS = [*COMPUTING, pytest.param("triton", marks=interpreted)]


def bounds(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).int()


def make_inputs(rows=ROWS, keys=KEYS, heads=2, kv_heads=1, head_dim=16, slack=3, dtype=torch.float32):
    """q, k, v with rows past the last segment."""
    shapes = [(sum(rows) + slack, heads), *[(sum(keys) + slack, kv_heads)] * 2]
    return [make_tensor(*shape, head_dim, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def call(q, k, v, rows=ROWS, keys=KEYS, **options):
    longest = max(rows), max(keys)
    return flash_attn_varlen_func(q, k, v, bounds(rows), bounds(keys), *longest, **options)


def by_hand(q, k, v, rows=ROWS, keys=KEYS, *, causal=False, window=(-1, -1), scale=None):
    """Compute it segment by segment, without code in common with the op."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outputs, i, j = [], 0, 0
    for m, n in zip(rows, keys, strict=True):
        for row in range(m):
            place = row + n - m
            low = 0 if window[0] < 0 else max(0, place - window[0])
            high = n if window[1] < 0 else min(n, place + window[1] + 1)
            if causal:
                high = min(high, place + 1)
            own_k, own_v = k[j + low : j + max(low, high)], v[j + low : j + max(low, high)]
            weights = (torch.einsum("hd,nhd->hn", q[i + row], own_k) * scale).softmax(-1)
            outputs.append(torch.einsum("hn,nhd->hd", weights, own_v))
        i, j = i + m, j + n
    return torch.cat([torch.stack(outputs), torch.zeros_like(q[i:])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (-1, 2), (2, 1), (0, 0)])
def test_outputs_and_gradients(window, causal, backend):
    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: [call(*x, causal=causal, window_size=window, backend=backend)],
            lambda *x: [by_hand(*x, causal=causal, window=window)],
            make_inputs(),
            roundings=16,
            floor=1.0,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_heads_dtypes_and_scale(dtype, kv_heads, backend):
    check_against_reference(
        lambda *x: [call(*x, causal=True, softmax_scale=0.3, backend=backend)],
        lambda *x: [by_hand(*x, causal=True, scale=0.3)],
        make_inputs(heads=4, kv_heads=kv_heads, dtype=dtype),
        roundings=16 if dtype == torch.float32 else 4,
        floor=1.0,
    )


def test_reference_backend():
    inputs = [x.double() for x in make_inputs()]
    for causal, window in ((False, (-1, -1)), (True, (4, 0))):
        found = call(*inputs, causal=causal, window_size=window, backend="reference")
        torch.testing.assert_close(found, by_hand(*inputs, causal=causal, window=window))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_lse_of_every_row(backend):
    q, k, v = make_inputs()
    _, lse, probabilities = call(q, k, v, causal=True, return_attn_probs=True, backend=backend)
    assert lse.shape == (2, q.shape[0]) and probabilities is None
    row, begin = 5 + 0 + 17 + 1 + 32, 5 + 3 + 9 + 0  # the last row of the longest segment sees all its keys
    scores = torch.einsum("hd,nhd->hn", q[row], k[begin : begin + 40].repeat_interleave(2, 1)) / 4
    torch.testing.assert_close(lse[:, row], scores.logsumexp(-1))
    assert (lse[:, -3:] == -torch.inf).all() and (lse[:, 5:13] == -torch.inf).all(), "nothing to see"


def test_a_wrong_alignment_would_be_noticed():
    inputs = make_inputs()
    exact = by_hand(*(x.double() for x in inputs), causal=True)
    low = by_hand(*inputs, causal=True)
    top_left = by_hand(*inputs, window=(-1, 0))
    assert_close_to_exact(top_left, low, exact, roundings=16)  # the same, expressed differently
    with pytest.raises(ToleranceError):
        assert_close_to_exact(by_hand(*inputs, window=(-1, 1)), low, exact, roundings=16)
    assert aligned_mask(2, 3, None, 0).tolist() == [[True, True, False], [True, True, True]]
    assert aligned_mask(3, 2, None, 0).tolist() == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_may_be_strided(backend):
    """The cumulative lengths too, as columns of a matrix."""
    rows, keys = bounds(ROWS), bounds(KEYS)
    inputs = make_inputs(slack=0)

    def results(rows, keys, inputs, view):
        leaves = [view(x).requires_grad_() for x in inputs]
        out = flash_attn_varlen_func(*leaves, rows, keys, max(ROWS), max(KEYS), causal=True, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, view(make_tensor(*out.shape, seed=7)))]

    expected = results(rows, keys, inputs, torch.clone)
    for a, b in zip(results(spread(rows), spread(keys), inputs, spread), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_lengths_are_packed_attention(backend):
    lengths = (5, 0, 17, 33)
    q, k, v = make_inputs(lengths, lengths, slack=0)
    layout = PackedLayout.from_lengths(lengths)
    for causal in (False, True):
        found = call(q, k, v, lengths, lengths, causal=causal, backend=backend)
        expected = packed_attention(q, k, v, layout, causal=causal, backend="reference")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend):
    q, k, v = make_inputs((21, 21), (34, 34), slack=0)
    batch = [q.unflatten(0, (2, 21)), k.unflatten(0, (2, 34)), v.unflatten(0, (2, 34))]
    out, lse, _ = flash_attn_func(*batch, causal=True, return_attn_probs=True, backend=backend)
    flat, flat_lse, _ = call(
        q, k, v, (21, 21), (34, 34), causal=True, return_attn_probs=True, backend=backend
    )
    assert torch.equal(out, flat.unflatten(0, (2, 21))) and lse.shape == (2, 2, 21)
    assert torch.equal(lse[1], flat_lse[:, 21:])
    assert torch.equal(flash_attn_func(*batch, 0.0, None, True, backend=backend), out), "by position"


LONG_ROWS, LONG_KEYS = (300, 40, 300, 150), (340, 700, 340, 20)  # several blocks of rows that share a mask


@compiled
@pytest.mark.parametrize("path", ["fused", "matmuls", pytest.param("cpp", marks=cpp)])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 30), (20, 10), (600, -1), (2**40, 2**40)])
def test_long_segments(window, path, monkeypatch):
    """Also by the matmuls of devices without the fused kernel."""
    if path == "matmuls":
        monkeypatch.setattr(_range_attention, "_attend", _range_attention._attend_matmul)
        monkeypatch.setattr(_range_attention, "_attend_backward", _range_attention._attend_matmul_backward)
    segments, backend = (LONG_ROWS, LONG_KEYS), "cpp" if path == "cpp" else "torch"
    with uninitialized_is_nan():
        check_against_reference(
            lambda *x: [call(*x, *segments, window_size=window, backend=backend)],
            lambda *x: [call(*x, *segments, window_size=window, backend="reference")],
            make_inputs(*segments, head_dim=8),
            roundings=16,
            floor=1.0,
        )


class LargestResult(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return found


@compiled
@pytest.mark.parametrize("sides", [(None, None), (None, 0), (40, 0), (20, 20)])
@pytest.mark.parametrize("segments", [1, 3])
def test_memory_is_that_of_the_inputs_and_not_of_all_pairs(segments, sides):
    rows, keys = (1000,) * segments, (1500,) * segments
    inputs, options = Inputs(*make_inputs(rows, keys, 1, 1, 16)), Options(scale=0.25)
    geometry = Geometry(bounds(rows), bounds(keys), *sides)
    with LargestResult() as seen:
        out, lse = flash_torch.forward(inputs, geometry, options)
        flash_torch.backward(Saved(inputs, out, lse), Grads(out), geometry, options)
    assert 1000 * 16 <= seen.numbers <= 2 * inputs.k.numel() < 1000 * 1500
    with LargestResult() as seen:
        flash_attention(*inputs, *geometry, options.scale)
    assert seen.numbers >= 1000 * 1500, "all pairs would be noticed"


@compiled
@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_and_compile(causal, backend):
    q, k, v = (x.requires_grad_() for x in make_inputs())
    options = (None, 0 if causal else None, 0.25, False, backend)
    torch.library.opcheck(op._flash_attention_fwd.op, (q, k, v, bounds(ROWS), bounds(KEYS), *options))
    out, lse = op._flash_attention_fwd(q, k, v, bounds(ROWS), bounds(KEYS), *options)
    saved = [x.detach() for x in (out, out, lse, q, k, v)]
    torch.library.opcheck(op._flash_attention_bwd.op, (*saved, bounds(ROWS), bounds(KEYS), *options))


@compiled
def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs((3, 2), (2, 4), 2, 1, 3, 1, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: call(*x, (3, 2), (2, 4), causal=True, backend="torch"), inputs)


@compiled
def test_signatures_are_those_of_flash_attn():
    names = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert names[:7] == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    shared = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
    shared += ["deterministic", "return_attn_probs"]
    assert names[7:] == [*shared, "block_table", "backend"]
    assert list(inspect.signature(flash_attn_func).parameters) == ["q", "k", "v", *shared, "backend"]


@compiled
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p is not supported: it must be 0, got 0.1"),
        ({"softcap": 30.0}, "softcap is not supported: it must be 0, got 30.0"),
        (
            {"alibi_slopes": torch.ones(2)},
            r"alibi_slopes is not supported: it must be None, got a tensor of shape \[2\]",
        ),
        ({"block_table": torch.ones(1, 1)}, "block_table is not supported"),
        ({"window_size": (1, -2)}, r"window_size must be a pair of ints >= -1, got \(1, -2\)"),
        ({"window_size": 3}, "window_size must be a pair"),
        ({"backend": "triton"}, "no Triton kernel runs on CPU tensors"),
        ({"causal": "yes"}, "causal must be one of False, True"),
    ],
)
def test_what_is_not_supported_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        call(*make_inputs(), **options)


@compiled
@pytest.mark.parametrize("backend", COMPUTING)
def test_bad_tensors(backend):
    q, k, v = make_inputs()
    cu = bounds(ROWS), bounds(KEYS)
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32, got torch.int64"):
        flash_attn_varlen_func(q, k, v, cu[0].long(), cu[1], 9, 9)
    with pytest.raises(ValueError, match="got 7 and 6 entries"):
        flash_attn_varlen_func(q, k, v, cu[0], cu[1][:-1], 9, 9)
    for wrong, message in (
        ([0, 5, 3], "got 3 after 5"),
        ([0, 99, 99], "got 99 after 0"),
        ([0, 2, -1], "got -1 after 2"),
    ):
        cu_wrong = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"cu_seqlens_k must ascend .* the 64 rows of k, {message}"):
            flash_attn_varlen_func(q, k, v, cu_wrong.clamp(0, 0), cu_wrong, 9, 9, backend=backend)
    with pytest.raises(ValueError, match="multiple"):
        flash_attn_varlen_func(q, *(x.repeat(1, 3, 1) for x in (k, v)), *cu, 9, 9)
    with pytest.raises(TypeError, match="v must have the dtype of q"):
        flash_attn_varlen_func(q, k, v.half(), *cu, 9, 9)
