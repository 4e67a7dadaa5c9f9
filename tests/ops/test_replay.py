"""Repeated launches: the same bits as a call that goes all the way, and only where nothing has changed but the data."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.marks import interpreted
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
    size_aware_embedding,
    tuning,
)
from vot_kernels.ops import replay
from vot_kernels.ops.launch import Kernel, record_launches
from vot_kernels.ops.parts.plans import keep_with
from vot_kernels.ops.replay import Replayed

TOKENS, WIDTH = 11, 16
ARCH = "sm_90"


def layout(device="cpu"):
    return PackedLayout.from_grid_thw([(2, 1, 3), (1, 5, 1)], device=device)


def calls(device="cpu"):
    """Yield each op's name, a call of it with a layout, and its tensors."""

    def rows(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    def shares(*shape):
        return torch.rand(shape, device=device, requires_grad=True)

    q, k, v = rows(TOKENS, 2, WIDTH), rows(TOKENS, 1, WIDTH), rows(TOKENS, 1, WIDTH)
    weight, norm = shares(2), rows(WIDTH)
    yield "packed", lambda at, **b: packed_attention(q, k, v, at, return_lse=True, **b), (q, k, v)
    apart = torch.randn(WIDTH, 2, TOKENS, device=device).permute(2, 1, 0).requires_grad_()  # it is copied
    yield "packed, strides", lambda at, **b: packed_attention(apart, k, v, at, **b), (apart, k, v)
    near = {"window": (1, 0), "beta": weight, "causal": "token"}
    yield "hybrid", lambda at, **b: hybrid_attention(q, k, v, at, **near, **b), (q, k, v, weight)
    far = {"window": 0, "far_weight": weight}
    yield "hybrid, far weight", lambda at, **b: hybrid_attention(q, k, v, at, **far, **b), (q, k, v, weight)
    yield "linear", lambda at, **b: linear_attention(q, k, v, at, **b), (q, k, v)
    fade = shares(2)

    def fading(at, **b):
        return linear_attention(q, k, v, at, causal=True, log_decay=-fade.abs(), **b)

    yield "linear, decay", fading, (q, k, v, fade)

    def flash(at, **b):
        return flash_attn_varlen_func(q, k, v, at.cu_seqlens, at.cu_seqlens, 6, 6, causal=True, **b)

    yield "flash", flash, (q, k, v)
    w1, b1, w2, b2 = rows(WIDTH, 24), rows(WIDTH), rows(WIDTH, WIDTH), rows(WIDTH)
    x, hidden = rows(TOKENS, WIDTH), (w1, b1, w2, b2)
    yield "size", lambda at, **b: size_aware_embedding(x, at, *hidden, **b), (x, *hidden)
    experts = rows(4, 16, WIDTH), rows(4, 16, 16), rows(4, 16, WIDTH), rows(4, 16, WIDTH)
    yield "aoe", lambda at, **b: aoe(x, *experts, 2, return_aux=True, **b)[0], (x, *experts)
    gate_up, out = rows(4, 32, WIDTH), rows(4, WIDTH, 16)
    weights = shares(TOKENS, 2)

    def routed(at, **b):
        indices = x.detach()[:, :4].topk(2).indices
        return moe(x, gate_up, out, indices, weights, **b)

    yield "moe", routed, (x, gate_up, out, weights)
    states, mix = [rows(TOKENS, WIDTH) for _ in range(3)], rows(3)
    yield "dense", lambda at, **b: dense_residual(states, mix, norm_weight=norm, **b), (*states, mix, norm)
    yield "rope", lambda at, **b: rope_qk_norm(q, k, at.positions, q_weight=norm, **b), (q, k, norm)
    image, clip = rows(3, 8, 8), rows(2, 3, 8, 16)
    yield "patches", lambda at, **b: pack_patches([image, clip], 4, **b)[0], (image, clip)


CALLS = [name for name, *_ in calls()]


@pytest.fixture
def repeated(monkeypatch):
    """How often records were repeated."""
    count, repeat = [], replay._Record.repeat

    def counted(self, tensors):
        count.append(self)
        return repeat(self, tensors)

    monkeypatch.setattr(replay._Record, "repeat", counted)
    return count


def call_in_full(monkeypatch, function):
    """Call a function with no launches recorded or repeated."""
    with monkeypatch.context() as patch:
        patch.setattr(Replayed, "__call__", lambda self, *arguments: self._function(*arguments))
        return function()


@pytest.fixture
def in_full(monkeypatch):
    return partial(call_in_full, monkeypatch)


def results(call, tensors, at, backend="triton"):
    found = call(at, backend=backend)
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *torch.autograd.grad(sum(x.sin().sum() for x in found), tensors)]


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_other_data_give_the_bits_of_a_whole_call(name, in_full, repeated):
    at, others = layout(), []
    for n in range(3):
        torch.manual_seed(n)
        call, tensors = next((call, tensors) for known, call, tensors in calls() if known == name)
        others.append(call)  # whose memory no later one gets
        repeated.clear()  # an op without a layout may have met calls of this kind before
        found = results(call, tensors, at)
        if n > 0:  # the one that is recorded, and the one that is repeated
            for x, y in zip(found, in_full(partial(results, call, tensors, at)), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    # Forward and backward of the third call; a table of addresses is made anew.
    assert len(repeated) == (0 if name == "patches" else 2)


# What follows needs no kernel to run: the launches are listed.


def listed(function):
    with record_launches(ARCH) as launches, torch.no_grad():
        function()
    return launches


def half(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def test_the_launches_are_those_of_a_whole_call(repeated, in_full):
    q, k, v, beta = half(64, 4, 32), half(64, 2, 32), half(64, 2, 32), torch.zeros(4)
    at = PackedLayout.from_lengths([40, 24], group_size=8)

    def call():
        hybrid_attention(q, k, v, at, window=1, beta=beta, backend="triton")

    in_full(lambda: listed(call))
    wanted = in_full(lambda: listed(call))
    for _ in range(3):
        found = listed(call)
    assert len(repeated) == 1 and len(found) == len(wanted) == 3
    for a, b in zip(found, wanted, strict=True):
        assert (a.kernel, a.grid, a.config) == (b.kernel, b.grid, b.config)
        assert a.arguments.keys() == b.arguments.keys()
        for name, x in a.arguments.items():
            y = b.arguments[name]
            if isinstance(x, torch.Tensor):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), name
            else:
                assert x == y, name


Q = half(16, 2, 32)
AT = PackedLayout.from_lengths([16])


def packed(q=Q, k=None, v=None, at=AT, **options):
    packed_attention(
        q, Q.clone() if k is None else k, Q.clone() if v is None else v, at, backend="triton", **options
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: packed(half(32, 2, 32)[::2]),
        lambda: packed(half(16, 4, 32)),
        lambda: packed(half(16 * 64 + 1)[1:].view(16, 2, 32)),
        lambda: packed(scale=0.5),
        lambda: packed(at=PackedLayout.from_lengths([16])),
        lambda: packed(at=PackedLayout.from_lengths([9, 7])),
    ],
    ids=["strides", "heads", "alignment", "scale", "layout", "lengths"],
)
def test_a_call_of_another_kind_is_not_that_of_the_record(repeated, other):
    for _ in range(3):
        listed(packed)
    before = len(repeated)
    assert before
    listed(other)
    assert len(repeated) == before
    listed(packed)
    assert len(repeated) == before + 1


@pytest.mark.parametrize("changed", ["cu_seqlens", "cu_groups", "segment_groups"])
def test_a_changed_layout_is_another(repeated, changed):
    at = PackedLayout.from_lengths([9, 7], group_size=2)

    def call():
        hybrid_attention(Q, Q.clone(), Q.clone(), at, window=1, backend="triton")

    for _ in range(3):
        listed(call)
    assert len(repeated) == 1
    getattr(at, changed)[1] += 0
    listed(call)
    assert len(repeated) == 1


def test_an_id_that_went_to_another_tensor_is_no_layout(repeated):
    owner, bounds = torch.tensor([0, 3]), torch.tensor([0, 3])
    op = Replayed(lambda x, at, other, backend: x + 1, ["at", "other"])
    for _ in range(3):
        op(torch.ones(3), owner, bounds, "triton")
    assert len(repeated) == 1
    kind = next(x for x in owner.__dict__["_vot_kernels_kept"].values() if isinstance(x, replay._Kind))
    kind._layout[1] = weakref.ref(torch.ones(1))  # what had the id is no more
    for _ in range(2):
        op(torch.ones(3), owner, bounds, "triton")
    assert len(repeated) == 1
    op(torch.ones(3), owner, bounds, "triton")
    assert len(repeated) == 2


def test_each_call_has_memory_of_its_own():
    at, outs = PackedLayout.from_lengths([16]), []
    with record_launches(ARCH), torch.no_grad():
        for _ in range(5):
            outs.append(packed_attention(Q, Q.clone(), Q.clone(), at, backend="triton"))
    assert len({x.data_ptr() for x in outs}) == 5


def test_switches_and_configs_are_part_of_the_kind(repeated):
    at = PackedLayout.from_lengths([16])

    def call():
        packed(at=at)

    for _ in range(3):
        listed(call)
    assert len(repeated) == 1
    with tuning.preferring("plain"):
        listed(call)
    torch.use_deterministic_algorithms(True)
    try:
        listed(call)
    finally:
        torch.use_deterministic_algorithms(False)
    blocks = {"BLOCK_Q": 16, "BLOCK_K": 16}
    entry = {"blocks": blocks, "num_warps": 1, "num_stages": 1}
    with tuning.using(ARCH, {"range_attention": {"fwd": [entry]}}):
        found = listed(call)
    assert found[-1].config.blocks == blocks and len(repeated) == 1
    with record_launches("sm_80") as launches:
        call()
    assert launches and len(repeated) == 1


def test_a_tensor_in_two_places_is_not_recorded(repeated):
    at = PackedLayout.from_lengths([16])
    for _ in range(4):
        listed(lambda: packed(k=Q, at=at))
    assert not repeated
    found = [listed(lambda: packed(at=at)) for _ in range(3)][-1]
    assert len(repeated) >= 1
    pointers = [found[-1].arguments[name].data_ptr() for name in ("q_ptr", "k_ptr", "v_ptr")]
    assert len({*pointers}) == 3


def test_a_record_keeps_no_tensor_of_a_call_and_ends_with_the_layout():
    def use():
        at, q = PackedLayout.from_lengths([16]), half(16, 2, 32)
        for _ in range(4):
            listed(lambda: packed(q, at=at))
        return at, weakref.ref(q), weakref.ref(at.cu_seqlens)

    gc.disable()
    try:
        at, argument, owner = use()
        assert argument() is None and owner() is not None
        del at
        assert owner() is None
    finally:
        gc.enable()


class Living(TorchDispatchMode):
    """Counts, at each operator, the tensors that earlier ones made and that are still there."""

    def __init__(self):
        super().__init__()
        self.made, self.counts = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts.append(sum(ref() is not None for ref in self.made))
        found = function(*args, **(kwargs or {}))
        self.made.append(weakref.ref(found))
        return found


def test_memory_is_given_back_when_a_whole_call_would():
    op = Replayed(lambda x, backend: ((x + 1) * 2).exp().sin())
    x = torch.ones(3)
    for _ in range(4):
        with Living() as living:
            op(x, "triton")
        assert living.counts[-1] == 1 and max(living.counts) <= 2
    assert next(iter(op._kinds.values())).record is not None


def test_a_call_that_reads_a_number_is_not_repeated(repeated):
    kernel = Kernel("range_attention", "key_ranges", "common.ranges:_key_ranges_kernel")

    def function(x, reads, backend):
        found = torch.empty_like(x)
        more = int(x.sum()) if reads else 3
        kernel.launch((1,), ranges_ptr=found, rows=more)
        return found

    ones = torch.ones(4)
    for reads in (True, False):
        op = Replayed(function)
        launches = [listed(lambda op=op, reads=reads: op(ones, reads, "triton")) for _ in range(4)]
        assert [len(x) for x in launches] == [1] * 4
        assert len(repeated) == (0 if reads else 2)


def test_operators_of_torch_are_repeated_and_what_is_not_needed_is_left_out():
    kernel = Kernel("range_attention", "key_ranges", "common.ranges:_key_ranges_kernel")

    def function(x, others, backend):
        unused = x + 1
        total = torch.cat(others).sum(0)
        total.mul_(2)
        kernel.launch((1,), ranges_ptr=total, rows=unused.shape[0])
        first, second = total.view(2, 2).unbind(0)
        return [x * total, None], (first, second)

    op = Replayed(function)
    for _ in range(4):
        x, others = torch.randn(4), [torch.randn(3, 4), torch.randn(2, 4)]
        with record_launches(ARCH), torch.no_grad():
            (product, nothing), halves = op(x, others, "triton")
        total = 2 * torch.cat(others).sum(0)
        assert nothing is None and torch.equal(torch.cat(halves), total) and torch.equal(product, x * total)
    (kind,) = op._kinds.values()
    assert kind.record is not None and len(kind.record._steps) == 7  # without x + 1


def test_tensors_from_elsewhere_are_used_if_ops_keep_them():
    elsewhere, owner = torch.ones(3), torch.ones(3)

    def kept():
        return keep_with(owner, "three", lambda: torch.full((3,), 3.0))

    for op, refused in (
        (Replayed(lambda x, backend: elsewhere), True),
        (Replayed(lambda x, backend: x + elsewhere), True),
        (Replayed(lambda x, backend: x + torch.tensor([x.data_ptr()])), True),
        (Replayed(lambda x, backend: kept()), True),
        (Replayed(lambda x, backend: x + kept()), False),
    ):
        for _ in range(3):
            op(torch.ones(3), "triton")
        assert [kind.refused for kind in op._kinds.values()] == [refused]
    assert torch.equal(op(torch.ones(3), "triton"), torch.full((3,), 4.0))


def test_tensors_in_tuples_of_a_launch_have_their_places():
    states, weights = [half(8, 16) for _ in range(3)], half(3)
    for _ in range(3):
        listed(lambda: dense_residual(states, weights, backend="triton"))
    others = [half(8, 16) for _ in range(3)]
    (launch,) = listed(lambda: dense_residual(others, weights, backend="triton"))
    assert [x.data_ptr() for x in launch.arguments["states"][:3]] == [x.data_ptr() for x in others]


def test_kinds_without_a_layout_are_few():
    op = Replayed(lambda x, backend: x + 1)
    for n in range(3 * replay._MOST_KEPT):
        op(torch.ones(n + 1), "triton")
    assert len(op._kinds) <= replay._MOST_KEPT


def test_inference_tensors_and_autocast_go_all_the_way(repeated):
    with torch.inference_mode():
        bounds = torch.tensor([0, 3])
        op = Replayed(lambda x, bounds, backend: x + 1, ["bounds"])
        for _ in range(4):
            op(torch.ones(3), bounds, "triton")
    assert not repeated
    op = Replayed(lambda x, backend: x + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            op(torch.ones(2), "triton")
    assert not op._kinds
