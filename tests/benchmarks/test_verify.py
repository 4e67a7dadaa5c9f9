"""The check before every figure: wrong providers are refused however small the error, correct ones pass."""

from dataclasses import replace

import pytest
import torch

from benchmarks.core import Provider, Status, Workload
from benchmarks.problems.attention import Attention, attention_rows
from benchmarks.race import Rules, race
from benchmarks.verify import OracleError, expect, verify, verify_on
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_attention_reference
from vot_kernels.ops.packed_attention.reference import packed_attention as packed_attention_reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import ToleranceError, make_tensor

CPU = torch.device("cpu")
KINDS = ("packed_attention", "linear_attention", "hybrid_attention")
# There are more than 1024 tokens, so that the full size is verified on some rows only.
PROBLEM = Attention("packed_attention", (640, 1, 300, 100), heads=1, kv_heads=1, head_dim=8)


def solve(problem, prepared, *inputs):
    """Right, by the plain definition."""
    return problem.oracle(inputs, None)


def zeros(problem, prepared, *inputs):
    return solve(problem, prepared, *inputs) * 0


def swapped_segments(problem, prepared, *inputs):
    out = solve(problem, prepared, *inputs)
    first = problem.lengths[0]
    return torch.cat([out[first:], out[:first]])


def dropped_last_token(problem, prepared, q, k, v):
    """A provider in which no query sees the last key of the last segment."""
    *lengths, last = problem.lengths
    shorter = replace(problem, lengths=(*lengths, last - 1))
    out = shorter.oracle((q[:-1], k[:-1], v[:-1]), None)
    own = k[-last:-1] if last > 1 else k[-1:]
    weights = torch.einsum("hd,khd->hk", q[-1] * problem.head_dim**-0.5, own).softmax(-1)
    return torch.cat([out, torch.einsum("hk,khd->hd", weights, v[-last:-1] if last > 1 else v[-1:])[None]])


class HalvedGradient(torch.autograd.Function):
    """A provider with the correct output and half of the correct gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


def wrong_gradient_of(index):
    def run(problem, prepared, *inputs):
        given = list(inputs)
        given[index] = HalvedGradient.apply(given[index])
        return solve(problem, prepared, *given)

    return run


def one_nan(problem, prepared, *inputs):
    out = solve(problem, prepared, *inputs).clone()
    out[0, 0, 0] = torch.nan
    return out


def nan_between_verified_rows(problem, prepared, *inputs):
    out = solve(problem, prepared, *inputs).clone()
    rows = problem.rows(inputs)
    if rows is not None:
        out[next(i for i in range(problem.size) if i not in set(rows.tolist()))] = torch.nan
    return out


def right_only_when_small(problem, prepared, *inputs):
    out = solve(problem, prepared, *inputs)
    return out if problem.size <= 1024 else out * 1.01


def wrong_block(problem, prepared, *inputs):
    """A provider with one wrong tile of 64 rows, as from a wrong bound; only if the problem is large."""
    out = solve(problem, prepared, *inputs).clone()
    if problem.size > 1024:
        out[64:128] *= 1.02
    return out


def overwritten_inputs(problem, prepared, *inputs):
    for x in inputs:
        x.data.zero_()
    return solve(problem, prepared, *inputs)


def coarser_dtype(problem, prepared, *inputs):
    return solve(problem, prepared, *inputs).half()


def transposed(problem, prepared, *inputs):
    return solve(problem, prepared, *inputs).transpose(1, 2)


def two_outputs(problem, prepared, *inputs):
    out = solve(problem, prepared, *inputs)
    return out, out


CANARIES = {
    "zeros": zeros,
    "swapped segments": swapped_segments,
    "dropped last token": dropped_last_token,
    "one nan": one_nan,
    "nan between verified rows": nan_between_verified_rows,
    "right only when small": right_only_when_small,
    "wrong block": wrong_block,
    "overwritten inputs": overwritten_inputs,
    "coarser dtype": coarser_dtype,
    "transposed": transposed,
    "two outputs": two_outputs,
}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", CANARIES)
def test_a_wrong_provider_gets_a_mismatch_and_no_figure(name, direction):
    outcome = _outcome(CANARIES[name], direction)
    assert outcome.status is Status.MISMATCH, outcome.reason
    assert outcome.reason
    assert not outcome.whole_s and not outcome.kernel_s and outcome.peak_bytes is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_gradient_of_one_input_is_a_mismatch_where_gradients_are_timed(index):
    for direction in ("backward", "both"):
        outcome = _outcome(wrong_gradient_of(index), direction)
        assert outcome.status is Status.MISMATCH
        assert f"gradient of input {index}" in outcome.reason
    assert _outcome(wrong_gradient_of(index), "forward").status is Status.TIMED


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_right_provider_is_timed(direction):
    outcome = _outcome(solve, direction)
    assert outcome.status is Status.TIMED, outcome.reason
    assert len(outcome.whole_s) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_computation_passes_in_every_dtype(kind, dtype):
    problem = replace(PROBLEM, kind=kind, group_size=64)
    verify(Provider("plain", (), solve), problem, dtype, CPU, gradients=True)


def test_rounding_as_flash_kernels_do_passes_in_bfloat16():
    """A provider that rounds probabilities and features to bfloat16 before the second product, but not beta."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.bfloat16().to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            return grad.bfloat16().to(grad.dtype)

    def run(problem, prepared, *inputs):
        q, k, v, beta = inputs
        q, k, v = (Rounded.apply(x.float()) for x in (q, k, v))
        layout = problem.layout()
        out = reference.hybrid_attention(
            q, k, v, layout, window=problem.window, beta=beta, q_features=Rounded.apply(q.softmax(-1)),
            k_features=Rounded.apply(k.softmax(-1)),
        )[0]  # fmt: skip
        return Rounded.apply(out).bfloat16()

    problem = replace(PROBLEM, kind="hybrid_attention", group_size=64)
    verify(Provider("rounded", (), run), problem, torch.bfloat16, CPU, gradients=True)


def test_the_inputs_of_others_survive_a_provider_that_overwrites_them():
    inputs = PROBLEM.small().inputs(torch.float32, CPU)
    before = [x.clone() for x in inputs]
    with pytest.raises(ToleranceError, match="input 0 is overwritten"):
        verify_on(Provider("bad", (), overwritten_inputs), PROBLEM.small(), inputs, gradients=False)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_a_failing_oracle_is_not_blamed_on_a_provider():
    class Broken(Attention):
        def oracle(self, inputs, rows):
            raise torch.OutOfMemoryError("CUDA out of memory")

    problem = Broken("packed_attention", (4,), heads=1, kv_heads=1, head_dim=4)
    with pytest.raises(OracleError, match="the oracle failed: OutOfMemoryError: CUDA out of memory"):
        expect(problem, problem.inputs(torch.float32, CPU), gradients=False)
    outcome = race(_workload(problem), "forward", [Provider("right", (), solve)], Rules(rounds=1))["right"]
    assert outcome.status is Status.ERROR and "the oracle failed" in outcome.reason


def test_the_oracle_is_asked_once_for_all_providers():
    asked = []

    class Counted(Attention):
        def oracle(self, inputs, rows):
            asked.append((self.size, inputs[0].dtype))
            return super().oracle(inputs, rows)

    def run(problem, prepared, *inputs):
        return Attention.oracle(problem, inputs, None)

    problem = Counted("packed_attention", (1030,), heads=1, kv_heads=1, head_dim=4)
    known = {}
    for name in "abc":
        verify(Provider(name, (), run), problem, torch.float32, CPU, gradients=False, known=known)
    small = problem.small().size
    assert asked == [(size, t) for size in (small, 1030) for t in (torch.float32, torch.float64)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(7,), (5, 0, 9), (0, 0, 3), (1, 1, 12, 2)])
@pytest.mark.parametrize(
    ("kind", "causal", "window"),
    [
        ("packed_attention", False, 1),
        ("packed_attention", True, 1),
        ("linear_attention", False, 1),
        ("linear_attention", True, 1),
        ("hybrid_attention", False, 0),
        ("hybrid_attention", False, 1),
        ("hybrid_attention", False, (2, 0)),
    ],
)
def test_rows_of_the_definition_are_those_of_the_reference_with_gradients(
    kind, causal, window, lengths, kv_heads
):
    problem = Attention(kind, lengths, 4, kv_heads, head_dim=6, group_size=3, window=window, causal=causal)
    inputs = [
        make_tensor(*x.shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, x in enumerate(problem.inputs(torch.float64, CPU))
    ]
    rows = torch.arange(problem.size)[::2]
    q, k, v, *beta = inputs
    some = attention_rows(problem, q, k, v, beta[0] if beta else None, rows)
    right = _reference(problem, inputs)[rows]
    torch.testing.assert_close(some, right, rtol=1e-12, atol=1e-13)
    grad = make_tensor(*right.shape, dtype=torch.float64, seed=7)
    found, wanted = (torch.autograd.grad(out, inputs, grad, materialize_grads=True) for out in (some, right))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_definition_stay_finite_in_float32_for_large_scores(kind):
    problem = Attention(kind, (40, 30), 2, 2, head_dim=8, group_size=10)
    q, k, v, *beta = problem.inputs(torch.float32, CPU)
    inputs = q * 30, k * 30, v, *(b - 60 for b in beta)
    out = attention_rows(problem, *inputs[:3], inputs[3] if beta else None, torch.arange(70))
    exact = _reference(problem, [x.double() for x in inputs])
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "lengths",
    [
        (65536,),
        (16384, 12288, 8192, 4096),
        (64,) * 1000,
        (9000, *[20] * 400),
        (*[20] * 400, 9000),
        (1500, 0, 3),
    ],
)
def test_the_small_twin_keeps_the_structure(lengths):
    problem = Attention("hybrid_attention", lengths, group_size=256)
    small = problem.small()
    assert 64 <= small.size <= 512
    assert small.rows(small.inputs(torch.float32, CPU)) is None
    assert min(len(lengths), 24) <= len(small.lengths) <= 25
    assert sum(n > 1 for n in small.lengths) >= min(len(lengths), 2) - (0 in lengths)
    assert max(small.lengths) / small.size >= 0.75 * max(lengths) / sum(lengths)
    assert (0 in small.lengths) == (0 in lengths)
    if max(lengths) > 2 * problem.group_size:
        assert max(small.lengths) > small.group_size  # still several groups


def test_verified_rows_hold_the_ends_of_early_late_and_longest_segments():
    lengths = (*[20] * 30, 5000, *[20] * 30)
    problem = Attention("packed_attention", lengths, 1, 1, 8)
    rows = set(problem.rows(problem.inputs(torch.float32, CPU)).tolist())
    assert {0, 19, 600, 5599, sum(lengths) - 20, sum(lengths) - 1} <= rows
    assert max(b - a for a, b in zip(sorted(rows), sorted(rows)[1:], strict=False)) <= sum(lengths) / 47 + 1


def test_inputs_depend_on_the_seed_alone():
    problem = replace(PROBLEM, kind="hybrid_attention")
    first, again, other = (problem.inputs(torch.float32, CPU, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def _reference(problem, inputs):
    layout = PackedLayout.from_lengths(
        problem.lengths, problem.group_size if problem.kind == "hybrid_attention" else None
    )
    q, k, v, *beta = inputs
    if problem.kind == "packed_attention":
        return packed_attention_reference(q, k, v, layout, causal=problem.causal)[0]
    if problem.kind == "linear_attention":
        return linear_attention_reference(q, k, v, layout, causal=problem.causal)[0]
    return reference.hybrid_attention(q, k, v, layout, window=problem.window, beta=beta[0])[0]


def _workload(problem):
    return Workload("suite", "workload", problem, torch.float32, "cpu")


def _outcome(run, direction):
    provider = Provider("canary", ("suite",), run)
    return race(_workload(PROBLEM), direction, [provider], Rules(rounds=1, input_sets=1))["canary"]
