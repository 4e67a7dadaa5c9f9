"""The suite towers, in small sizes: the oracle, the providers, and that each check can fail."""

from dataclasses import replace

import pytest
import torch

from benchmarks.core import Status, Workload
from benchmarks.problems.towers import FAMILIES, Tower
from benchmarks.providers import providers_of
from benchmarks.race import Rules, race
from benchmarks.verify import verify
from benchmarks.workloads.towers import images, workloads
from tests.marks import cpp
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.integrations import attention
from vot_kernels.testing import ToleranceError

CPU = torch.device("cpu")
SMALL = {w.name: w.problem.small() for w in workloads("cpu")}
PROVIDERS = {p.name: p for p in providers_of("towers")}


@pytest.mark.parametrize("problem", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(
    "name", [pytest.param("vot-kernels cpp", marks=cpp), "vot-kernels torch", "sdpa", "eager"]
)
def test_providers_agree_with_the_oracle(name, problem):
    assert PROVIDERS[name].refuses(problem, torch.float32, CPU, "both") is None
    verify(PROVIDERS[name], problem, torch.float32, CPU, gradients=True)


def test_what_cannot_run_here_says_why():
    refused = {
        name: p.refuses(SMALL["clip-siglip2-d64"], torch.float32, CPU, "both")
        for name, p in PROVIDERS.items()
    }
    assert bool(refused.pop("vot-kernels cpp")) == bool(why_not_cpp("cpu"))
    assert {name for name, why in refused.items() if why} == {"vot-kernels triton", "flash_attention_2"}


@pytest.mark.parametrize("wrong", ["one segment", "gradient"])
def test_a_wrong_attention_gets_no_figure(wrong, monkeypatch):
    op = attention.flash_attn_varlen_func

    def broken(q, k, v, cu_q, cu_k, *lengths, **options):
        if wrong == "one segment":
            cu_q, cu_k = cu_q[[0, -1]], cu_k[[0, -1]]
        out = op(q, k, v, cu_q, cu_k, *lengths, **options)
        return out.detach() + 0.99 * (out - out.detach()) if wrong == "gradient" else out

    monkeypatch.setattr(attention, "flash_attn_varlen_func", broken)
    workload = Workload("towers", "wrong", SMALL["images-qwen3-vl-d72"], torch.float32, "cpu")
    chosen = [PROVIDERS[name] for name in ("vot-kernels torch", "sdpa")]
    outcomes = race(workload, "both", chosen, Rules(rounds=1, input_sets=1))
    assert outcomes["vot-kernels torch"].status is Status.MISMATCH
    assert outcomes["sdpa"].status is Status.TIMED and len(outcomes["sdpa"].whole_s) == 1


def test_padding_of_a_batch_must_not_be_seen():
    problem = SMALL["images-siglip2-d64"]
    right = PROVIDERS["sdpa"]

    def unmasked(problem, arguments, *inputs):
        shapes = arguments["spatial_shapes"]
        everything = arguments["pixel_attention_mask"] * 0 + 1
        whole = right.run(problem, arguments | {"pixel_attention_mask": everything}, *inputs)
        parts = whole.split(everything.shape[1])
        return torch.cat([part[:n] for part, n in zip(parts, shapes.prod(1).tolist(), strict=True)])

    with pytest.raises(ToleranceError, match="output 0"):
        verify(replace(right, run=unmasked), problem, torch.float32, CPU, gradients=False)


@pytest.mark.parametrize("head_dim", FAMILIES)
def test_rows_of_the_oracle_are_those_of_the_whole(head_dim):
    sizes = ((1, 4, 6), (1, 26, 40), (1, 26, 40), (2, 2, 4))
    problem = Tower(head_dim, sizes, heads=2)
    assert problem.verified == [0, 1, 3]
    inputs = problem.inputs(torch.float32, CPU)
    rows = problem.rows(inputs)
    with torch.no_grad():
        some, whole = (problem.oracle(inputs, chosen) for chosen in (rows, None))
    assert len(whole) == problem.size // FAMILIES[head_dim].merged
    assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_cover_the_head_sizes_on_images_and_on_a_clip(device):
    found = {w.name: w for w in workloads(device)}
    assert {w.problem.head_dim for w in found.values()} == {64, 72, 80, 128}
    for name, workload in found.items():
        problem = workload.problem
        config = problem.config()
        heads = getattr(config, "num_heads", None) or config.num_attention_heads
        assert config.hidden_size // heads == problem.head_dim
        assert f"{problem.layers} layer" in problem.describe() and problem.layers <= 2
        frames = [t for t, _, _ in problem.sizes]
        count = 32 if device == "cpu" else 64
        assert frames == [1] * count if name.startswith("images") else frames == [32]
        assert workload.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
        assert workload.directions == ("forward", "both")


def test_images_are_of_many_sizes():
    sizes = images(64, 16)
    assert len({y * x for _, y, x in sizes}) >= 20 and len(set(sizes)) >= 30
    assert all(2 <= side <= 16 and side % 2 == 0 for _, *sides in sizes for side in sides)
    assert {side for _, *sides in sizes for side in sides} == set(range(2, 17, 2))


def test_a_tower_has_the_widths_of_the_released_model():
    shapes = Tower(72, ((1, 2, 2),), layers=1).shapes()
    assert shapes["blocks.0.attn.qkv.weight"] == (3 * 1152, 1152)
    assert shapes["blocks.0.mlp.linear_fc1.weight"] == (4304, 1152)
    assert not any(name.startswith("merger") for name in shapes)


def test_red_gpu_tests_leave_ours_without_a_figure():
    workload = Workload("towers", "gated", SMALL["clip-qwen3-vl-d72"], torch.float32, "cpu")
    rules = Rules(rounds=1, gate=lambda op: f"{op} is red")
    outcome = race(workload, "forward", [PROVIDERS["vot-kernels torch"]], rules)["vot-kernels torch"]
    assert outcome.status is Status.GATED and outcome.reason == "flash_attention is red"
