"""Layouts and bin packing: properties over random cases, and a clear refusal of malformed input."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vot_kernels.packing import PackedLayout, plan_packing

lengths_lists = st.lists(st.integers(0, 40), max_size=8)
grids = st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=6)
groupings = st.one_of(st.just("frame"), st.integers(1, 7), st.integers(1, 4).map("rows:{}".format))


def check_invariants(layout):
    """What every op relies on."""
    seqlens, groups, owners = (
        t.tolist() for t in (layout.cu_seqlens, layout.cu_groups, layout.segment_groups)
    )
    for name in ("cu_seqlens", "cu_groups", "segment_groups"):
        device_copy, host_copy = getattr(layout, name), getattr(layout, f"host_{name}")
        assert device_copy.dtype == torch.int32 and torch.equal(device_copy.cpu(), host_copy)
    assert seqlens[0] == groups[0] == owners[0] == 0
    assert seqlens[-1] == groups[-1] == layout.num_tokens == len(layout.positions)
    assert owners[-1] == layout.num_groups
    assert all(a <= b for bounds in (seqlens, groups, owners) for a, b in pairwise(bounds))
    # Groups nest: the groups of a segment span exactly its tokens.
    for segment, (first, last) in enumerate(pairwise(owners)):
        if seqlens[segment] < seqlens[segment + 1]:
            assert (groups[first], groups[last]) == (seqlens[segment], seqlens[segment + 1])
    assert layout.lengths == tuple(b - a for a, b in pairwise(seqlens))
    assert layout.group_lengths == tuple(b - a for a, b in pairwise(groups))
    assert layout.max_seqlen == max(layout.lengths, default=0)
    for owner, bounds in ((layout.token_segments, seqlens), (layout.token_groups, groups)):
        expected = [i for i, (a, b) in enumerate(pairwise(bounds)) for _ in range(b - a)]
        assert owner.dtype == torch.int64 and owner.tolist() == expected


@given(lengths_lists, st.none() | st.integers(1, 9))
def test_from_lengths(lengths, group_size):
    layout = PackedLayout.from_lengths(lengths, group_size)
    check_invariants(layout)
    assert layout.lengths == tuple(lengths)
    assert layout.sizes.tolist() == [[n, 1, 1] for n in lengths]
    assert layout.positions.tolist() == [[i, 0, 0] for n in lengths for i in range(n)]
    step = group_size or max(lengths, default=0) or 1
    assert layout.group_lengths == tuple(min(step, n - i) for n in lengths for i in range(0, n, step))


@given(grids, groupings)
def test_from_grid_thw(grid, group):
    layout = PackedLayout.from_grid_thw(grid, group)
    check_invariants(layout)
    assert layout.lengths == tuple(t * h * w for t, h, w in grid)
    assert [tuple(size) for size in layout.sizes.tolist()] == list(grid)
    expected = [[f, y, x] for t, h, w in grid for f in range(t) for y in range(h) for x in range(w)]
    assert layout.positions.tolist() == expected
    nonempty = tuple(n for n in layout.group_lengths if n)
    assert nonempty == tuple(expected_groups(grid, group))


def expected_groups(grid, group):
    for t, h, w in grid:
        if isinstance(group, int):
            yield from (min(group, t * h * w - i) for i in range(0, t * h * w, group))
        elif t * h * w:
            rows = h if group == "frame" else int(group.removeprefix("rows:"))
            yield from (min(rows, h - y) * w for _ in range(t) for y in range(0, h, rows))


@given(lengths_lists, st.none() | st.integers(1, 9))
def test_round_trip_through_cu_seqlens(lengths, group_size):
    layout = PackedLayout.from_lengths(lengths, group_size)
    for again in (
        PackedLayout.from_cu_seqlens(layout.cu_seqlens, group_size=group_size),
        PackedLayout.from_cu_seqlens(layout.cu_seqlens.long(), layout.cu_groups),
        PackedLayout.from_cu_seqlens(layout.cu_seqlens.tolist(), layout.cu_groups.tolist()),
        layout.to("cpu"),
    ):
        check_invariants(again)
        for name in ("cu_seqlens", "cu_groups", "segment_groups", "positions", "sizes"):
            assert torch.equal(getattr(again, name), getattr(layout, name))


@given(st.lists(st.integers(0, 9), max_size=12), st.data())
def test_any_nested_groups_are_accepted(group_lengths, data):
    """Empty groups included; a segment ends at any group boundary."""
    groups = np.concatenate([[0], np.cumsum(group_lengths)]).astype(int).tolist()
    inner = data.draw(st.lists(st.sampled_from(groups), max_size=5))
    seqlens = sorted([0, groups[-1], *inner])
    layout = PackedLayout.from_cu_seqlens(seqlens, groups)
    check_invariants(layout)
    assert layout.group_lengths == tuple(group_lengths)


def test_a_frame_of_a_clip_is_a_group():
    layout = PackedLayout.from_grid_thw(torch.tensor([[2, 3, 4], [1, 5, 2]]), "rows:2")
    assert layout.cu_groups.tolist() == [0, 8, 12, 20, 24, 28, 32, 34]
    assert layout.segment_groups.tolist() == [0, 4, 7]
    assert layout.positions[[0, 13, 23, 24]].tolist() == [[0, 0, 0], [1, 0, 1], [1, 2, 3], [0, 0, 0]]
    assert repr(layout).startswith("PackedLayout(2 segments, 7 groups, 34 tokens, longest 24")


# Padding.

masks = st.integers(0, 7).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=5)
)


def test_a_mask_by_hand():
    """Padding on the left, on the right and in between, a row of padding alone."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    layout, padding = PackedLayout.from_mask(mask, group_size=2)
    check_invariants(layout)
    assert layout.lengths == (2, 3, 3, 0) and layout.group_lengths == (2, 2, 1, 2, 1) and layout.grouped
    assert padding.rows.tolist() == [2, 3, 4, 5, 6, 8, 10, 11] and padding.shape == (4, 4)
    assert layout.positions[:, 0].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    x = torch.arange(16.0).view(4, 4)
    assert padding.pack(x).tolist() == [2, 3, 4, 5, 6, 8, 10, 11]
    unpacked = padding.unpack(padding.pack(x[..., None])).squeeze(-1)
    assert unpacked.tolist() == [[0, 0, 2, 3], [4, 5, 6, 0], [8, 0, 10, 11], [0, 0, 0, 0]]
    assert not PackedLayout.from_mask(mask)[0].grouped


@given(masks, st.none() | st.integers(1, 3), st.sampled_from([torch.bool, torch.uint8, torch.int64]))
def test_packing_and_unpacking_a_padded_batch(rows, group_size, dtype):
    mask = torch.tensor(rows, dtype=torch.bool).view(len(rows), -1)
    layout, padding = PackedLayout.from_mask(mask.to(dtype), group_size)
    check_invariants(layout)
    assert layout.lengths == tuple(mask.sum(1).tolist())
    expected = PackedLayout.from_lengths(layout.lengths, group_size)
    assert torch.equal(layout.cu_groups, expected.cu_groups) and layout.grouped == expected.grouped
    x = torch.randn(*mask.shape, 2, 3, dtype=torch.float64, requires_grad=True)
    packed = padding.pack(x)
    assert torch.equal(packed, x[mask])
    slack = torch.cat([packed, packed.new_full((2, 2, 3), torch.nan)])
    for given_rows in (packed, slack):
        assert torch.equal(padding.unpack(given_rows), torch.where(mask[..., None, None], x, 0))
    (gradient,) = torch.autograd.grad(padding.unpack(packed).square().sum(), x)
    assert torch.equal(gradient, torch.where(mask[..., None, None], 2 * x, 0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: PackedLayout.from_mask([[1, 1]]), TypeError, "bool or integer tensor.*got .*1, 1"),
        (lambda p: PackedLayout.from_mask(torch.ones(2, 3)), TypeError, "bool or integer .* torch.float32"),
        (lambda p: PackedLayout.from_mask(torch.ones(1, 1, 4, 4).bool()), ValueError, r"got \[1, 1, 4, 4\]"),
        (lambda p: PackedLayout.from_mask(torch.tensor([[1, 2]])), ValueError, "1 for tokens and 0.*got 2"),
        (lambda p: PackedLayout.from_mask(torch.tensor([[-1, 0]])), ValueError, "got -1"),
        (lambda p: PackedLayout.from_mask(torch.ones(1, 2).bool(), 0), ValueError, "group_size must be"),
        (lambda p: p.pack(torch.zeros(2, 4)), ValueError, r"\[2, 3, \.\.\.\] of the mask, got \[2, 4\]"),
        (lambda p: p.pack([1]), ValueError, "got list"),
        (lambda p: p.unpack(torch.zeros(3, 5)), ValueError, r"each of the 4 tokens .* got \[3, 5\]"),
    ],
)
def test_what_is_no_padding_is_refused_in_one_sentence(call, error, message):
    _, padding = PackedLayout.from_mask(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    with pytest.raises(error, match=message) as caught:
        call(padding)
    assert "\n" not in str(caught.value)


# Prefix tokens.


def test_prefix_tokens_by_hand():
    """A clip of two frames of 2 x 2 patches and an image of 1 x 3, CLS in front of each, a register for each frame."""
    grid = [[2, 2, 2], [1, 1, 3]]
    layout = PackedLayout.from_grid_thw(grid, segment_prefix=1, frame_prefix=1)
    check_invariants(layout)
    assert layout.lengths == (11, 5) and layout.group_lengths == (6, 5, 5)
    assert layout.prefix_rows.tolist() == [0, 1, 6, 11, 12]
    assert layout.patch_rows.tolist() == [2, 3, 4, 5, 7, 8, 9, 10, 13, 14, 15]
    frames = [[[t, 0, 0], *([t, y, x] for y in (0, 1) for x in (0, 1))] for t in (0, 1)]
    image = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert layout.positions.tolist() == [[0, 0, 0], *frames[0], *frames[1], *image]
    assert layout.sizes.tolist() == grid
    bands = PackedLayout.from_grid_thw(grid, "rows:1", segment_prefix=1, frame_prefix=1)
    assert bands.group_lengths == (4, 2, 3, 2, 5)
    assert PackedLayout.from_grid_thw(grid, 4, segment_prefix=1).group_lengths == (4, 4, 1, 4)
    assert PackedLayout.from_grid_thw(grid).patch_rows is None


@given(grids, groupings, st.integers(0, 3), st.integers(0, 2))
def test_patches_keep_their_places_behind_prefix_tokens(grid, group, segment_prefix, frame_prefix):
    plain = PackedLayout.from_grid_thw(grid, group)
    layout = PackedLayout.from_grid_thw(
        grid, group, segment_prefix=segment_prefix, frame_prefix=frame_prefix
    ).to("cpu")
    check_invariants(layout)
    if not segment_prefix and not frame_prefix:
        assert layout.patch_rows is None and torch.equal(layout.cu_groups, plain.cu_groups)
        return
    everything = torch.cat([layout.patch_rows, layout.prefix_rows]).sort().values
    assert everything.tolist() == list(range(layout.num_tokens))
    assert torch.equal(layout.positions[layout.patch_rows], plain.positions)
    assert torch.equal(layout.token_segments[layout.patch_rows], plain.token_segments)
    lengths = [t * h * w and segment_prefix + t * (frame_prefix + h * w) for t, h, w in grid]
    assert layout.lengths == tuple(lengths)
    assert (layout.positions[layout.prefix_rows, 1:] == 0).all()
    if not isinstance(group, int):  # a prefix token belongs to the group of the patch that follows
        assert torch.equal(layout.token_groups[layout.patch_rows], plain.token_groups)
        following = layout.patch_rows[torch.searchsorted(layout.patch_rows, layout.prefix_rows)]
        assert torch.equal(layout.token_groups[layout.prefix_rows], layout.token_groups[following])
        assert torch.equal(layout.positions[layout.prefix_rows, 0], layout.positions[following, 0])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PackedLayout.from_cu_seqlens([1, 5]), ValueError, "cu_seqlens must start at 0, got 1"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5, 3]), ValueError, "entry 1 is 5 and 2 is 3"),
        (lambda: PackedLayout.from_cu_seqlens([]), ValueError, "at least one entry"),
        (lambda: PackedLayout.from_cu_seqlens([[0, 5]]), ValueError, "one-dimensional"),
        (lambda: PackedLayout.from_cu_seqlens(torch.tensor([0.0, 5])), TypeError, "int32 or int64"),
        (lambda: PackedLayout.from_cu_seqlens(torch.tensor([0, 5]).short()), TypeError, "int32 or int64"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5], num_tokens=4), ValueError, "beyond the 4 tokens"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5], [0, 5], group_size=2), ValueError, "not both"),
        (lambda: PackedLayout.from_cu_seqlens([0, 3, 5], [0, 2, 5]), ValueError, r"missing \[3\]"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5], [0, 5, 6]), ValueError, "ends at 6 instead of 5"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5], [0, 5, 4]), ValueError, "cu_groups must not decrease"),
        (lambda: PackedLayout.from_lengths([3, -1]), ValueError, "must not be negative, got -1"),
        (lambda: PackedLayout.from_lengths([[3]]), ValueError, "one-dimensional"),
        (lambda: PackedLayout.from_lengths([1.5]), TypeError, "int32 or int64"),
        (lambda: PackedLayout.from_lengths([2**31]), ValueError, "at most 2147483647 tokens"),
        (lambda: PackedLayout.from_lengths([2**62] * 4), ValueError, f"tokens, got {2**64}"),
        (lambda: PackedLayout.from_lengths([2**62] * 4, group_size=8), ValueError, f"tokens, got {2**64}"),
        (
            lambda: PackedLayout.from_lengths([-5, 10], group_size=4),
            ValueError,
            "must not be negative, got -5",
        ),
        (lambda: PackedLayout.from_lengths([[1], [2, 3]]), TypeError, "lengths must be"),
        (lambda: PackedLayout.from_lengths([2**70]), TypeError, "lengths must"),
        (lambda: PackedLayout.from_lengths(["a"]), TypeError, "lengths must"),
        (
            lambda: PackedLayout.from_cu_seqlens([0, 2**62, 2**63 - 1]),
            ValueError,
            "at most 2147483647 tokens",
        ),
        (lambda: PackedLayout.from_grid_thw([[2**40, 5, 0]]), ValueError, f"up to 2147483647, got {2**40}"),
        (lambda: PackedLayout.from_grid_thw([[2**21] * 3]), ValueError, f"grid_thw asks for {2**63}"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], None), ValueError, "group must be .*got None"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], 4.0), ValueError, "group must be .*got 4.0"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], True), ValueError, "group must be .*got True"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], 0), ValueError, "group must be .*got 0"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "rows:0"), ValueError, "group must be"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "rows:²"), ValueError, "group must be"),
        (lambda: plan_packing([1], 2.0), ValueError, "budget must be an int >= 0, got 2.0"),
        (lambda: plan_packing([0], -1), ValueError, "budget must be an int >= 0, got -1"),
        (lambda: PackedLayout.from_lengths([3], 0), ValueError, "group_size must be a positive int"),
        (lambda: PackedLayout.from_lengths([3], True), ValueError, "group_size must be a positive int"),
        (lambda: PackedLayout.from_lengths([3], 2.0), ValueError, "group_size must be a positive int"),
        (
            lambda: PackedLayout.from_grid_thw([[1, 2, 3]], segment_prefix=-1),
            ValueError,
            "segment_prefix must be",
        ),
        (
            lambda: PackedLayout.from_grid_thw([[1, 2, 3]], frame_prefix=True),
            ValueError,
            "frame_prefix.*got True",
        ),
        (
            lambda: PackedLayout.from_grid_thw([[2**20, 2**5, 2**5]], frame_prefix=2**20),
            ValueError,
            f"asks for {2**30 + 2**40}",
        ),
        (lambda: PackedLayout.from_grid_thw([[1, 2]]), ValueError, r"\[segments, 3\], got \(1, 2\)"),
        (lambda: PackedLayout.from_grid_thw([1, 2, 3]), ValueError, r"\[segments, 3\]"),
        (lambda: PackedLayout.from_grid_thw([[1, -2, 3]]), ValueError, "negative"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "row:2"), ValueError, 'group must be "frame"'),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "rows:0"), ValueError, "with N >= 1"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "rows:-1"), ValueError, "with N >= 1"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], "rows:"), ValueError, "with N >= 1"),
        (lambda: PackedLayout.from_grid_thw([[1, 2, 3]], 0), ValueError, "positive int"),
        (lambda: plan_packing([5, 3], 4), ValueError, "Item 0 has 5 tokens; the budget is 4"),
        (lambda: plan_packing([5, -3], 8), ValueError, ">= 0"),
        (lambda: plan_packing([[5]], 8), ValueError, "flat list"),
        (lambda: plan_packing([0.5], 8), TypeError, "int32 or int64"),
    ],
)
def test_malformed_input_is_refused_in_one_sentence(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(30, 90))
def test_plan_packing(lengths, budget):
    plan = plan_packing(lengths, budget)
    assert sorted(item for row in plan.rows for item in row) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in row) for row in plan.rows]
    assert all(0 <= tokens <= budget for tokens in used) and all(plan.rows)
    assert plan.budget == budget
    assert plan.fill == pytest.approx(sum(lengths) / (budget * len(plan.rows)) if plan.rows else 0.0)
    assert plan == plan_packing(torch.tensor(lengths, dtype=torch.int64), budget)


def fewest_rows(lengths, budget):
    """By exhaustion: every item into every open row or a new one."""
    best = len(lengths)

    def place(index, free):
        nonlocal best
        if len(free) >= best:
            return
        if index == len(lengths):
            best = len(free)
            return
        for row in {room: i for i, room in enumerate(free) if room >= lengths[index]}.values():
            place(index + 1, [room - lengths[index] * (i == row) for i, room in enumerate(free)])
        place(index + 1, [*free, budget - lengths[index]])

    place(0, [])
    return best


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_plan_packing_is_close_to_the_best(lengths):
    rows, best = len(plan_packing(lengths, 12).rows), fewest_rows(lengths, 12)
    assert best <= rows <= 11 / 9 * best + 1


def test_first_fit_decreasing_keeps_the_order_of_equals():
    assert plan_packing([3, 7, 3, 5, 2], 10).rows == ((1, 0), (3, 2, 4))
    assert plan_packing([], 10).rows == () and plan_packing([], 10).fill == 0.0
    assert plan_packing([0, 0], 0).rows == ((0, 1),)


@pytest.mark.parametrize("grid", [[[-1, -1, 0]], [[1, -2, -3]], [[2**22] * 3]])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ValueError, match="negative|at most"):
        PackedLayout.from_grid_thw(grid)


def test_huge_groups_are_whole_segments():
    whole = PackedLayout.from_lengths([5, 0, 3]).group_lengths
    assert PackedLayout.from_lengths([5, 0, 3], group_size=2**70).group_lengths == whole
    bands = PackedLayout.from_grid_thw([[2, 3, 4]], "rows:" + 25 * "9").group_lengths
    assert bands == PackedLayout.from_grid_thw([[2, 3, 4]], "frame").group_lengths
    assert PackedLayout.from_grid_thw([[2, 3, 4]], 2**70).group_lengths == (24,)


def test_empty_frames_make_no_groups():
    layout = PackedLayout.from_grid_thw([[2**31 - 1, 5, 0], [1, 2, 2], [3, 0, 4]])
    assert layout.group_lengths == (4,) and layout.lengths == (0, 4, 0)


def test_plan_packing_of_numbers_whose_sum_overflows():
    plan = plan_packing([2**62] * 3, 2**63)
    assert plan.rows == ((0,), (1,), (2,)) or plan.rows == ((0, 1), (2,))
    assert plan.fill == pytest.approx(3 * 2**62 / (len(plan.rows) * 2**63))


@pytest.mark.parametrize("other", [torch.float16, torch.zeros(1), None, True])
def test_a_layout_moves_to_devices_alone(other):
    """Bounds in another dtype would lie elsewhere."""
    with pytest.raises(TypeError, match="device must be a torch.device or the name of one, got "):
        PackedLayout.from_lengths([3000, 1]).to(other)


def test_numbers_must_have_values():
    lengths = torch.tensor([1, 2], device="meta")
    with pytest.raises(
        ValueError, match="lengths must have values, got a tensor of shape .* on the device meta"
    ):
        PackedLayout.from_lengths(lengths)


def test_a_grid_without_columns_is_none():
    with pytest.raises(ValueError, match=r"shape \[segments, 3\], got \(2, 0\)"):
        PackedLayout.from_grid_thw(torch.zeros(2, 0, dtype=torch.long))


@pytest.mark.parametrize(
    "name", ["token_segments", "token_groups", "cu_seqlens", "positions", "host_cu_groups"]
)
def test_nothing_in_a_layout_is_an_inference_tensor(name):
    with torch.inference_mode():
        made = PackedLayout.from_lengths([3, 4], group_size=2)
        moved = made.to("cpu")
        tensors = [getattr(layout, name) for layout in (made, moved)]
    assert not any(tensor.is_inference() for tensor in tensors)
