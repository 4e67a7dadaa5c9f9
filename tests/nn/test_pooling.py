"""Attention pooling of packed tokens: by hand, empty segments and slack rows, one graph for all packings."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.rounding import nearly_equal
from vot_kernels.nn import PackedAttentionPooling
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor, max_error, with_slack

LENGTHS = (5, 0, 1, 7)
LAYOUT = PackedLayout.from_lengths(LENGTHS)


def by_hand(pooling, x):
    """Softmax over the tokens of each segment and head, in the equation's order."""
    rows = []
    for part in x.split(LENGTHS):
        weight = (part @ pooling.score.weight.T).softmax(0)
        value = (part @ pooling.value.weight.T).unflatten(1, (weight.shape[1], -1))
        rows.append((weight[..., None] * value).sum(0).flatten())
    return torch.stack(rows) @ pooling.out.weight.T


def test_by_hand():
    pooling, x = PackedAttentionPooling(16, 4).double(), make_tensor(13, 16, dtype=torch.float64)
    found = pooling(x, LAYOUT)
    assert max_error(found, by_hand(pooling, x)) < 1e-6  # scores are float32
    assert (found[1] == 0).all() and found.abs().sum(1).count_nonzero() == 3


def test_slack_rows_are_left_out():
    pooling, x = PackedAttentionPooling(16, 4), make_tensor(13, 16)
    assert torch.equal(pooling(with_slack(x, 2), LAYOUT), pooling(x, LAYOUT))


def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")
    pooling = PackedAttentionPooling(16, 4)
    compiled = torch.compile(pooling, backend=counter, fullgraph=True, dynamic=True)
    # The first has as many tokens as nothing else, or PyTorch would take the two to be equal always.
    for lengths in [(5, 0, 1, 7, 4), (2, 2), (1, 2, 3, 4, 5, 6), (2,) * 11]:
        layout, x = PackedLayout.from_lengths(lengths), make_tensor(sum(lengths), 16).requires_grad_()
        found, wanted = compiled(x, layout), pooling(x, layout)
        assert torch.equal(found, wanted)
        weight = make_tensor(*wanted.shape, seed=1)
        gradients = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (found, wanted)]
        assert nearly_equal(*gradients)
    assert counter.frame_count == 1


def test_bad_sizes():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 16 and 3"):
        PackedAttentionPooling(16, 3)
