"""When an op may be called as a plain function: only where nothing records or intercepts the call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.marks import COMPUTING
from vot_kernels import (
    PackedLayout,
    aoe,
    dense_residual,
    flash_attn_varlen_func,
    hybrid_attention,
    linear_attention,
    moe,
    pack_patches,
    packed_attention,
    rope_qk_norm,
)
from vot_kernels.ops.eager import needs_dispatcher

X = torch.zeros(3)
LAYOUT = PackedLayout.from_lengths((5, 3), group_size=2)


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_plain_tensors_need_no_dispatcher():
    leaf = torch.zeros(3, requires_grad=True)
    assert not needs_dispatcher([X, leaf, torch.nn.Parameter(X)])
    with torch.inference_mode():
        assert not needs_dispatcher([X, leaf])


@pytest.mark.parametrize(
    "mode", [Silent, FakeTensorMode, lambda: torch.device("cpu"), torch.autograd.profiler.profile]
)
def test_modes_and_the_profiler_need_it(mode):
    with mode():
        assert needs_dispatcher([X])
    assert not needs_dispatcher([X])


def test_subclasses_and_transforms_need_it():
    assert needs_dispatcher([X, X.as_subclass(Sub)]) and needs_dispatcher([X.to("meta")])
    seen = []
    torch.func.vmap(lambda x: seen.append(needs_dispatcher([torch.zeros(1)])) or x)(X)
    assert seen == [True]


# Each op by both ways: a call in a mode that does nothing goes through the dispatcher.


def rows(*shape):
    return torch.randn(shape, requires_grad=True)


def calls():
    """Yield each op's name, a call of it, and its tensors, most of which require gradients."""
    q, k, v = rows(8, 2, 16), rows(8, 1, 16), rows(8, 1, 16)
    fixed = k.detach()
    yield "packed_attention", lambda **o: packed_attention(q, k, v, LAYOUT, return_lse=True, **o), (q, k, v)
    yield "packed_attention of fixed keys", lambda **o: packed_attention(q, fixed, v, LAYOUT, **o), (q, v)
    weight = torch.rand(2, requires_grad=True)
    near = {"window": 0, "far_weight": weight}
    yield "hybrid_attention", lambda **o: hybrid_attention(q, k, v, LAYOUT, **near, **o), (q, k, v, weight)
    yield "linear_attention", lambda **o: linear_attention(q, k, v, LAYOUT, **o), (q, k, v)
    bounds = LAYOUT.cu_seqlens, LAYOUT.cu_seqlens, 5, 5
    yield "flash_attn_varlen_func", lambda **o: flash_attn_varlen_func(q, k, v, *bounds, **o), (q, k, v)
    x, down, up, p, o = rows(8, 16), rows(4, 8, 16), rows(4, 12, 8), rows(4, 12, 16), rows(4, 12, 16)
    yield "aoe", lambda **b: aoe(x, down, up, p, o, 2, return_aux=True, **b)[0], (x, down, up, p, o)
    gate_up, out = rows(4, 24, 16), rows(4, 16, 12)
    index, weights = torch.tensor([[0, 1], [2, 3]] * 4), torch.rand(8, 2, requires_grad=True)
    yield "moe", lambda **b: moe(x, gate_up, out, index, weights, **b), (x, gate_up, out, weights)
    states, mix = [rows(8, 16) for _ in range(3)], rows(3)
    yield "dense_residual", lambda **b: dense_residual(states, mix, **b), (*states, mix)
    norm = rows(16)
    named = {"norm_weight": norm}
    yield "dense_residual, norm", lambda **b: dense_residual(states, mix, **named, **b), (*states, mix, norm)
    at = torch.arange(24).view(8, 3)
    yield "rope_qk_norm", lambda **b: rope_qk_norm(q, k, at, q_weight=norm, **b)[0], (q, norm)
    image, other = rows(3, 8, 8), rows(3, 8, 16)
    yield "pack_patches", lambda **b: pack_patches([image, other], 4, **b)[0], (image, other)
    colours = {"mean": [0.5] * 3, "std": [0.2] * 3}
    yield "pack_patches, normalised", lambda **b: pack_patches([image, other], 4, **colours, **b)[0], (image,)


CALLS = list(calls())


def results(call, tensors, backend):
    """The outputs, and the gradients of the first one."""
    found = call(backend=backend)
    found = found if isinstance(found, tuple) else (found,)
    return *found, *torch.autograd.grad(sum(x.sin().sum() for x in found), tensors)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize(("call", "tensors"), [one[1:] for one in CALLS], ids=[one[0] for one in CALLS])
def test_both_ways_give_the_same(call, tensors, backend):
    plain = results(call, tensors, backend)
    with Silent():
        dispatched = results(call, tensors, backend)
    assert all(torch.equal(x, y) for x, y in zip(plain, dispatched, strict=True))
    with torch.no_grad():
        alone = call(backend=backend)
    assert torch.equal(alone[0] if isinstance(alone, tuple) else alone, plain[0]) and not plain[0].is_leaf


def test_experts_have_shapes_on_the_device_meta():
    x, down, up, p, o = (
        torch.empty(s, device="meta") for s in ((8, 16), (4, 8, 16), (4, 12, 8), *[(4, 12, 16)] * 2)
    )
    y, aux = aoe(x.requires_grad_(), down, up, p, o, 2, return_aux=True)
    assert y.shape == x.shape and aux.norms.shape == (8, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    gate_up, out = torch.empty(4, 24, 16, device="meta"), torch.empty(4, 16, 12, device="meta")
    index, weights = torch.empty(8, 2, dtype=torch.long, device="meta"), torch.empty(8, 2, device="meta")
    assert moe(x, gate_up, out, index, weights).shape == x.shape


def test_autograd_sees_what_it_sees_of_a_custom_op():
    q, k, v = rows(8, 2, 16), rows(8, 2, 16), rows(8, 2, 16)
    out = packed_attention(q, k, v, LAYOUT, backend="torch")
    assert out.grad_fn.name() == "hybrid_attention_fwdBackward"
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), q)

    with torch.no_grad():
        packed_attention(q, k, v, LAYOUT, backend="torch")
        changed = v.clone()
    changed.requires_grad_()
    out = packed_attention(q, k, changed, LAYOUT, backend="torch")
    with torch.no_grad():
        changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_there_is_no_second_derivative():
    q, k, v = rows(8, 2, 16), rows(8, 2, 16), rows(8, 2, 16)
    out = packed_attention(q, k, v, LAYOUT, backend="torch")
    gradient = torch.autograd.grad(out.sin().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_checkpointing_computes_again_what_it_did_not_save():
    q, k, v = rows(8, 2, 16), rows(8, 2, 16), rows(8, 2, 16)

    def attend(*inputs):
        return packed_attention(*inputs, LAYOUT, backend="torch").sin()

    plain = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
