"""The comparators reject what a broken kernel would return."""

import pytest
import torch

from vot_kernels import testing
from vot_kernels.ops.packed_attention.reference import packed_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    ToleranceError,
    assert_close_to_exact,
    check_against_reference,
    check_selection,
    make_experts,
    make_qkv,
    make_tensor,
    max_error,
    poison_segment,
    shifted,
    uninitialized_is_nan,
    with_slack,
)

LENGTHS = (5, 5, 9)
LAYOUT = PackedLayout.from_lengths(LENGTHS)


def results(dtype, scale=1.0):
    q, k, v = make_qkv(sum(LENGTHS), dtype=dtype)
    inputs = q, k, (v.double() * scale).to(dtype)
    low = packed_attention(*inputs, LAYOUT)[0]
    exact = packed_attention(*(x.double() for x in inputs), LAYOUT)[0]
    return low, exact


def zeros(x):
    return torch.zeros_like(x)


def swapped_segments(x):
    return torch.cat([x[5:10], x[:5], x[10:]])


def dropped_last_token(x):
    return torch.cat([x[:-1], torch.zeros_like(x[-1:])])


def dropped_head(x):
    x = x.clone()
    x[:, 1] = 0
    return x


def five_percent_more(x):
    return x * 1.05


def one_nan(x):
    x = x.clone()
    x[3, 0, 0] = torch.nan
    return x


def one_row_short(x):
    return x[:-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_accepts_the_same_dtype_computation(dtype):
    low, exact = results(dtype)
    assert_close_to_exact(low, low, exact)
    assert_close_to_exact(low * (1 + torch.finfo(dtype).eps), low, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "broken",
    [zeros, swapped_segments, dropped_last_token, dropped_head, five_percent_more, one_nan, one_row_short],
)
def test_rejects_broken_results(broken, dtype):
    low, exact = results(dtype)
    with pytest.raises(ToleranceError):
        assert_close_to_exact(broken(low), low, exact)


@pytest.mark.tested_on("sonic-moe#63")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-5, 1e3])
@pytest.mark.parametrize(
    "broken", [zeros, swapped_segments, dropped_last_token, dropped_head, five_percent_more]
)
def test_rejects_broken_results_of_any_size(broken, scale, dtype):
    low, exact = results(dtype, scale)
    assert_close_to_exact(low, low, exact)
    with pytest.raises(ToleranceError):
        assert_close_to_exact(broken(low), low, exact)


def test_rejects_a_wrong_gradient_behind_a_right_output():
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = [torch.randn(4, 3)]
    check_against_reference(lambda x: [x * 2], lambda x: [x * 2], x)
    with pytest.raises(ToleranceError, match="gradient of input 0"):
        check_against_reference(lambda x: [WrongBackward.apply(x)], lambda x: [x * 2], x)


def test_rejects_a_missing_gradient():
    x = [torch.randn(4), torch.randn(4)]
    with pytest.raises(ToleranceError, match="gradient of input 1"):
        check_against_reference(lambda a, b: [a * b.detach()], lambda a, b: [a * b], x)


def test_floor_is_for_results_that_cancel():
    zero, dust = torch.zeros(3), torch.full((3,), 2e-7)
    with pytest.raises(ToleranceError):
        assert_close_to_exact(dust, zero, zero)
    assert_close_to_exact(dust, zero, zero, floor=1.0)
    with pytest.raises(ToleranceError):
        assert_close_to_exact(dust * 10, zero, zero, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_computation_may_be_lucky(dtype):
    """Its error is 0 for whole numbers, and a rounding of x times 1e4 for their neighbours."""

    def reference(x):
        return [(x * 49 / 49 - x) * 1e4]

    def check(roundings):
        ones = [torch.ones(16, dtype=dtype)]
        error = roundings * 1e4 * torch.finfo(dtype).eps
        check_against_reference(lambda x: [reference(x)[0] + error], reference, ones, gradients=False)

    check(1)
    with pytest.raises(ToleranceError, match="output 0: error"):
        check(100)
    with pytest.raises(ToleranceError, match="output 0: error inf"):
        check(torch.nan)


def test_rejects_a_useless_yardstick():
    low, exact = results(torch.float32)
    with pytest.raises(ToleranceError, match="not finite"):
        assert_close_to_exact(low, one_nan(low), exact)


def test_max_error_knows_infinities():
    inf = torch.inf
    assert max_error(torch.tensor([-inf, 1.0]), torch.tensor([-inf, 1.5])) == 0.5
    assert max_error(torch.tensor([-inf]), torch.tensor([0.0])) == inf
    assert max_error(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == inf
    assert max_error(torch.empty(0), torch.empty(0)) == 0


def test_inputs_repeat_and_are_rounded_once():
    q, k, v = make_qkv(7, 4, 8, kv_heads=2)
    assert q.shape == (7, 4, 8) and k.shape == v.shape == (7, 2, 8)
    assert torch.equal(q, make_qkv(7, 4, 8, kv_heads=2)[0])
    assert not torch.equal(k, v)
    half = make_qkv(7, 4, 8, kv_heads=2, dtype=torch.bfloat16)[0]
    assert torch.equal(half, make_qkv(7, 4, 8, dtype=torch.float64)[0].bfloat16())


def test_all_random_numbers_shift_together(monkeypatch):
    before = make_tensor(3), shifted(5)
    monkeypatch.setattr(testing, "SEED_SHIFT", testing.SEED_SHIFT + 1)
    assert not torch.equal(make_tensor(3), before[0]) and shifted(5) != before[1]


@pytest.mark.fixed_seed
def test_marked_tests_keep_their_seeds():
    assert shifted(5) == 5


def test_poison():
    x = torch.zeros(sum(LENGTHS), 2)
    assert with_slack(x, 3)[-3:].isnan().all() and not with_slack(x, 3)[:-3].isnan().any()
    poisoned = poison_segment(x, LAYOUT, 1)
    assert poisoned.isnan().any(1).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    with uninitialized_is_nan():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_packings_hold_the_hard_cases():
    lengths = list(PACKINGS.values())
    for case in [(0,), (1,), (0, 5, 0), ()]:
        assert case in lengths
    assert any(len(case) > 1 and not any(case) for case in lengths)
    assert any(case and max(case) > 20 * sorted(case)[len(case) // 2] for case in lengths)


def selection(dtype=torch.float32):
    """x, w_down, and what a right kernel would find: norms and the two best experts."""
    x, w_down, *_ = make_experts(64, dtype=dtype)
    norms = torch.einsum("td,nrd->tnr", x.double(), w_down.double()).norm(dim=-1)
    return x, w_down, norms.float(), norms.topk(2).indices


def test_a_right_selection_passes():
    check_selection(*selection())
    check_selection(*selection(torch.bfloat16))
    x, w_down, norms, _ = selection()
    bias = torch.tensor([0.0, 1e6, 0, 0, -1e6, 0])
    check_selection(x, w_down, norms, (norms + bias).topk(2).indices, bias)


@pytest.mark.parametrize("wrong", ["norms", "order", "worst", "twice"])
def test_canary_a_wrong_selection_is_rejected(wrong):
    x, w_down, norms, indices = selection(torch.bfloat16)
    if wrong == "norms":  # of caches that were rounded
        norms = torch.einsum("td,nrd->tnr", x, w_down).float().norm(dim=-1)
    elif wrong == "order":
        indices = indices.flip(1)
    elif wrong == "worst":
        indices = torch.cat([indices[:, :1], norms.argmin(1, keepdim=True)], 1)
    else:
        indices = indices[:, :1].expand(-1, 2)
    with pytest.raises(ToleranceError):
        check_selection(x, w_down, norms, indices)
