"""When an op may be called as a plain function: only where nothing records or intercepts the call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vot_kernels import PackedLayout, packed_attention
from vot_kernels.ops.eager import needs_dispatcher

X = torch.zeros(3)


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_plain_tensors_need_no_dispatcher():
    leaf = torch.zeros(3, requires_grad=True)
    assert not needs_dispatcher(X, None, torch.nn.Parameter(X, requires_grad=False))
    assert needs_dispatcher(X, leaf) and needs_dispatcher(torch.nn.Parameter(X))
    with torch.no_grad():
        assert not needs_dispatcher(X, leaf)
    with torch.inference_mode():
        assert not needs_dispatcher(X, leaf)


@pytest.mark.parametrize(
    "mode", [Silent, FakeTensorMode, lambda: torch.device("cpu"), torch.autograd.profiler.profile]
)
def test_modes_and_the_profiler_need_it(mode):
    with mode():
        assert needs_dispatcher(X)
    assert not needs_dispatcher(X)


def test_subclasses_and_transforms_need_it():
    assert needs_dispatcher(X.as_subclass(Sub))
    seen = []
    torch.func.vmap(lambda x: seen.append(needs_dispatcher(torch.zeros(1))) or x)(X)
    assert seen == [True]


def test_both_ways_give_the_same():
    layout = PackedLayout.from_lengths((5, 3))
    q, k, v = torch.randn(3, 8, 2, 16)
    plain = packed_attention(q, k, v, layout, backend="torch")
    with Silent():
        assert torch.equal(packed_attention(q, k, v, layout, backend="torch"), plain)
    recorded = packed_attention(q.clone().requires_grad_(), k, v, layout, backend="torch")
    assert torch.equal(recorded, plain) and recorded.requires_grad
