"""The suite stream: the oracle, the providers, and that the check can fail."""

from dataclasses import replace

import pytest
import torch

from benchmarks.problems.stream import HybridStep
from benchmarks.providers import providers_of
from benchmarks.verify import verify
from benchmarks.workloads.stream import workloads
from tests.marks import cpp
from tests.rounding import nearly_equal
from vot_kernels.ops.hybrid_attention import hybrid_attention_step
from vot_kernels.testing import ToleranceError

CPU = torch.device("cpu")
PROVIDERS = {p.name: p for p in providers_of("stream")}
NAMES = [pytest.param("vot-kernels cpp", marks=cpp), "vot-kernels torch", "SDPA + torch linear"]


@pytest.mark.parametrize(
    "problem", [HybridStep(24), HybridStep(9, kv_heads=2, window=3)], ids=["full", "shared"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_providers_agree_with_the_oracle(name, dtype, problem):
    assert PROVIDERS[name].refuses(problem, dtype, CPU, "forward") is None
    verify(PROVIDERS[name], problem, dtype, CPU, gradients=False)


def test_the_oracle_is_the_op_of_a_whole_stream():
    problem = HybridStep(12, window=2)
    q, k, v, earlier_k, earlier_v, _, beta = problem.inputs(torch.float64, CPU)
    state = None
    for group in zip(earlier_k.split(12), earlier_v.split(12), strict=True):
        _, state = hybrid_attention_step(group[0], *group, state, window=1)
    far = state.far  # the first of the two, which the state below knows as its far part
    near_k, near_v = torch.cat([state.near[0].k, k]), torch.cat([state.near[0].v, v])
    one = HybridStep(12)
    expected, _ = one.oracle((q, k, v, near_k[:12], near_v[:12], far, beta), None)
    out, _ = hybrid_attention_step(q, k, v, state, window=1, beta=beta.double())
    assert nearly_equal(out, expected)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_result_is_noticed(wrong):
    right = PROVIDERS["SDPA + torch linear"]

    def run(*arguments):
        results = list(right.run(*arguments))
        results[wrong] = results[wrong] * 1.001
        return tuple(results)

    with pytest.raises(ToleranceError, match=f"output {wrong}"):
        verify(replace(right, run=run), HybridStep(24), torch.float32, CPU, gradients=False)


def test_only_the_forward_is_asked_for_and_only_on_cpus():
    assert all(w.directions == ("forward",) for w in workloads("cpu")) and not list(workloads("cuda"))
    for provider in PROVIDERS.values():
        assert "inference" in provider.refuses(HybridStep(24), torch.float32, CPU, "both")
