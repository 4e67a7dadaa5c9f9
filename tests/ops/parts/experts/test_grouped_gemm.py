"""The Triton kernels over rows grouped by expert: on the interpreter against plain PyTorch, and what they launch.

On the interpreter blocks have 16 or 32 rows, columns and depth, see the configs.
"""

from itertools import product

import pytest
import torch

from tests.marks import compiled, interpreted
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.parts.experts.grouped_gemm import combine, grouped_matmul, weight_gradient
from vot_kernels.ops.parts.experts.slots import Slots
from vot_kernels.testing import (
    check_against_reference,
    make_tensor,
    uninitialized_is_nan,
)
from vot_kernels.tuning import lookup

pytest.importorskip("triton")


# Expert ids of each token's slots, by number of experts.
CHOICES = {
    "no_tokens": (3, torch.empty(0, 2, dtype=torch.int64)),
    "one_token": (2, torch.tensor([[1]])),
    "one_expert": (1, torch.zeros(37, 1, dtype=torch.int64)),
    "all_to_the_middle_one": (3, torch.ones(35, 1, dtype=torch.int64)),
    "some_without": (6, torch.tensor([1, 4])[torch.arange(48) % 2].view(24, 2)),
    "uneven": (4, torch.tensor([0] * 33 + [1] * 16 + [3] * 17).roll(5).view(22, 3)),
    "twice_the_same": (2, torch.tensor([[1, 1], [0, 1], [1, 1]])),
    "not_all_exist": (3, torch.tensor([[0, 3], [-1, 2], [2, 0], [7, 7], [1, 2]] * 5)),
    "none_exists": (2, torch.full((4, 2), 2)),
}


def make_slots(experts, indices):
    """Return `Slots` of given expert ids; undefined entries are such that an access would fail."""
    flat = indices.flatten()
    exists = (flat >= 0) & (flat < experts)
    order = torch.where(exists, flat, experts).argsort(stable=True)
    count = int(exists.sum())
    places = torch.full_like(flat, -1, dtype=torch.int32)
    places[order[:count]] = torch.arange(count, dtype=torch.int32)
    order[count:] = 2**31 - 1
    offsets = torch.cat([torch.zeros(1), torch.bincount(flat[exists], minlength=experts).cumsum(0)])
    return Slots(order.int(), places, offsets.int(), indices.shape[1])


def experts_of(slots):
    """Expert and places, of those that have any."""
    offsets = slots.offsets.tolist()
    return [(e, slice(*offsets[e : e + 2])) for e in range(len(offsets) - 1) if offsets[e] < offsets[e + 1]]


def rows_at(x, places, slots, gather):
    return x[slots.order[places].long() // slots.top_k] if gather else x[places]


def plain_matmul(a, w, slots, gather=False, second=None, addend=None):
    """The rows that belong to experts."""
    found = []
    for expert, places in experts_of(slots):
        out = rows_at(a, places, slots, gather) @ w[expert]
        if second is not None:
            out = out + second[0][places] @ second[1][expert]
        if addend is not None:
            out = out + addend[0][places, None].to(out.dtype) * addend[1][places]
        found.append(out)
    return torch.cat([a.new_empty(0, w.shape[2]), *found])


def plain_weight_gradient(a, b, slots, gather_a=False, gather_b=False):
    out = a.new_zeros(slots.offsets.shape[0] - 1, a.shape[1], b.shape[1])
    for expert, places in experts_of(slots):
        left, right = rows_at(a, places, slots, gather_a), rows_at(b, places, slots, gather_b)
        out[expert] = left.T @ right
    return out


def plain_combine(rows, slots, tokens, weights):
    places = slots.places.view(tokens, slots.top_k).long()
    terms = torch.where((places >= 0)[..., None], rows[places.clamp(min=0)], 0)
    return (terms if weights is None else terms * weights[..., None].to(rows.dtype)).sum(1)


def check_matmul(slots, a, w, gather=False, second=None, addend=None):
    scale, rows = addend or (None, None)
    end = int(slots.offsets[-1])

    def of(matmul, count):
        def run(a, w, a2, w2, rows):
            pairs = [None if x is None else pair for x, pair in ((a2, (a2, w2)), (rows, (scale, rows)))]
            out = matmul(a, w, slots, gather=gather, second=pairs[0], addend=pairs[1])
            assert out.dtype == a.dtype and out.shape == (count, w.shape[2])
            return [out[:end]]

        return run

    runs = of(grouped_matmul, slots.order.shape[0]), of(plain_matmul, end)
    with uninitialized_is_nan():
        check_against_reference(*runs, [a, w, *(second or (None, None)), rows], gradients=False)


def check_weight_gradient(slots, a, b, **gather):
    with uninitialized_is_nan():
        check_against_reference(
            lambda a, b: [weight_gradient(a, b, slots, **gather)],
            lambda a, b: [plain_weight_gradient(a, b, slots, **gather)],
            [a, b],
            gradients=False,
        )


def check_combine(slots, rows, weights):
    tokens = slots.places.shape[0] // slots.top_k
    with uninitialized_is_nan():
        check_against_reference(
            lambda rows: [combine(rows, slots, tokens, weights)],
            lambda rows: [plain_combine(rows, slots, tokens, weights)],
            [rows],
            gradients=False,
        )


def matrices(experts, rows, columns, dtype=torch.float32, seed=7):
    return make_tensor(experts, rows, columns, dtype=dtype, seed=seed)


def uneven():
    return make_slots(*CHOICES["uneven"])


@interpreted
@pytest.mark.parametrize(("experts", "indices"), CHOICES.values(), ids=CHOICES.keys())
def test_choices(experts, indices):
    """Experts without slots, ids that do not exist, an expert named twice; the rows are those of tokens and slots."""
    slots, tokens = make_slots(experts, indices), indices.shape[0]
    places = slots.order.shape[0]
    x, rows = make_tensor(tokens, 24), make_tensor(places, 40, seed=1)
    rows[int(slots.offsets[-1]) :] = torch.nan  # never read
    scale = make_tensor(places, seed=2)
    check_matmul(slots, x, matrices(experts, 24, 40), gather=True, addend=(scale, rows))
    check_matmul(slots, rows, matrices(experts, 40, 24))
    check_weight_gradient(slots, rows, x, gather_b=True)
    if tokens:
        check_combine(slots, rows, make_tensor(*indices.shape, seed=3))


@interpreted
@pytest.mark.parametrize(("gather", "second", "addend"), [*product([False, True], repeat=3)])
def test_parts_of_the_matmul(gather, second, addend):
    slots = uneven()
    a = make_tensor(22 if gather else 66, 40)
    pairs = (make_tensor(66, 24, seed=1), matrices(4, 24, 48)), (make_tensor(66), make_tensor(66, 48, seed=2))
    given = [pair if wanted else None for pair, wanted in zip(pairs, (second, addend), strict=True)]
    check_matmul(slots, a, matrices(4, 40, 48), gather, *given)


@interpreted
@pytest.mark.parametrize(("gather_a", "gather_b"), [*product([False, True], repeat=2)])
def test_gathered_factors_of_the_weight_gradient(gather_a, gather_b):
    a, b = make_tensor(22 if gather_a else 66, 40), make_tensor(22 if gather_b else 66, 24, seed=1)
    check_weight_gradient(uneven(), a, b, gather_a=gather_a, gather_b=gather_b)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 70), (16, 32), (70, 100), (100, 7)])
def test_sizes(depth, columns, dtype):
    """Less than a block, whole blocks, and a rest; the second product has another depth than the first."""
    slots = uneven()
    a, b = make_tensor(66, depth, dtype=dtype), make_tensor(66, columns, dtype=dtype, seed=1)
    w, w2 = matrices(4, depth, columns, dtype), matrices(4, columns, columns, dtype, seed=8)
    check_matmul(slots, a, w, second=(b, w2), addend=(make_tensor(66, seed=2), b))
    check_weight_gradient(slots, a, b)
    check_combine(slots, b, make_tensor(22, 3, seed=2))


@interpreted
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_combine(top_k, weighted):
    """Fewer slots than are added up at a time, as many, and more."""
    indices = (torch.arange(9 * top_k) * 5 % 8).view(9, top_k)  # id 7 does not exist
    weights = make_tensor(9, top_k, seed=1).T.contiguous().T if weighted else None
    check_combine(make_slots(7, indices), make_tensor(9 * top_k, 72), weights)


def strided(x):
    """The same numbers in memory of other strides, and the columns or rows of matrices apart."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    half = wide[..., x.shape[-1] :].copy_(x)
    every_second = wide.clone()[..., ::2].copy_(x)
    transposed = x.mT.contiguous().mT
    return [half, every_second, transposed]


@interpreted
def test_strides():
    slots = uneven()
    x, rows, c = make_tensor(22, 40), make_tensor(66, 48, seed=1), make_tensor(66, 24, seed=2)
    scale, weights = make_tensor(66), make_tensor(22, 3)

    def results(x, rows, c, w, w2):
        return [
            grouped_matmul(x, w, slots, gather=True, second=(c, w2), addend=(scale, rows)),
            weight_gradient(rows, x, slots, gather_b=True),
            combine(rows, slots, 22, weights),
        ]

    inputs = [x, rows, c, matrices(4, 40, 48), matrices(4, 24, 48)]
    expected = results(*inputs)
    for views in zip(*map(strided, inputs), strict=True):
        assert not any(x.is_contiguous() for x in views)
        assert all(torch.equal(a, b) for a, b in zip(results(*views), expected, strict=True))
    swapped = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in inputs[3:]]
    assert all(torch.equal(a, b) for a, b in zip(results(*inputs[:3], *swapped), expected, strict=True))


def far_apart(x):
    """The same numbers, with 2**30 from one row or matrix to the next; untouched memory costs nothing."""
    return torch.empty_strided(x.shape, (2**30, *x.stride()[1:]), dtype=x.dtype).copy_(x)


@interpreted
def test_offsets_of_more_than_31_bits():
    slots = make_slots(3, torch.tensor([[2], [0], [1]]))
    inputs = [make_tensor(3, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    weights = [matrices(3, 16, 16, torch.float16, seed) for seed in range(2)]

    def results(x, rows, c, w, w2):
        return [
            grouped_matmul(x, w, slots, gather=True, second=(c, w2), addend=(torch.ones(3), rows)),
            weight_gradient(rows, x, slots, gather_b=True),
            combine(rows, slots, 3, None),
        ]

    expected = results(*inputs, *weights)
    found = results(*map(far_apart, inputs + weights))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpreted
@pytest.mark.parametrize("place", [3, 32, 33, 65])
def test_nan_stays_in_its_row_and_its_expert(place):
    """The last row of an expert, the first of the next one; all other numbers are those of clean rows."""
    slots = uneven()
    rows, c, w = make_tensor(66, 40), make_tensor(66, 24, seed=1), matrices(4, 40, 24)
    expert = next(e for e, places in experts_of(slots) if places.start <= place < places.stop)
    token = int(slots.order[place]) // 3
    scale = make_tensor(66)
    poisoned = rows.clone()
    poisoned[place] = torch.nan
    for run, hit in [
        (lambda rows: grouped_matmul(rows, w, slots), place),
        (lambda rows: grouped_matmul(c, matrices(4, 24, 40), slots, addend=(scale, rows)), place),
        (lambda rows: grouped_matmul(c, matrices(4, 24, 24), slots, second=(rows, w)), place),
        (lambda rows: weight_gradient(rows, c, slots), expert),
        (lambda rows: weight_gradient(c, rows, slots), expert),
        (lambda rows: combine(rows, slots, 22, None), token),
    ]:
        clean, found = run(rows), run(poisoned)
        others = [i for i in range(len(clean)) if i != hit]
        assert torch.equal(found[others], clean[others]) and found[hit].isnan().any()
        assert clean.isfinite().all()


@interpreted
def test_nan_of_an_unused_expert_and_of_skipped_slots():
    slots = make_slots(3, torch.tensor([[0, 9], [2, 0], [9, 2]]))
    rows, w, weights = make_tensor(6, 40), matrices(3, 40, 24), torch.ones(3, 2)
    w[1], rows[4:] = torch.nan, torch.nan
    weights[0, 1] = weights[2, 0] = torch.nan
    assert grouped_matmul(rows, w, slots)[:4].isfinite().all()
    assert weight_gradient(rows, rows, slots).isfinite().all()
    assert combine(rows, slots, 3, weights).isfinite().all()


@interpreted
def test_same_bits_again_and_alone():
    """The result of an expert's rows depends neither on the other experts nor on where the rows are."""
    slots = uneven()
    rows, b, w = make_tensor(66, 40), make_tensor(66, 24, seed=1), matrices(4, 40, 24)
    outs, grads = (
        [f() for _ in range(2)]
        for f in (lambda: grouped_matmul(rows, w, slots), lambda: weight_gradient(rows, b, slots))
    )
    assert torch.equal(*outs) and torch.equal(*grads)
    for expert, places in experts_of(slots):
        count = places.stop - places.start
        alone = make_slots(1, torch.zeros(count, 1, dtype=torch.int64))
        assert torch.equal(grouped_matmul(rows[places], w[expert, None], alone), outs[0][places])
        assert torch.equal(weight_gradient(rows[places], b[places], alone)[0], grads[0][expert])


@interpreted
def test_sums_of_float16_are_kept_in_float32():
    """Partial sums go past 65504, the result does not."""
    slots = make_slots(1, torch.zeros(96, 1, dtype=torch.int64))
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(48)
    a = (200 * sign).expand(96, 96).half()
    b = torch.full((1, 96, 16), 200.0).half()
    assert (grouped_matmul(a, b, slots) == 0).all()
    assert (weight_gradient(a.T, b[0], slots) == 0).all()
    weights = torch.tensor([4.0, -4.0, 1.0]).expand(32, 3).contiguous()
    three = make_slots(1, torch.zeros(32, 3, dtype=torch.int64))
    assert (combine(torch.full((96, 16), 40000.0).half(), three, 32, weights) == 40000).all()


def recorded(arch="sm_90", dtype=torch.bfloat16, tokens=100, sizes=(96, 40, 200), experts=8, top_k=2):
    dim, rank, hidden = sizes
    slots = make_slots(experts, torch.arange(tokens * top_k).view(tokens, top_k) % experts)
    x, c = torch.empty(tokens, dim, dtype=dtype), torch.empty(tokens * top_k, rank, dtype=dtype)
    h, w = torch.empty(tokens * top_k, hidden, dtype=dtype), torch.empty(experts, hidden, dim, dtype=dtype)
    down = torch.empty(experts, rank, dim, dtype=dtype)
    scale = torch.empty(tokens * top_k)
    with record_launches(arch) as launches:
        grouped_matmul(x, down.mT, slots, gather=True)
        y = grouped_matmul(h, w, slots, second=(c, down), addend=(scale, torch.empty(tokens * top_k, dim)))
        weight_gradient(h, x, slots, gather_b=True)
        combine(y, slots, tokens, torch.empty(tokens, top_k))
    return launches


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_recorded_launches(dtype, arch):
    """Each launch names every argument of its kernel; the grid has a program for each tile."""
    launches = recorded(arch, dtype)
    names = [x.kernel.__name__.removeprefix("_").removesuffix("_kernel") for x in launches]
    assert names == ["grouped_matmul", "grouped_matmul", "weight_gradient", "combine"]
    for found in launches:
        assert set(found.arguments) == set(found.kernel.arg_names)
        assert len(found.grid) == 1 and found.grid[0] > 0
        assert found.config.blocks.items() <= found.arguments.items()
    assert [x.arguments["STRIDE_UNIT"] for x in launches] == [8] * 4
    assert [x.arguments["W_TRANSPOSED"] for x in launches[:2]] == [True, False]


@compiled
def test_grid_covers_every_tile():
    first, *_ = recorded(tokens=1000)
    blocks = first.config.blocks
    tiles = 2000 // blocks["BLOCK_M"] + 8
    assert tiles >= 8 * -(-250 // blocks["BLOCK_M"])
    assert first.grid == (tiles * -(-40 // blocks["BLOCK_N"]),)


@compiled
def test_batches_of_any_size_share_their_kernels():
    for a, b in zip(recorded(tokens=100), recorded(tokens=77), strict=True):
        for name, value in a.arguments.items():
            free = any(p.name == name and p.do_not_specialize for p in a.kernel.params)
            if not free and not isinstance(value, torch.Tensor):
                assert b.arguments[name] == value, name


@compiled
def test_strides_that_are_no_multiple_of_8():
    launches = recorded(sizes=(96, 7, 200))
    assert [x.arguments["STRIDE_UNIT"] for x in launches] == [8, 1, 8, 8]
    assert [dict(x.config.request.key)["vector"] for x in launches[:3]] == [1, 1, 8]
    launches = recorded(sizes=(100, 20, 100))
    assert [x.arguments["STRIDE_UNIT"] for x in launches] == [4] * 4
    assert [dict(x.config.request.key)["vector"] for x in launches[:3]] == [4] * 3


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "interpreter"])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_size_has_a_config(bits, arch):
    for columns, vector in product([1, 16, 40, 64, 100, 128, 257, 400, 768, 6472], [1, 4, 8]):
        key = {"bits": bits, "vector": vector, "columns": columns}
        lookup("experts", "matmul", arch, **key)
        for outputs, gather in product([16 * columns, 2**26 * columns], [0, 1]):
            lookup("experts", "weight_gradient", arch, **key, outputs=outputs, gather=gather)
        lookup("experts", "combine", arch)
