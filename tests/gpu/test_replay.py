"""Repeated launches on a GPU: the results of whole calls, on each stream, and in a graph captured afterwards."""

from functools import partial

import pytest
import torch

from tests.ops.test_replay import CALLS, call_in_full, calls, layout, results
from vot_kernels import PackedLayout, hybrid_attention
from vot_kernels.testing import make_qkv

OP = "hybrid_attention"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CALLS)
def test_other_data_give_the_results_of_a_whole_call(name, backend, device, monkeypatch):
    at, others = layout(device), []
    for n in range(4):
        torch.manual_seed(n)
        call, tensors = next((call, tensors) for known, call, tensors in calls(device) if known == name)
        others.append(call)  # whose memory no later one gets
        run = partial(results, call, tensors, at, backend)
        for x, y in zip(run(), call_in_full(monkeypatch, run), strict=True):
            # A backward on a GPU may sum in any order.
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_streams_and_graphs_after_the_record(backend, device, monkeypatch):
    if torch.device(device).type != "cuda":
        pytest.skip("streams and graphs are those of CUDA")
    at = PackedLayout.from_lengths((300, 212), group_size=16, device=device)
    q, k, v = make_qkv(512, 4, 64, dtype=torch.bfloat16, device=device)

    def call():
        return hybrid_attention(q, k, v, at, window=1, backend=backend)

    wanted = call_in_full(monkeypatch, call)
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [call() for _ in range(4)]
        torch.cuda.synchronize()
        assert all(torch.equal(x, wanted) for x in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        q.copy_(k)
    graph.replay()
    assert torch.equal(captured, call_in_full(monkeypatch, call))
