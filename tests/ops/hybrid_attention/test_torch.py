"""Small groups in PyTorch: they share blocks of near rows and states of far ones, at a cost linear in the rows."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.marks import COMPUTING
from vot_kernels import PackedLayout, flash_attn_varlen_func, hybrid_attention, packed_attention
from vot_kernels.ops.dispatch import load
from vot_kernels.ops.hybrid_attention.geometry import Geometry
from vot_kernels.ops.hybrid_attention.torch import make_plan
from vot_kernels.ops.parts.plans import forget_plans
from vot_kernels.testing import make_tensor, shifted

BETA = torch.tensor([0.3, -0.5, 0.1, -1.0], dtype=torch.float64)


def irregular(*segments: int) -> PackedLayout:
    """Return groups of 0 to 7 rows, with some large ones."""
    numbers = np.random.default_rng(0)
    bounds = [0]
    for length in segments:
        end = bounds[-1] + length
        while bounds[-1] < end:
            size = 90 if numbers.random() < 0.02 else int(numbers.integers(0, 8))
            bounds.append(min(end, bounds[-1] + size))
    return PackedLayout.from_cu_seqlens([0, *np.cumsum(segments).tolist()], bounds)


LAYOUTS = {
    "ones": PackedLayout.from_lengths([430, 37, 0, 200], group_size=1),
    "threes": PackedLayout.from_lengths([500, 110], group_size=3),
    "sixteens": PackedLayout.from_lengths([400, 300], group_size=16),
    "irregular": irregular(450, 210, 30),
    "one of four": PackedLayout.from_lengths([4], group_size=4),
    "none": PackedLayout.from_lengths([0], group_size=1),
    "of two kinds": PackedLayout.from_cu_seqlens([0, 300, 600], [*range(301), 400, 500, 600]),
}
WINDOWS = [
    (0, None),
    (1, None),
    (70, None),
    ((3, 40), None),
    ((200, 0), None),
    (5, "group"),
    (None, "group"),
    (90, "token"),
    (0, "token"),
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("window", "causal"), WINDOWS)
def test_equals_the_reference(layout, window, causal):
    rows = layout.num_tokens
    shapes = [(rows, 4, 6), (rows, 2, 6), (rows, 2, 6)]
    leaves = [make_tensor(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    leaves = [x.requires_grad_() for x in (*leaves, BETA.clone())]
    d_out, d_lse = make_tensor(rows, 4, 6, seed=7, dtype=torch.float64), make_tensor(rows, 4, seed=8).double()

    def run(backend):
        options = {"window": window, "causal": causal, "backend": backend, "return_lse": True}
        out, lse = hybrid_attention(*leaves[:3], layout, beta=leaves[3], **options)
        loss = (out * d_out).sum() + (lse * d_lse).sum()
        return out, lse, *torch.autograd.grad(loss, leaves, materialize_grads=True)

    for a, b in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [[30, 17, 30, 5], [500, 30]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_no_beta_is_a_beta_of_zero(lengths, kv_heads):
    layout = PackedLayout.from_lengths(lengths, group_size=1)
    q, k, v = (make_tensor(sum(lengths), n, 6, seed=n, dtype=torch.float64) for n in (4, kv_heads, kv_heads))
    for beta in (None, torch.zeros(4)):
        out = hybrid_attention(q, k, v, layout, window=2, beta=beta, backend="torch")
        reference = hybrid_attention(q, k, v, layout, window=2, beta=beta, backend="reference")
        torch.testing.assert_close(out, reference, rtol=1e-9, atol=1e-10)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return result


@pytest.mark.parametrize(("group", "window"), [(1, 64), (4, 16), (16, 1)])
def test_no_tensor_is_much_larger_than_the_inputs(group, window):
    layout = PackedLayout.from_lengths([3000], group_size=group)
    leaves = [make_tensor(3000, 1, 32, seed=i).requires_grad_() for i in range(3)]
    with Largest() as seen:
        hybrid_attention(*leaves, layout, window=window).sum().backward()
    assert (
        seen.bytes <= 6 * leaves[0].untyped_storage().nbytes()
    )  # one state per group: 33 times for groups of 1


FAR = (64, 64, 1)  # head_dim, width of features, heads that share keys


def test_work_grows_with_the_rows_and_the_window_alone():
    """Pairs of rows in blocks, near and far, per row: of groups of 1 with a window of 256, 513 are near."""
    for length in (2048, 8192):
        geometry = Geometry.of(PackedLayout.from_lengths([length], group_size=1), 256, None)
        plan = make_plan(geometry, None, FAR)
        near, far = (
            sum(item.queries.num_rows * item.keys.length for item in items) / length
            for items in (plan.passes[0], plan.pairs)
        )
        blocks = sum(len(item.queries) for items in (plan.passes[0], plan.pairs) for item in items)
        assert near < 650 and far < 300 and blocks < length / 16
        assert plan.far is not None and length / 128 <= plan.far.num_slots <= length / 64


def test_large_groups_stand_alone():
    plan = make_plan(Geometry.of(PackedLayout.from_lengths([2048], group_size=128), 1, None), None, FAR)
    assert not plan.pairs and all(item.limits is None for item in plan.passes[0])


@pytest.mark.parametrize("group", [1, 4])
def test_masks_cover_a_diagonal_where_all_earlier_groups_are_near(group):
    """Of 4,096 rows each sees half on average: without a mask, but for its own block."""
    layout = PackedLayout.from_lengths([4096], group_size=group)
    plan = make_plan(Geometry.of(layout, None, "group"), None, FAR)
    items = [item for blocks in plan.passes for item in blocks]
    masked = sum(item.queries.num_rows * item.keys.length for item in items if item.limits is not None)
    pairs = sum(item.queries.num_rows * item.keys.length / (1 + item.causal) for item in items)
    assert masked <= 128 * 4096 and pairs <= (2048 + 128) * 4096 and not plan.pairs


def products(plan, head_dim):
    """Multiplications for one head, as PyTorch does them: of pairs, near, far or both, and of states."""
    near, far = (
        sum(item.queries.num_rows * item.keys.length for item in items)
        for items in ([x for items in plan.passes for x in items], plan.pairs)
    )
    both = sum(item.rows.num_rows * item.rows.length for item in plan.short)
    rows = 0 if plan.far is None else sum(blocks.num_rows for blocks, _ in plan.far.groups)
    return head_dim * (2 * near + 2 * far + 3 * both + 2 * rows * (head_dim + 1))


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("length", [16, 64, 150, 256, 1000, 5000])
def test_work_exceeds_that_of_exact_attention_by_little(length, group_size):
    layout = PackedLayout.from_lengths([length] * 3, group_size=group_size)
    for window in (0, 1, 4, 16, 256):
        plan = make_plan(Geometry.of(layout, window, None), None, FAR, True)
        assert products(plan, 64) <= 1.8 * 3 * 2 * 64 * length**2
        assert not plan.short or (plan.all_short and length <= 256)


def test_short_segments_have_all_their_pairs_in_one():
    """Segments without states: those of one length together, in no other part of the plan."""
    for lengths in ([32] * 50, [20, 33, 41, 20, 33]):
        geometry = Geometry.of(PackedLayout.from_lengths(lengths, group_size=1), 4, None)
        plan = make_plan(geometry, None, FAR, True)
        assert plan.all_short and not plan.passes and not plan.pairs and not plan.far.groups
        assert [len(item.rows) for item in plan.short] == [lengths.count(n) for n in dict.fromkeys(lengths)]
        for item in plan.short:
            assert ((item.near == 0) ^ (item.far == 1)).all() and (item.near == 0).sum(1).max() == 9
        some_heads = make_plan(geometry, None, FAR, False)  # one of which may have no far weight
        assert not some_heads.short and some_heads.passes and some_heads.pairs


def test_groups_of_sixteen_have_states_of_their_own():
    layout = PackedLayout.from_lengths([590, 1333, 2590], group_size=16)
    plan = make_plan(Geometry.of(layout, 1, None), None, FAR, True)
    near = sum(item.queries.num_rows * item.keys.length for item in plan.passes[0])
    assert near <= 48 * layout.num_tokens * 1.2


SHAPES = [
    (2, 2, 16, torch.float32),
    (4, 2, 8, torch.float64),
    (3, 3, 72, torch.float32),
    (2, 1, 24, torch.bfloat16),
]


def clips_of_frames(numbers: np.random.Generator) -> tuple[list[int], list[int]]:
    """Bounds of some clips, and of their frames: of one size in a clip, mostly small, or of any size."""
    sizes = [
        numbers.integers(0, 40, 5)
        if numbers.random() < 0.2
        else [numbers.choice([1, 2, 4, 6, 8, 12, 16, 24, 36, 64])]
        for _ in range(numbers.integers(1, 5))
    ]
    clips = [np.repeat(size, numbers.integers(1, 5)) for size in sizes]
    bounds = [0, *np.cumsum([clip.sum() for clip in clips]).tolist()]
    return bounds, [0, *np.cumsum(np.concatenate(clips)).tolist()]


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("causal", [None, "group", "token"])
def test_without_far_weight_frames_are_segments_of_exact_attention_bit_for_bit(causal, backend):
    numbers = np.random.default_rng(shifted(0))
    for index in range(50):
        clips, frames = clips_of_frames(numbers)
        heads, kv_heads, head_dim, dtype = SHAPES[index % len(SHAPES)]
        if backend == "cpp" and dtype == torch.float64:  # which it refuses
            dtype = torch.float16
        sizes = [heads, kv_heads, kv_heads]
        qkv = make_tensor(frames[-1], sum(sizes), head_dim, seed=index, dtype=dtype).split(sizes, 1)
        bounds = torch.tensor(frames, dtype=torch.int32)
        exact = packed_attention(
            *qkv,
            PackedLayout.from_cu_seqlens(frames),
            causal=causal == "token",
            return_lse=True,
            backend=backend,
        )
        flash, flash_lse, _ = flash_attn_varlen_func(
            *qkv, bounds, bounds, 0, 0, causal=causal == "token", return_attn_probs=True, backend=backend
        )
        assert torch.equal(exact[0], flash) and torch.equal(exact[1], flash_lse.t())
        for far in ({"beta": torch.full((heads,), -torch.inf)}, {"far_weight": torch.eye(heads)[0]}):
            layout = PackedLayout.from_cu_seqlens(clips, frames)
            options = {"window": 0, "causal": causal, "return_lse": True, "backend": backend}
            found = hybrid_attention(*qkv, layout, **options, **far)
            some = slice("far_weight" in far, None)  # the first head sees far tokens, and its results differ
            for a, b in zip(found, exact, strict=True):
                assert torch.equal(a[:, some], b[:, some]), (index, clips, frames, dtype)


@pytest.mark.parametrize("backend", COMPUTING)
def test_a_far_part_of_no_weight_is_not_computed(backend, monkeypatch):
    q, k, v = make_tensor(3, 40, 2, 8).requires_grad_()
    layout, off = (
        PackedLayout.from_lengths([40], group_size=8),
        torch.full((2,), -torch.inf, requires_grad=True),
    )
    planned = "_plan_far" if backend == "cpp" else "group_states"  # C++ may need no states
    monkeypatch.setattr(load("hybrid_attention", backend), planned, None)
    forget_plans()
    for window in (0, 1):
        out = hybrid_attention(q, k, v, layout, window=window, beta=off, backend=backend)
        assert (torch.autograd.grad(out.sum(), off)[0] == 0).all()
    with pytest.raises(TypeError, match="NoneType"):
        hybrid_attention(q, k, v, layout, window=0, beta=torch.tensor([-torch.inf, -1.0]), backend=backend)
