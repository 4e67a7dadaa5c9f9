"""The memory-bound kernels move hardly more bytes than they must: each input read once, each output written once.

The kernels run on Triton's interpreter with the blocks that are shipped for sm_90, and every load and store is counted,
as are the inputs and outputs of what PyTorch does around them, such as the second stage of a sum.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.problems.fused import (
    DenseResidual,
    DenseResidualNorm,
    NormalisePatches,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)
from tests.marks import interpreted
from vot_kernels.ops import launch
from vot_kernels.ops.dispatch import load
from vot_kernels.ops.pack_patches.normalise import Normalise

pytest.importorskip("triton")

MOST = 1.05
FREE = ("empty", "new_empty", "view", "_unsafe_view", "select", "expand", "unsqueeze", "detach", "lift_fresh")
DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize


class Traffic(TorchDispatchMode):
    """Counts the bytes that kernels on the interpreter and PyTorch's operations read and write."""

    def __init__(self, monkeypatch):
        super().__init__()
        from triton.runtime import interpreter

        self.bytes = 0
        builder = type(interpreter.interpreter_builder)
        load_elements, store_elements = builder.create_masked_load, builder.create_masked_store

        def counted_load(builder, pointers, mask, *rest):
            found = load_elements(builder, pointers, mask, *rest)
            self.bytes += int(mask.data.sum()) * found.data.itemsize
            return found

        def counted_store(builder, pointers, value, mask, *rest):
            self.bytes += int(mask.data.sum()) * value.data.itemsize
            return store_elements(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        run_kernel, self.launching = launch.launch, False

        def launched(*args, **arguments):
            self.launching = True  # what PyTorch does now is the interpreter's own
            run_kernel(*args, **arguments)
            self.launching = False

        monkeypatch.setattr(launch, "launch", launched)
        monkeypatch.setattr(launch, "target_arch", lambda device: "sm_90")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.launching and function.overloadpacket.__name__ not in FREE:
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


@pytest.fixture
def traffic(monkeypatch):
    return Traffic(monkeypatch)


def dense_residual(direction):
    problem = DenseResidual(64, width=256, states=5)
    *states, weights = problem.inputs(DTYPE, torch.device("cpu"))
    backend = load("dense_residual", "triton")
    if direction == "forward":
        return problem, lambda: backend.forward(states, weights)
    return problem, lambda: backend.backward(states[0], states, weights)


def dense_residual_norm(direction):
    problem = DenseResidualNorm(64, width=768, states=8)
    *states, weights, norm = problem.inputs(DTYPE, torch.device("cpu"))
    backend = load("dense_residual", "triton")
    if direction == "forward":
        return problem, lambda: backend.forward_norm(states, weights, norm, problem.eps)
    return problem, lambda: backend.backward_norm(
        states[0], states[1], states, weights, norm, states[2], problem.eps
    )


def rope_qk_norm(direction):
    problem = RopeQkNorm(((2, 4, 8),))
    q, k, *weights = problem.inputs(DTYPE, torch.device("cpu"))
    options = (problem.layout().positions, *weights, problem.theta, problem.sections, problem.eps)
    backend = load("rope_qk_norm", "triton")
    backend._frequencies(problem.theta, tuple(problem.sections), q.device)  # made once for all layers
    if direction == "forward":
        return problem, lambda: backend.forward(q, k, *options)
    return problem, lambda: backend.backward(q, k, q, k, *options)


def size_aware_embedding(direction):
    problem = SizeAwareEmbedding(((1, 16, 24), (1, 16, 16)), width=256)
    x, layout = problem.inputs(DTYPE, torch.device("cpu"))[0], problem.layout()
    embedding = torch.ones(2, problem.width)
    backend = load("size_aware_embedding", "triton")
    run = backend.forward if direction == "forward" else backend.backward
    return problem, lambda: run(x, embedding, layout.cu_seqlens, problem.size)


def pack_patches(direction):
    problem = PackPatches(((64, 96), (32, 64)))
    images = problem.inputs(DTYPE, torch.device("cpu"))
    backend, nothing = load("pack_patches", "triton"), Normalise([], [], DTYPE)
    if direction == "forward":
        return problem, lambda: backend.forward(images, problem.patch_size, 1, nothing)
    values = torch.ones(problem.size, 3 * problem.patch_size**2, dtype=DTYPE)
    sizes = [n for height, width in problem.sizes for n in (0, height, width)]
    return problem, lambda: backend.backward(values, sizes, problem.patch_size, 1, nothing, DTYPE)


def normalise_patches(direction):
    problem = NormalisePatches(((64, 96), (32, 64)))
    *images, _, _ = problem.inputs(DTYPE, torch.device("cpu"))
    normalise = Normalise(problem.mean, problem.std, DTYPE)
    return problem, lambda: load("pack_patches", "triton").forward(images, problem.patch_size, 1, normalise)


CASES = [
    (make, direction)
    for make in (dense_residual, dense_residual_norm, rope_qk_norm, size_aware_embedding, pack_patches)
    for direction in ("forward", "backward")
] + [(normalise_patches, "forward")]


@interpreted
@pytest.mark.parametrize(("make", "direction"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_hardly_more_than_the_minimum_is_moved(make, direction, traffic):
    problem, run = make(direction)
    with traffic:
        run()
    least = problem.work(direction, ITEM).bytes
    assert least <= traffic.bytes <= MOST * least, f"{traffic.bytes / least:.3f} times the minimum"


@interpreted
def test_a_copy_that_nobody_needs_is_counted(traffic):
    problem, run = dense_residual("forward")
    with traffic:
        run()
        torch.ones(64, 256, dtype=DTYPE).clone()
    assert traffic.bytes > MOST * problem.work("forward", ITEM).bytes
