"""CUDA graphs and torch.compile: forward and backward of the ops without a host sync or a recompile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vot_kernels import (
    PackedLayout,
    aoe,
    dense_residual,
    hybrid_attention,
    linear_attention,
    moe,
    packed_attention,
    rope_qk_norm,
    size_aware_embedding,
)
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.testing import make_experts, make_moe, make_qkv, make_tensor

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


def check_replay(step, buffers):
    """Capture `step()`, put new numbers into the `buffers` it reads, and replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled here, not while capturing
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in buffers:
            x.normal_()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def skip_without_kernels(op, device):
    if device.type != "cuda" or describe_backends(device, torch.bfloat16)[op]["triton"]:
        pytest.skip("there is no Triton kernel to capture")


@pytest.mark.tested_on("Qwen3-VL#206")
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_replays_on_new_numbers(name, device):
    """Only kernels are captured: no host sync, and new contents of the same buffers are honoured."""
    skip_without_kernels(OP, device)
    layout = PackedLayout.from_lengths((300, 0, 45), group_size=64, device=device)
    leaves = make_leaves(345, device)
    grad = make_tensor(345, 4, 64, seed=7, dtype=torch.bfloat16, device=device)
    check_replay(lambda: results(CALLS[name], leaves, grad, layout, "triton"), [*leaves, grad])


@pytest.mark.parametrize("weighting", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("top_k", [2, 6])
def test_a_captured_aoe_replays_on_new_numbers(top_k, weighting, device):
    """New tokens choose other experts, so the loads differ from those at capture."""
    skip_without_kernels("aoe", device)
    x, *weights = make_experts(345, 96, 8, 32, 112, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in (x, *weights)]

    def step():
        y, aux = aoe(*leaves, top_k, weighting=weighting, return_aux=True, backend="triton")
        loss = y.float().square().mean() + aux.balance_loss
        return [y, aux.load, *torch.autograd.grad(loss, leaves)]

    check_replay(step, leaves[:1])


def test_a_captured_moe_replays_on_new_numbers(device):
    skip_without_kernels("moe", device)
    x, a, b, idx, w = make_moe(345, 96, 8, 112, dtype=torch.bfloat16, device=device)
    scores = make_tensor(345, 8, seed=11, device=device)
    leaves = [t.requires_grad_() for t in (x, a, b, w)]

    def step():
        y = moe(x, a, b, scores.topk(2).indices, w, backend="triton")
        return [y, *torch.autograd.grad(y.float().square().mean(), leaves)]

    check_replay(step, [x, scores])


def test_captured_memory_bound_ops_replay_on_new_numbers(device):
    skip_without_kernels("dense_residual", device)
    layout = PackedLayout.from_grid_thw([[2, 8, 9], [1, 3, 5]], device=device)
    tokens, options = layout.num_tokens, {"dtype": torch.bfloat16, "device": device}
    states = [make_tensor(tokens, 96, seed=i, **options).requires_grad_() for i in range(3)]
    mix, *norms = (make_tensor(n, seed=n, device=device).requires_grad_() for n in (3, 32, 32))
    shapes = ((24, 36), (24,), (96, 24), (96,))
    layers = [make_tensor(*shape, seed=i, device=device).requires_grad_() for i, shape in enumerate(shapes)]

    def step():
        x = dense_residual(states, mix, backend="triton")
        x = size_aware_embedding(x, layout, *layers, backend="triton")
        heads = x.view(tokens, 3, 32)
        names = dict(zip(("q_weight", "k_weight"), norms, strict=True))
        outs = rope_qk_norm(heads, heads, layout.positions, **names, backend="triton")
        leaves = [*states, mix, *norms, *layers]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])]

    check_replay(step, states)


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
