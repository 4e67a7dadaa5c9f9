"""CUDA graphs and torch.compile: forward and backward of the attention ops without a host sync or a recompile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vot_kernels import PackedLayout, hybrid_attention, linear_attention, packed_attention
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.testing import make_qkv, make_tensor

OP = "hybrid_attention"
pytestmark = pytest.mark.gpu

CALLS = {
    "hybrid": lambda q, k, v, beta, layout, backend: hybrid_attention(
        q, k, v, layout, beta=beta, backend=backend
    ),
    "hybrid causal": lambda q, k, v, beta, layout, backend: hybrid_attention(
        q, k, v, layout, window=0, beta=beta, causal="token", backend=backend
    ),
    "packed": lambda q, k, v, beta, layout, backend: packed_attention(q, k, v, layout, backend=backend),
    "linear": lambda q, k, v, beta, layout, backend: linear_attention(q, k, v, layout, backend=backend),
    "linear causal": lambda q, k, v, beta, layout, backend: linear_attention(
        q, k, v, layout, causal=True, backend=backend
    ),
}


def make_leaves(tokens, device):
    leaves = [*make_qkv(tokens, 4, 64, kv_heads=2, dtype=torch.bfloat16, device=device)]
    return [x.requires_grad_() for x in (*leaves, make_tensor(4, device=device, seed=5))]


def results(call, leaves, grad, layout, backend):
    """The output, and the gradients of the leaves; zeros where an op has no such argument."""
    out = call(*leaves, layout, backend)
    return [out, *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_replays_on_new_numbers(name, device):
    """Only kernels are captured: no host sync, and new contents of the same buffers are honoured."""
    if device.type != "cuda" or describe_backends(device, torch.bfloat16)[OP]["triton"]:
        pytest.skip("there is no Triton kernel to capture")
    layout = PackedLayout.from_lengths((300, 0, 45), group_size=64, device=device)
    leaves = make_leaves(345, device)
    grad = make_tensor(345, 4, 64, seed=7, dtype=torch.bfloat16, device=device)
    step = (CALLS[name], leaves, grad, layout, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled here, not while capturing
        results(*step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(*step)
    with torch.no_grad():
        for x in (*leaves, grad):
            x.normal_()
    graph.replay()
    for a, b in zip(captured, results(*step), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("name", ["hybrid", "linear causal"])
def test_compiles_once_for_all_packings(name, backend, device):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True, dynamic=True)
    # PyTorch takes sizes that are equal in the first call to be equal always.
    for lengths in [(5, 6, 20, 1, 2), (700,), (3, 0, 1, 90), (2,) * 11]:
        layout = PackedLayout.from_lengths(lengths, group_size=8, device=device)
        leaves = make_leaves(sum(lengths), device)
        grad = make_tensor(sum(lengths), 4, 64, seed=7, dtype=torch.bfloat16, device=device)
        step = (leaves, grad, layout, backend)
        for a, b in zip(results(compiled, *step), results(CALLS[name], *step), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
