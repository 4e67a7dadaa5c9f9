"""The Triton kernels that choose experts: on the interpreter against plain PyTorch, and what they launch.

On the interpreter a tile of caches has 16 tokens and 128 columns, programs of the other kernels hold
16 to 64 numbers, and slots are ranked in tiles of 16, see the configs.
"""

import pytest
import torch

from tests.marks import compiled, interpreted
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.parts.experts.routing import (
    cache_norms,
    group_slots,
    mixing_backward,
    select_experts,
    sum_partials,
)
from vot_kernels.testing import (
    ToleranceError,
    assert_close_to_exact,
    make_tensor,
    uninitialized_is_nan,
)
from vot_kernels.tuning import INTERPRETER, known_archs, lookup

pytest.importorskip("triton")

WEIGHTINGS = pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
NAN = float("nan")


# Norms of the caches.


def exact_caches(x, w_down):
    return torch.einsum("td,nrd->tnr", x.double(), w_down.double())


def check_squares(squares, caches):
    """Within 1e-5 of the squares of the exact caches, each by itself: float32 sums, in any order."""
    exact = caches.square().sum(-1)
    assert squares.dtype == torch.float32 and squares.shape == exact.shape
    assert torch.allclose(squares.double(), exact, rtol=1e-5, atol=0)


# tokens, experts, rank, dim
CACHES = {
    "tokens_and_columns_over_tiles": (37, 5, 64, 32),
    "small_experts_side_by_side": (17, 20, 16, 40),
    "an_expert_over_tiles": (16, 2, 256, 32),
    "padded_rank": (9, 2, 100, 33),
    "rank_and_dim_of_7": (18, 5, 7, 7),
    "odd": (5, 3, 40, 70),
    "one_expert": (3, 1, 1, 100),
    "one_token": (1, 9, 24, 16),
}


@interpreted
@pytest.mark.parametrize("keep", [False, True], ids=["norms", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", CACHES.values(), ids=CACHES.keys())
def test_norms(sizes, dtype, keep):
    tokens, experts, rank, dim = sizes
    x, w_down = make_tensor(tokens, dim, dtype=dtype), make_tensor(experts, rank, dim, dtype=dtype, seed=1)
    with uninitialized_is_nan():
        squares, caches = cache_norms(x, w_down, keep)
    exact = exact_caches(x, w_down)
    check_squares(squares, exact)
    assert (caches is not None) == keep
    if keep:
        assert caches.dtype == dtype and caches.is_contiguous()
        assert_close_to_exact(caches, torch.einsum("td,nrd->tnr", x, w_down), exact)


@interpreted
def test_norms_of_rounded_caches_would_be_noticed():
    x, w_down = make_tensor(9, 32, dtype=torch.float16), make_tensor(3, 16, 32, dtype=torch.float16, seed=1)
    squares, caches = cache_norms(x, w_down, True)
    check_squares(squares, exact_caches(x, w_down))
    with pytest.raises(AssertionError):
        check_squares(caches.float().square().sum(-1), exact_caches(x, w_down))
    with pytest.raises(AssertionError):
        check_squares(squares.roll(1, 1), exact_caches(x, w_down))
    with pytest.raises(ToleranceError):
        assert_close_to_exact(caches.roll(1, 2), caches, exact_caches(x, w_down))


@interpreted
def test_no_tokens():
    with uninitialized_is_nan():
        squares, caches = cache_norms(torch.empty(0, 24), make_tensor(3, 100, 24), True)
        norms, indices, weights = select_experts(squares, None, 2, "topk_softmax")
        slots = group_slots(indices, 3)
        mix, scale = mixing_backward(torch.empty(4, 0), None, slots, norms, indices, weights)
    assert squares.shape == norms.shape == (0, 3) and caches.shape == (0, 3, 100)
    assert indices.shape == weights.shape == mix.shape == (0, 2) and scale.shape == (0,)
    assert slots.offsets.tolist() == [0, 0, 0, 0] and slots.order.shape == slots.places.shape == (0,)


@interpreted
def test_strides_of_tokens_and_weights():
    """Any strides give the bits of contiguous tensors, and what lies between the numbers is not read."""
    x, w_down = make_tensor(19, 40), make_tensor(3, 24, 40, seed=1)
    expected = cache_norms(x, w_down, True)
    wide = torch.full((19, 64), NAN)
    wide[:, 8:48] = x
    spread = torch.full((5, 30, 48), NAN)
    spread[1:4, 2:26, :40] = w_down
    rows = [wide[:, 8:48], x.T.contiguous().T]
    weights = [
        spread[1:4, 2:26, :40],
        w_down.mT.contiguous().mT,
        w_down.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    assert not any(tensor.is_contiguous() for tensor in (*rows, *weights))
    for given in [(row, w_down) for row in rows] + [(x, weight) for weight in weights]:
        assert all(map(torch.equal, cache_norms(*given, True), expected))


@interpreted
def test_rows_far_apart_in_memory():
    """More than 2**31 numbers between two tokens, and between two experts; untouched memory costs nothing."""
    x, w_down = make_tensor(2, 16), make_tensor(2, 8, 16, seed=1)
    far = [torch.empty_strided(like.shape, (2**31, *like.stride()[1:])) for like in (x, w_down)]
    far[0].copy_(x)
    far[1].copy_(w_down)
    assert torch.equal(cache_norms(far[0], far[1], False)[0], cache_norms(x, w_down, False)[0])


@interpreted
@pytest.mark.parametrize("rank", [16, 100])
def test_a_token_does_not_depend_on_others(rank):
    """The same bits alone and among others, of which one is NaN."""
    x, w_down = make_tensor(35, 24), make_tensor(3, rank, 24, seed=1)
    clean, caches = cache_norms(x, w_down, True)
    poisoned = x.clone()
    poisoned[3] = NAN
    squares, found = cache_norms(poisoned, w_down, True)
    kept = torch.arange(35) != 3
    assert torch.equal(squares[kept], clean[kept]) and torch.equal(found[kept], caches[kept])
    assert squares[3].isnan().all() and found[3].isnan().all()
    assert torch.equal(cache_norms(x[20:21], w_down, False)[0], clean[20:21])


@interpreted
def test_an_expert_does_not_depend_on_others():
    x, w_down = make_tensor(9, 24), make_tensor(3, 20, 24, seed=1)
    clean = cache_norms(x, w_down, False)[0]
    w_down[1] = NAN
    squares = cache_norms(x, w_down, False)[0]
    assert squares[:, 1].isnan().all() and torch.equal(squares[:, ::2], clean[:, ::2])


# Selection.


def check_selection(squares, bias, top_k, weighting):
    with uninitialized_is_nan():
        norms, indices, weights = select_experts(squares, bias, top_k, weighting)
    assert (norms.dtype, indices.dtype, weights.dtype) == (torch.float32, torch.int64, torch.float32)
    # The root rounded once; torch.sqrt of float32 is not always that on a CPU.
    assert torch.equal(norms.nan_to_num(nan=-1.0), squares.double().sqrt().float().nan_to_num(nan=-1.0))
    scores = norms if bias is None else norms + bias.float()
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(indices, expected)
    exact = norms.double()
    if weighting == "topk_softmax":
        exact = exact.gather(1, indices).softmax(-1)
    else:
        exact = exact.softmax(-1).gather(1, indices)
    assert torch.allclose(weights.double(), exact, rtol=1e-5, atol=1e-30, equal_nan=True)
    return norms, indices, weights


@interpreted
@WEIGHTINGS
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(37, 8, 2), (5, 1, 1), (20, 5, 1), (3, 33, 33), (9, 40, 3), (2, 512, 4), (2, 100, 7)],
)
def test_selection(tokens, experts, top_k, biased, weighting):
    squares = make_tensor(tokens, experts).square()
    bias = -make_tensor(experts, seed=1).abs() if biased else None
    check_selection(squares, bias, top_k, weighting)


@interpreted
@WEIGHTINGS
def test_ties_go_to_the_lowest_id(weighting):
    squares = torch.arange(40 * 12).view(40, 12).remainder(7).remainder(3).float()
    check_selection(squares, None, 5, weighting)
    _, indices, weights = check_selection(torch.zeros(3, 6), None, 4, weighting)
    assert (indices == torch.arange(4)).all()
    assert torch.allclose(weights, torch.full((3, 4), 1 / 4 if weighting == "topk_softmax" else 1 / 6))


@interpreted
def test_scores_below_zero_and_zeros_of_either_sign():
    """A bias orders by the sum, be it negative, infinite or 0; a root of -0 is -0 and not less than 0."""
    squares = torch.tensor([[0.25, 1.0, 4.0, 9.0, 0.0]]).repeat(3, 1)
    check_selection(squares, torch.tensor([-1.0, -7.0, -2.5, -3.5, -0.25]), 5, "topk_softmax")
    check_selection(squares, torch.tensor([-float("inf"), 0.0, -9.0, -float("inf"), 5.0]), 4, "topk_softmax")
    check_selection(torch.tensor([[-0.0, 0.0, -0.0], [0.0, -0.0, 1.0]]), None, 2, "softmax_topk")


@interpreted
@WEIGHTINGS
def test_infinite_and_missing_norms(weighting):
    """NaN comes before any number; only the weights of its token are NaN."""
    squares = make_tensor(6, 5).square()
    squares[1] = NAN
    squares[2, 3] = squares[2, 4] = NAN
    squares[3, 2] = float("inf")
    squares[4, 0] = torch.tensor(-NAN).copysign(torch.tensor(-1.0))
    _, indices, weights = check_selection(squares, None, 2, weighting)
    assert indices[[1, 2]].tolist() == [[0, 1], [3, 4]] and indices[[3, 4], 0].tolist() == [2, 0]
    assert weights[[1, 2, 4]].isnan().all() and weights[[0, 5]].isfinite().all()


@interpreted
def test_bias_of_other_dtypes_and_strides():
    squares, bias = make_tensor(7, 6).square(), make_tensor(6, seed=1).half()
    expected = select_experts(squares, bias.float(), 3, "topk_softmax")
    strided = bias.double().repeat_interleave(2)[::2]
    for found in (bias, strided):
        actual = select_experts(squares.T.contiguous().T, found, 3, "topk_softmax")
        assert all(map(torch.equal, actual, expected))


# Grouping.


def check_slots(indices, experts):
    with uninitialized_is_nan():
        slots = group_slots(indices, experts)
    flat = indices.flatten()
    exists = (flat >= 0) & (flat < experts)
    count = int(exists.sum())
    order = torch.argsort(torch.where(exists, flat, experts), stable=True)[:count]
    places = torch.full_like(flat, -1)
    places[order] = torch.arange(count).to(flat)
    counts = torch.bincount(flat[exists], minlength=experts)
    assert slots.order.dtype == slots.places.dtype == slots.offsets.dtype == torch.int32
    assert slots.top_k == indices.shape[1] and slots.order.shape == slots.places.shape == flat.shape
    assert all(x.is_contiguous() for x in (slots.order, slots.places, slots.offsets))
    assert torch.equal(slots.order[:count].long(), order)
    assert torch.equal(slots.places.long(), places.long())
    assert slots.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    return slots


def make_choices(tokens, top_k, experts, seed=0):
    """Distinct experts of each token."""
    return make_tensor(tokens, experts, seed=seed).argsort(-1)[:, :top_k]


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 3), (1, 1, 1), (37, 1, 1), (33, 3, 5), (16, 1, 7), (4, 4, 4), (3, 9, 300), (50, 2, 2)],
)
def test_grouping(tokens, top_k, experts, dtype):
    check_slots(make_choices(tokens, top_k, experts).to(dtype), experts)


@interpreted
@pytest.mark.parametrize("expert", [0, 2])
def test_all_tokens_to_one_expert(expert):
    slots = check_slots(torch.full((40, 1), expert), 3)
    assert torch.equal(slots.order, torch.arange(40, dtype=torch.int32))


@interpreted
def test_ids_of_no_expert_are_skipped():
    indices = make_choices(23, 3, 6, seed=1)
    indices[4, 1] = -1
    indices[5] = 6
    indices[20, 0] = 2**32  # not 0, as its lower half is
    indices[21, 2] = -(2**31)
    slots = check_slots(indices, 6)
    assert slots.offsets[-1] == 23 * 3 - 6 and (slots.places == -1).sum() == 6
    check_slots(indices, 4)
    assert check_slots(torch.full((9, 2), 7), 7).offsets.tolist() == [0] * 8


@interpreted
def test_a_token_may_name_an_expert_twice():
    check_slots(torch.tensor([[1, 1], [0, 1], [2, 2]]).repeat(9, 1), 3)


@interpreted
def test_strides_of_indices():
    indices = make_choices(19, 3, 5)
    check_slots(indices.T.contiguous().T, 5)
    check_slots(make_choices(40, 5, 5)[::2, 1:4], 5)


# The backward of the mixing weights.


def test_formula_of_the_norms_gradient():
    """What `check_mixing` expects is what autograd finds for w = softmax(|c|), with |c| = 0 left alone."""
    caches, upstream = (
        make_tensor(6, 3, 5, dtype=torch.float64),
        make_tensor(6, 3, dtype=torch.float64, seed=1),
    )
    caches.requires_grad_()
    norms = caches.norm(dim=-1)
    weights = norms.softmax(-1)
    (expected,) = torch.autograd.grad((weights * upstream).sum(), caches)
    scale = exact_scale(weights, upstream, norms)
    assert torch.allclose(scale[..., None] * caches, expected, rtol=1e-12)
    assert exact_scale(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1)) == 0


def exact_scale(weights, grad_mix, norms):
    grad_norms = weights * (grad_mix - (weights * grad_mix).sum(-1, keepdim=True))
    return torch.where(norms > 0, grad_norms / norms, 0.0)


def check_mixing(indices, experts, blocks, with_grad_weights=True):
    """`sum_partials` and `mixing_backward` for any choices, some norms being 0."""
    tokens, top_k = indices.shape
    slots = group_slots(indices, experts)
    partials = make_tensor(blocks, tokens * top_k)
    partials[:, slots.offsets[-1] :] = NAN  # places of no slot
    grad_weights = make_tensor(tokens, top_k, seed=1) if with_grad_weights else None
    norms = make_tensor(tokens, experts, seed=2).abs()
    norms[::5] = 0
    weights = make_tensor(tokens, top_k, seed=3).softmax(-1)
    with uninitialized_is_nan():
        summed = sum_partials(partials, slots)
        mix, scale = mixing_backward(partials, grad_weights, slots, norms, indices, weights)

    grouped = (slots.places >= 0).view(tokens, top_k)
    place = slots.places.long().clamp(min=0)
    expected = torch.where(grouped, partials.double().sum(0)[place].view(tokens, top_k), 0.0)
    assert torch.allclose(summed.double(), expected, rtol=1e-5, atol=1e-5)
    if grad_weights is not None:
        expected = expected + grad_weights
    assert torch.allclose(mix.double(), expected, rtol=1e-5, atol=1e-5)
    chosen = norms.gather(1, indices.clamp(0, experts - 1).long())
    exact = exact_scale(weights.double(), mix.double(), chosen.double())[grouped]
    found = scale[place.view(tokens, top_k)[grouped]].double()
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-5 * max(1.0, float(exact.abs().max())))
    assert scale.shape == (tokens * top_k,) and (found[exact == 0] == 0).all()
    return mix, scale


@interpreted
@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(37, 2, 8), (11, 1, 3), (7, 5, 5), (3, 20, 33), (1, 1, 1)]
)
def test_mixing_backward(tokens, top_k, experts, blocks):
    check_mixing(make_choices(tokens, top_k, experts), experts, blocks)
    check_mixing(make_choices(tokens, top_k, experts).int(), experts, blocks, with_grad_weights=False)


@interpreted
def test_mixing_backward_of_skipped_and_repeated_slots():
    indices = torch.tensor([[0, 1, 2], [1, 1, 7], [-1, 2, 0], [9, 9, 9]]).repeat(5, 1)
    mix, _ = check_mixing(indices, 3, 2)
    assert mix.isfinite().all()
    check_mixing(indices, 3, 2, with_grad_weights=False)


@interpreted
def test_a_single_choice_has_no_gradient_through_its_norm():
    _, indices, weights = select_experts(make_tensor(9, 4).square(), None, 1, "topk_softmax")
    slots = group_slots(indices, 4)
    norms = torch.ones(9, 4)
    _, scale = mixing_backward(make_tensor(3, 9), None, slots, norms, indices, weights)
    assert (scale == 0).all()


@interpreted
def test_strides_in_the_backward():
    indices = make_choices(9, 2, 4)
    slots = group_slots(indices, 4)
    given = [
        make_tensor(3, 18),
        make_tensor(9, 2),
        make_tensor(9, 4).abs(),
        indices,
        make_tensor(9, 2).softmax(-1),
    ]

    def run(partials, grad_weights, norms, indices, weights):
        return mixing_backward(partials, grad_weights, slots, norms, indices, weights)

    expected = run(*given)
    actual = run(*(x.T.contiguous().T for x in given))
    assert all(map(torch.equal, actual, expected))


@interpreted
def test_the_same_bits_again():
    x, w_down, bias = make_tensor(21, 24), make_tensor(5, 40, 24, seed=1), make_tensor(5, seed=2)

    def run():
        norms, indices, weights = select_experts(cache_norms(x, w_down, False)[0], bias, 2, "topk_softmax")
        slots = group_slots(indices, 5)
        mixed = mixing_backward(make_tensor(4, 42), None, slots, norms, indices, weights)
        return [norms, indices, weights, slots.order, slots.places, slots.offsets, *mixed]

    assert all(map(torch.equal, run(), run()))


# What is launched, without running it.


def recorded(tokens, arch="sm_90", rank=400, dim=1280, experts=8, top_k=2, dtype=torch.bfloat16):
    x, w_down = torch.empty(tokens, dim, dtype=dtype), torch.empty(experts, rank, dim, dtype=dtype)
    with record_launches(arch) as launches:
        squares, _ = cache_norms(x, w_down, False)
        norms, indices, weights = select_experts(squares, torch.zeros(experts), top_k, "topk_softmax")
        slots = group_slots(indices, experts)
        partials = torch.empty(5, tokens * top_k)
        mixing_backward(partials, None, slots, norms, indices, weights)
        sum_partials(partials, slots)
    return launches


@compiled
def test_recorded_launches():
    """Each launch names every argument of its kernel; a rank that is one span needs no second sum."""
    launches = recorded(300)
    names = [x.kernel.__name__.removeprefix("_").removesuffix("_kernel") for x in launches]
    chosen = ["select_experts", "rank_slots", "place_slots", "mixing_backward", "mixing_backward"]
    assert names == ["cache_norms", "sum_spans", *chosen]
    assert [x.kernel.__name__ for x in recorded(300, rank=128)][:2] == [
        "_cache_norms_kernel",
        "_select_experts_kernel",
    ]
    for found in launches:
        assert set(found.arguments) == set(found.kernel.arg_names)
        assert len(found.grid) == 1 and found.grid[0] > 0
        assert found.config.blocks.items() <= found.arguments.items()
    assert recorded(0) == []


@compiled
def test_any_number_of_tokens_shares_its_kernels():
    """Only what may change without compiling again differs."""
    for a, b in zip(recorded(300), recorded(1), strict=True):
        for name, value in a.arguments.items():
            if not isinstance(value, torch.Tensor) and b.arguments[name] != value:
                [parameter] = [p for p in a.kernel.params if p.name == name]
                assert parameter.do_not_specialize, (a.kernel.__name__, name)


@compiled
@pytest.mark.parametrize("rank", [1, 7, 16, 40, 64, 100, 128, 256, 400, 512])
def test_little_is_computed_for_nothing(rank):
    """Padding of a rank of at least 16 is a sixteenth at most; a token's sums are at most an eighth of its caches."""
    launch, *_ = recorded(300, rank=rank, dim=64)
    experts, span = launch.arguments["EXPERTS"], launch.arguments["SPAN"]
    padded = launch.arguments["sums_ptr"].shape[1] // experts * span
    assert rank <= padded <= max(8, rank * 17 / 16)
    assert launch.arguments["sums_ptr"].shape[1] <= experts * -(-rank // 8)


@compiled
@pytest.mark.parametrize(
    ("rows", "aligned"), [((300, 64), 1), ((300, 63), 0), ((300, 68), 0), ((300, 72), 1), ((1, 64), 1)]
)
def test_rows_that_loads_of_16_bytes_can_read_have_configs_of_their_own(rows, aligned):
    launch, *_ = recorded(rows[0], dim=rows[1])
    assert dict(launch.config.request.key)["aligned"] == aligned


@compiled
def test_no_buffer_as_large_as_the_caches():
    """65536 tokens of 64 experts of rank 512 are 2**31 numbers; all that is made here is a twentieth of them."""
    launches = recorded(65536, experts=64, rank=512, dim=64, top_k=8)
    made = {
        x.data_ptr(): x.nbytes for found in launches for x in found.arguments.values() if torch.is_tensor(x)
    }
    assert sum(made.values()) < 65536 * 64 * 512 * 2 / 20
    assert launches[0].grid == (65536 // 128 * (64 * 512 // 256),)


@compiled
@pytest.mark.parametrize("arch", [*known_archs("experts"), INTERPRETER])
def test_every_size_has_a_config_whose_blocks_hold_a_span(arch):
    for bits in (16, 32):
        for aligned in (0, 1):
            for columns, span in [(8, 8), (16, 16), (64, 64), (128, 128), (3200, 32), (32768, 128)]:
                key = {"bits": bits, "aligned": aligned, "columns": columns, "keep": 0}
                blocks = lookup("experts", "cache_norms", arch, **key).blocks
                assert blocks["BLOCK_C"] % span == 0 and blocks["BLOCK_D"] >= 16
    for kernel in (
        "sum_spans",
        "select_experts",
        "rank_slots",
        "place_slots",
        "gather_caches",
        "mixing_backward",
    ):
        assert lookup("experts", kernel, arch)
    ranks = lookup("experts", "rank_slots", arch).blocks
    assert ranks["TILE"] % ranks["BLOCK"] == 0
