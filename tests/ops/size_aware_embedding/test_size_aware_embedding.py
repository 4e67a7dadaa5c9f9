"""The size-aware embedding against its reference, and what its features tell apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import COMPUTING, cpp, interpreted
from tests.threads import differing
from vot_kernels.ops.dispatch import load
from vot_kernels.ops.size_aware_embedding import op, size_aware_embedding, size_features
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    ToleranceError,
    check_against_reference,
    make_tensor,
    poison_segment,
    spread,
    uninitialized_is_nan,
    with_slack,
)

# Every backend that computes: the kernels run on Triton's interpreter.
BACKENDS = (*COMPUTING, pytest.param("triton", marks=interpreted))

LAYOUT = PackedLayout.from_grid_thw([[2, 3, 2], [0, 4, 4], [1, 1, 1], [3, 2, 4]])


def make_inputs(tokens=LAYOUT.num_tokens, dim=10, hidden=7, octaves=3, dtype=torch.float32):
    shapes = ((tokens, dim), (hidden, 12 * octaves), (hidden,), (dim, hidden), (dim,))
    return [make_tensor(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def runner(backend, layout=LAYOUT, **options):
    def run(x, *weights):
        return (size_aware_embedding(x, layout, *weights, backend=backend, **options),)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"fps": 24.0}, {"fps": 8, "use_frames": False}])
def test_matches_the_reference(backend, dtype, options):
    check_against_reference(
        runner(backend, **options), runner("reference", **options), make_inputs(dtype=dtype)
    )


def test_matches_the_reference_in_float64():
    check_against_reference(runner("torch"), runner("reference"), make_inputs(dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PACKINGS)
def test_packings(backend, name):
    layout = PackedLayout.from_lengths(PACKINGS[name])
    check_against_reference(
        runner(backend, layout), runner("reference", layout), make_inputs(layout.num_tokens, dim=37)
    )


@cpp
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 70]), max_size=5),
    dim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    infinite=st.integers(0, 4),
)
@settings(max_examples=40)
def test_kernels_serve_any_packing(lengths, dim, dtype, strided, infinite):
    """With NaN in the slack, and perhaps infinity in one segment."""
    layout = PackedLayout.from_lengths(lengths)
    x, *weights = make_inputs(layout.num_tokens, dim, dtype=dtype)
    if infinite < len(lengths):
        x = poison_segment(x, layout, infinite, torch.inf)
    inputs = [with_slack(x, 3), *weights]
    if strided:
        inputs = [spread(x) for x in inputs]
    with uninitialized_is_nan():
        check_against_reference(runner("cpp", layout), runner("reference", layout), inputs)


@pytest.fixture(params=["segment by segment", "all at once"])
def way(request, monkeypatch):
    """Both ways of the PyTorch backend, whatever the lengths."""
    backend = load("size_aware_embedding", "torch")
    monkeypatch.setattr(backend, "_LONG", 0 if request.param == "segment by segment" else 2**40)
    return backend


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packings_either_way(name, dtype, way):
    layout = PackedLayout.from_lengths(PACKINGS[name])
    check_against_reference(
        runner("torch", layout), runner("reference", layout), make_inputs(layout.num_tokens, dtype=dtype)
    )


@pytest.mark.parametrize("run", [4, 7, 64])
def test_sums_in_runs_of_any_length(run, monkeypatch):
    backend = load("size_aware_embedding", "torch")
    monkeypatch.setattr(backend, "_RUN", run)
    lengths = [0, 0, 1, run, 0, 1000, run + 1, 0, run - 1, 2, 0]
    rows = make_tensor(sum(lengths), 3, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    expected = torch.stack([part.sum(0) for part in rows.split(lengths)])
    torch.testing.assert_close(backend._segment_sums(rows, bounds), expected)


@pytest.fixture(params=["torch, segment by segment", "torch, all at once", pytest.param("cpp", marks=cpp)])
def each_way(request, monkeypatch):
    """The name of a backend, for each of its ways."""
    backend, _, way = request.param.partition(", ")
    monkeypatch.setattr(load("size_aware_embedding", "torch"), "_LONG", 2**40 if way == "all at once" else 0)
    return backend


def test_gradients_of_long_segments_are_exact(each_way):
    """Sums of 200,000 positive numbers: one after the other, their relative error would be 1e-5."""
    layout = PackedLayout.from_lengths([200_000, 3])
    x, *weights = make_inputs(layout.num_tokens, dim=2)
    upstream = make_tensor(*x.shape, seed=9).abs()
    bias = weights[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(runner(each_way, layout)(x, *weights), bias, upstream)
    exact = upstream.double().sum(0)
    assert ((gradient - exact).abs() < 6e-7 * exact).all()
    one_by_one = torch.segment_reduce(upstream, "sum", lengths=torch.tensor([len(x)]), axis=0)[0]
    assert not ((one_by_one - exact).abs() < 6e-7 * exact).all(), "the bound rejects a plain loop"


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(25 + LAYOUT.num_tokens, 3, 2, 1, torch.float64)]
    assert torch.autograd.gradcheck(runner("torch", fps=12.0), inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_slack_rows_are_zero_and_poison_stays_out(backend):
    x, *weights = make_inputs()
    slack = with_slack(x, 4).requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    (y,) = runner(backend)(slack, *weights)
    assert torch.equal(y[:-4], runner(backend)(x, *weights)[0]) and (y[-4:] == 0).all()
    upstream = torch.full_like(y, float("nan"))
    upstream[:-4] = 1
    gradients = torch.autograd.grad(y, [slack, *weights], upstream)
    assert (gradients[0][-4:] == 0).all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_does_not_depend_on_the_others(backend):
    x, *weights = make_inputs()
    (packed,) = runner(backend)(x, *weights)
    start, end = LAYOUT.cu_seqlens[3:5].tolist()
    alone = PackedLayout.from_grid_thw([[3, 2, 4]])
    torch.testing.assert_close(packed[start:end], runner(backend, alone)(x[start:end], *weights)[0])
    (poisoned,) = runner(backend)(poison_segment(x, LAYOUT, 0), *weights)
    assert torch.equal(poisoned[start:end], packed[start:end])
    assert torch.equal(packed, runner(backend)(x, *weights)[0])


@cpp
def test_any_number_of_threads_gives_the_same_bits():
    """Of the kernels; the small network before them is PyTorch's, which sums in any order on some processors."""
    layout = PackedLayout.from_lengths([300, 0, 1, 64, 129])
    x, embedding = make_tensor(layout.num_tokens, 33), make_tensor(5, 33, seed=1)
    kernels = load("size_aware_embedding", "cpp")

    def results():
        packed = embedding, layout.cu_seqlens, layout.num_tokens
        return kernels.forward(x, *packed), *kernels.backward(x, *packed)

    assert differing(results) == []


def test_autocast_does_not_reach_inside():
    inputs = make_inputs()
    (expected,) = runner("torch")(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(runner("torch")(*inputs)[0], expected)


def test_features_tell_every_size_apart():
    sides = torch.arange(1, 65)
    sizes = torch.stack([torch.ones(64 * 64).long(), sides.repeat_interleave(64), sides.repeat(64)], dim=1)
    features = size_features(sizes)
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.fill_diagonal_(1.0).min() > 1e-3
    assert torch.equal(features[0, :8], torch.tensor([0.0] * 4 + [1.0] * 4))  # log2(1) = 0: sin 0, cos 1


def test_features_are_smooth_in_the_size():
    """A size never seen lies close to its neighbours, unlike a row of a table."""
    sizes = torch.tensor([[4.0, 30.0, 30.0], [4.0, 31.0, 30.0], [4.0, 120.0, 30.0]])
    near, far = (size_features(sizes)[[1, 2]] - size_features(sizes)[0]).norm(dim=1)
    assert 0 < near < 0.1 * far


def test_unknown_quantities_are_zero():
    sizes = torch.tensor([[2, 3, 4], [5, 3, 4]])
    blocks = size_features(sizes, octaves=3, use_frames=False).view(2, 6, 6)
    assert (
        torch.equal(blocks[0], blocks[1])
        and (blocks[:, 4:] == 0).all()
        and (blocks[:, :4] != 0).any(-1).all()
    )
    rated = size_features(sizes, torch.tensor([0.0, 24.0]), octaves=3).view(2, 6, 6)
    assert (rated[0, 5] == 0).all() and (rated[1, 5] != 0).any() and (rated[:, 4] != 0).any(-1).all()
    assert size_features(torch.tensor([[0, 0, 7]])).isfinite().all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_part_of_the_size_changes_the_embedding(axis):
    sizes = [[4, 6, 8]]
    larger = [list(sizes[0])]
    larger[0][axis] *= 2
    assert not torch.allclose(size_features(torch.tensor(sizes)), size_features(torch.tensor(larger)))
    a, b = (size_features(torch.tensor(sizes), fps) for fps in (8.0, 24.0))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [0, 4])
def test_opcheck(dtype, segments, backend):
    layout = LAYOUT if segments else PackedLayout.from_lengths([])
    x = make_tensor(6, 40, dtype=dtype).T.requires_grad_()
    embedding = make_tensor(segments, 6, seed=1).requires_grad_()
    torch.library.opcheck(
        op._segment_add_fwd.op, (x, embedding, layout.cu_seqlens, layout.num_tokens, backend)
    )
    arguments = (
        x.detach()[:1].expand(40, 6),
        embedding.detach(),
        layout.cu_seqlens,
        layout.num_tokens,
        backend,
    )
    torch.library.opcheck(op._segment_add_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_graph_for_any_packing(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def step(run, layout, inputs):
        return run(inputs[0], layout, *inputs[1:]).square().sum()

    def embed(x, layout, *weights):
        return size_aware_embedding(x, layout, *weights, backend=backend)

    compiled = torch.compile(embed, backend=counter, fullgraph=True)
    for grid in ([[2, 3, 2], [1, 4, 4]], [[1, 5, 5], [0, 1, 1], [2, 2, 2]], [[1, 2, 1]] * 4):
        layout = PackedLayout.from_grid_thw(grid)
        inputs = [x.requires_grad_() for x in make_inputs(layout.num_tokens)]
        for x in (inputs[0], layout.cu_seqlens, layout.sizes, layout.positions):
            torch._dynamo.mark_dynamic(x, 0)
        actual, expected = (step(run, layout, inputs) for run in (compiled, embed))
        for a, b in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, *w: (runner("torch")(x, *w)[0] * 0,),
        lambda x, *w: (x,),
        lambda x, *w: (torch.cat([runner("torch")(x, *w)[0][:-1], x[-1:] * 0]),),
        lambda x, *w: runner("torch", PackedLayout.from_grid_thw([[3, 2, 4], [1, 1, 1], [2, 3, 2]]))(x, *w),
        lambda x, *w: runner("torch")(x, *(p.detach() for p in w)),
    ],
    ids=["zeros", "identity", "dropped last token", "swapped segments", "no weight gradient"],
)
def test_canary_the_comparison_rejects(wrong):
    with pytest.raises(ToleranceError):
        check_against_reference(wrong, runner("reference"), make_inputs())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(3, 10), "x has 3 rows, fewer than"),
        (0, torch.zeros(37, 10, dtype=torch.int32), "x must be float"),
        (1, torch.zeros(7, 35), "w1 must"),
        (1, torch.zeros(7, 0), "w1 must"),
        (2, torch.zeros(8), "b1 must"),
        (3, torch.zeros(7, 10), "w2 must"),
        (4, torch.zeros(11), "b2 must"),
    ],
)
def test_a_bad_tensor_is_named(index, value, message):
    inputs = make_inputs()
    inputs[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        runner("torch")(*inputs)


def test_a_bad_option_is_named():
    x, *weights = make_inputs()
    with pytest.raises(ValueError, match="fps must be a number or"):
        size_aware_embedding(x, LAYOUT, *weights, fps=torch.ones(3))
    with pytest.raises(ValueError, match="sizes must be"):
        size_features(torch.ones(3))
    with pytest.raises(TypeError, match="layout must be a PackedLayout"):
        size_aware_embedding(x, [5], *weights)
    with pytest.raises(ValueError, match="backend must be one of"):
        size_aware_embedding(x, LAYOUT, *weights, backend="fast")
