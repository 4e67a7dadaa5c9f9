"""Query/key norm and rotary positions against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp, interpreted
from tests.threads import differing
from vot_kernels.ops.parts import row_blocks
from vot_kernels.ops.rope_qk_norm import default_sections, op, rope_qk_norm
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    ToleranceError,
    check_against_reference,
    make_tensor,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)

# Every backend that computes: the kernels run on Triton's interpreter.
BACKENDS = (*COMPUTING, pytest.param("triton", marks=interpreted))

POSITIONS = PackedLayout.from_grid_thw([[3, 2, 3], [0, 4, 4], [1, 1, 1], [2, 5, 1]]).positions


def make_inputs(tokens=POSITIONS.shape[0], head_dim=16, dtype=torch.float32, norm=True):
    """q, k and their weights."""
    q = make_tensor(tokens, 4, head_dim, dtype=dtype)
    k = make_tensor(tokens, 2, head_dim, dtype=dtype, seed=1)
    weights = (
        [1 + 0.3 * make_tensor(head_dim, dtype=dtype, seed=seed) for seed in (2, 3)] if norm else [None] * 2
    )
    return [q, k, *weights]


def runner(backend, positions=POSITIONS, **options):
    def run(q, k, q_weight, k_weight):
        return rope_qk_norm(q, k, positions, q_weight=q_weight, k_weight=k_weight, backend=backend, **options)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [True, False])
def test_matches_the_reference(backend, dtype, norm):
    check_against_reference(runner(backend), runner("reference"), make_inputs(dtype=dtype, norm=norm))


@pytest.mark.parametrize("norm", [True, False])
def test_matches_the_reference_in_float64(norm):
    inputs = make_inputs(dtype=torch.float64, norm=norm)
    check_against_reference(runner("torch"), runner("reference"), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("head_dim", "sections"), [(2, None), (4, None), (10, None), (80, None), (16, (8, 0, 0)), (16, (0, 5, 3))]
)
def test_sections(backend, head_dim, sections):
    options = {"sections": sections, "theta": 500.0, "eps": 1e-3}
    check_against_reference(
        runner(backend, **options), runner("reference", **options), make_inputs(head_dim=head_dim)
    )


@cpp
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 17, 40]), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 2)),
    pairs=st.integers(1, 45),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    norm=st.booleans(),
)
@settings(max_examples=40)
def test_kernels_serve_any_packing(lengths, heads, pairs, dtype, norm):
    """Views of one product, with NaN in the slack; in the rows of a segment, it reaches no other."""
    layout = PackedLayout.from_lengths(lengths)
    weights = make_inputs(0, 2 * pairs, dtype, norm)[2:]
    product = with_slack(make_tensor(layout.num_tokens, sum(heads) + 1, 2 * pairs, dtype=dtype), 2)

    def views(x):
        return x[:, : heads[0]], x[:, heads[0] : -1]

    run = runner("cpp", layout.positions)
    with uninitialized_is_nan():
        check_against_reference(run, runner("reference", layout.positions), [*views(product), *weights])
    poisoned = run(*views(poison_segment(product, layout, 0)), *weights)
    for a, b in zip(poisoned, run(*views(product), *weights), strict=True):
        assert torch.equal(a[lengths[0] :], b[lengths[0] :])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 28])
def test_blocks_of_any_size(tokens, norm, monkeypatch):
    monkeypatch.setattr(row_blocks, "_BLOCK_NUMBERS", 4 * 16 * tokens)
    inputs = [None if x is None else with_slack(x, 3) if x.ndim == 3 else x for x in make_inputs(norm=norm)]
    inputs = [None if x is None else x.nan_to_num() for x in inputs]
    check_against_reference(runner("torch"), runner("reference"), inputs)


@pytest.mark.parametrize("only", ["q", "k"])
def test_each_norm_can_be_left_out(only):
    q, k, q_weight, k_weight = make_inputs()
    both = rope_qk_norm(q, k, POSITIONS, q_weight=q_weight, k_weight=k_weight)
    neither = rope_qk_norm(q, k, POSITIONS)
    one = rope_qk_norm(q, k, POSITIONS, **{f"{only}_weight": q_weight if only == "q" else k_weight})
    expected = (both[0], neither[1]) if only == "q" else (neither[0], both[1])
    assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    check_against_reference(
        runner(backend, POSITIONS[:0]), runner("reference", POSITIONS[:0]), make_inputs(tokens=0)
    )


@pytest.mark.parametrize("size", [1e3, 6e4, 3e5, 1e7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_positions(backend, size):
    """Angles of thousands of turns, at which nothing but the rounding of the angle itself may be seen."""
    positions = (make_tensor(*POSITIONS.shape) * size).round()
    options = {"theta": 10.0}
    check_against_reference(
        runner(backend, positions, **options), runner("reference", positions, **options), make_inputs()
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_slack_rows_are_zero_and_poison_stays_out(backend):
    q, k, *weights = make_inputs()
    inputs = [with_slack(q, 3).requires_grad_(), with_slack(k, 3).requires_grad_()]
    weights = [w.requires_grad_() for w in weights]
    outputs = runner(backend)(*inputs, *weights)
    clean = runner(backend)(q, k, *weights)
    for out, expected in zip(outputs, clean, strict=True):
        assert torch.equal(out[:-3], expected) and (out[-3:] == 0).all()
    upstream = [
        torch.full_like(out, float("nan")).index_fill_(0, torch.arange(len(q)), 1.0) for out in outputs
    ]
    gradients = torch.autograd.grad(outputs, [*inputs, *weights], upstream)
    assert all((g[-3:] == 0).all() for g in gradients[:2])
    assert all(g.isfinite().all() for g in gradients)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(tokens=5, head_dim=6, dtype=torch.float64)]
    positions = POSITIONS[[4, 11, 19]]
    assert torch.autograd.gradcheck(runner("torch", positions), inputs)
    assert torch.autograd.gradcheck(lambda q, k: rope_qk_norm(q, k, positions), inputs[:2])
    assert torch.autograd.gradcheck(lambda q, w: rope_qk_norm(q, q, positions, k_weight=w), inputs[0::2])


def test_scores_depend_on_relative_positions_alone():
    q, k, *weights = make_inputs(dtype=torch.float64)

    def scores(positions):
        a, b = runner("torch", positions)(q, k, *weights)
        return torch.einsum("thd,shd->hts", a[:, :2], b)

    shifted = scores(POSITIONS + torch.tensor([7, -3, 100]))
    torch.testing.assert_close(shifted, scores(POSITIONS), rtol=1e-9, atol=1e-9)
    assert (scores(POSITIONS * 2) - shifted).abs().max() > 0.1


def test_each_axis_turns_its_own_section():
    x = make_tensor(1, 1, 24, dtype=torch.float64)
    for axis, pairs in enumerate(torch.arange(12).split([5, 4, 3])):
        position = torch.zeros(1, 3, dtype=torch.int64)
        position[0, axis] = 1
        changed = (rope_qk_norm(x, x, position, sections=(5, 4, 3))[0] != x)[0, 0]
        expected = torch.zeros(24, dtype=torch.bool)
        expected[torch.cat([pairs, pairs + 12])] = True
        assert torch.equal(changed, expected)


def test_the_norm_is_that_of_torch():
    q, k, q_weight, k_weight = make_inputs()
    turned, _ = rope_qk_norm(
        q, k, torch.zeros_like(POSITIONS), q_weight=q_weight, k_weight=k_weight, eps=1e-5
    )
    torch.testing.assert_close(turned, torch.nn.functional.rms_norm(q, (16,), q_weight, 1e-5))


@pytest.mark.parametrize(
    ("pairs", "expected"), [(1, [1, 0, 0]), (4, [2, 1, 1]), (32, [10, 11, 11]), (64, [22, 21, 21])]
)
def test_default_sections(pairs, expected):
    assert default_sections(pairs) == expected


def test_floating_positions_of_any_dtype():
    q, k, *_ = make_inputs()
    expected = rope_qk_norm(q, k, POSITIONS)[0]
    for dtype in (torch.int64, torch.float32, torch.float64):
        assert torch.equal(rope_qk_norm(q, k, POSITIONS.to(dtype))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise_and_segments_are_independent(backend):
    q, k, *weights = make_inputs()
    whole = runner(backend)(q, k, *weights)
    assert all(torch.equal(a, b) for a, b in zip(whole, runner(backend)(q, k, *weights), strict=True))
    alone = runner(backend, POSITIONS[19:])(q[19:], k[19:], *weights)
    assert all(torch.equal(a[19:], b) for a, b in zip(whole, alone, strict=True))


@cpp
def test_any_number_of_threads_gives_the_same_bits():
    positions = PackedLayout.from_lengths([50, 1, 47]).positions
    inputs = [x.requires_grad_() for x in make_inputs(len(positions), head_dim=72)]

    def results():
        outputs = runner("cpp", positions)(*inputs)
        return *outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)

    assert differing(results) == []


@cpp
def test_views_of_one_product_are_read_where_they_lie():
    tokens = POSITIONS.shape[0]
    both = make_tensor(tokens, 6, 16).requires_grad_()
    inputs = [both[:, :4], both[:, 4:], *make_inputs()[2:]]
    (copied,) = torch.autograd.grad(runner("cpp")(*(x.clone() for x in inputs))[0].square().sum(), both)
    (viewed,) = torch.autograd.grad(runner("cpp")(*inputs)[0].square().sum(), both)
    assert torch.equal(viewed, copied)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, norm, backend):
    q, k, *weights = make_inputs(tokens=32, dtype=dtype, norm=norm)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [None if x is None else x.requires_grad_() for x in (q, k, *weights)]
    torch.library.opcheck(
        op._rope_qk_norm_fwd.op, (*inputs[:2], POSITIONS, *inputs[2:], 100.0, [2, 3, 3], 1e-6, backend)
    )
    detached = [None if x is None else x.detach() for x in inputs]
    arguments = (*detached[:2], *detached[:2], POSITIONS, *detached[2:], 100.0, [2, 3, 3], 1e-6, backend)
    torch.library.opcheck(op._rope_qk_norm_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_graph_for_any_packing(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, q_weight, k_weight, positions):
        a, b = runner(backend, positions)(q, k, q_weight, k_weight)
        return (a[:, :2] * b).square().sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for tokens in (5, 29, 17):
        positions = POSITIONS[:tokens].clone()
        inputs = [x.requires_grad_() for x in make_inputs(tokens)]
        for x in (*inputs[:2], positions):
            torch._dynamo.mark_dynamic(x, 0)
        actual, expected = compiled(*inputs, positions), step(*inputs, positions)
        for a, b in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, *w: [0 * x for x in runner("torch")(q, k, *w)],
        lambda q, k, *w: runner("torch", POSITIONS.roll(1, 0))(q, k, *w),
        lambda q, k, *w: runner("torch", POSITIONS[:-1])(q, k, *w),
        lambda q, k, *w: runner("torch", POSITIONS.flip(1))(q, k, *w),
        lambda q, k, a, b: runner("torch")(q, k, b, a),
        lambda q, k, a, b: runner("torch")(q, k, a.detach(), b),
    ],
    ids=[
        "zeros",
        "shifted positions",
        "dropped last token",
        "swapped axes",
        "swapped weights",
        "no gradient",
    ],
)
def test_canary_the_comparison_rejects(wrong):
    with pytest.raises(ToleranceError):
        check_against_reference(wrong, runner("reference"), make_inputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 16)}, "q must"),
        ({"q": torch.zeros(29, 4, 15)}, "head_dim must be even and positive, got 15"),
        ({"q": torch.zeros(29, 4, 0)}, "head_dim must be even and positive, got 0"),
        ({"k": torch.zeros(28, 2, 16)}, "k must have the 29 tokens of q, got 28"),
        ({"k": torch.zeros(29, 2, 8)}, "k must"),
        ({"k": torch.zeros(29, 2, 16, dtype=torch.float64)}, "k must have the dtype of q"),
        ({"positions": POSITIONS[:, :2]}, "positions must"),
        ({"positions": torch.zeros(30, 3)}, "positions has 30 rows, more than the 29 of q"),
        ({"positions": torch.zeros(2, 3, dtype=torch.bool)}, "positions must be integer or floating"),
        ({"q_weight": torch.ones(8)}, "q_weight must"),
        ({"k_weight": torch.ones(16, dtype=torch.int32)}, "k_weight must be float"),
        ({"sections": (3, 3, 3)}, "sum to head_dim / 2 = 8"),
        ({"sections": (4, 4)}, "sections must be three"),
        ({"sections": (10, -1, -1)}, "sections must be three"),
        ({"theta": 0.0}, "theta must be > 0"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    q, k, *_ = make_inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        rope_qk_norm(**({"q": q, "k": k, "positions": POSITIONS} | change))
