"""The suites fused, encoder and video: oracles, providers, counters, and that each check can fail."""

from dataclasses import replace

import pytest
import torch

from benchmarks.core import Provider, Status, Workload, as_outputs, ops_of
from benchmarks.problems.encoder import Encoder, served_by
from benchmarks.problems.fused import (
    ALL_ROWS,
    DenseResidual,
    DenseResidualNorm,
    NormalisePatches,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)
from benchmarks.problems.video import CLIPS, DecodeAndPack
from benchmarks.providers import encoder as encoder_providers
from benchmarks.providers import fused as fused_providers
from benchmarks.providers import providers_of
from benchmarks.providers import video as video_providers
from benchmarks.race import Rules, race
from benchmarks.verify import verify
from benchmarks.workloads import encoder as encoder_workloads
from benchmarks.workloads import fused as fused_workloads
from benchmarks.workloads import video as video_workloads
from vot_kernels.ops.dispatch import OPS, describe_backends
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import ToleranceError

CPU = torch.device("cpu")
FUSED = {
    "dense_residual": DenseResidual(60, width=8, states=3),
    "dense_residual with a norm": DenseResidualNorm(60, width=8, states=3),
    "rope_qk_norm": RopeQkNorm(((2, 3, 4), (1, 5, 6)), heads=4, kv_heads=2, head_dim=12),
    "size_aware_embedding": SizeAwareEmbedding(((1, 3, 4), (2, 2, 5)), width=8, hidden=6, octaves=2),
    "pack_patches": PackPatches(((8, 12), (4, 4), (4, 20)), patch_size=4),
}
NORMALISED = NormalisePatches(((8, 12), (4, 4), (4, 20)), patch_size=4)
LARGE = {
    "dense_residual": DenseResidual(ALL_ROWS + 5, width=3, states=2),
    "rope_qk_norm": RopeQkNorm(((2, 33, 32), (1, 5, 6)), heads=2, kv_heads=1, head_dim=4),
    "size_aware_embedding": SizeAwareEmbedding(
        ((1, 40, 40), (1, 1, 1), (1, 25, 24)), width=3, hidden=4, octaves=1
    ),
    "pack_patches": PackPatches(((80, 104), (4, 4), (20, 28)), patch_size=2),
    "normalised patches": NormalisePatches(((80, 104), (4, 4), (20, 28)), patch_size=2),
}
MIXED = Encoder("nano", ((1, 3, 4), (1, 1, 2), (1, 2, 2)))
CLIP = Encoder("nano", ((4, 2, 3),), attention="hybrid")
PROVIDERS = (fused_providers, encoder_providers, video_providers)
SUITES = {"fused": fused_workloads, "encoder": encoder_workloads, "video": video_workloads}


def may_run(provider: Provider, problem, direction: str = "both") -> bool:
    """Whether it solves the problem here; compiled providers are left to the suite itself."""
    problem = provider.solves(problem)
    refused = provider.missing() or provider.refuses(problem, torch.float32, CPU, direction)
    return provider.quick_size > 0 and not refused


def accepted(providers, problems) -> list:
    return [
        pytest.param(p, problem, id=f"{p.name}-{problem.op}-{problem.size}")
        for problem in problems
        for p in providers
        if may_run(p, problem)
    ]


@pytest.mark.parametrize(
    ("provider", "problem"), accepted(fused_providers.PROVIDERS, [*FUSED.values(), NORMALISED])
)
def test_fused_provider_agrees_with_the_oracle(provider, problem):
    verify(provider, problem, torch.float32, CPU, gradients=not isinstance(problem, NormalisePatches))


@pytest.mark.parametrize("problem", [*FUSED.values(), NORMALISED], ids=[*FUSED, "normalised patches"])
@pytest.mark.parametrize("name", ["vot-kernels torch", "fast PyTorch", "plain PyTorch"])
def test_fused_provider_agrees_in_bfloat16(name, problem):
    provider = next(p for p in fused_providers.PROVIDERS if p.name == name)
    verify(provider, problem, torch.bfloat16, CPU, gradients=not isinstance(problem, NormalisePatches))


@pytest.mark.parametrize("problem", LARGE.values(), ids=LARGE)
def test_rows_of_the_oracle_are_those_of_the_whole(problem):
    inputs = problem.inputs(torch.float64, CPU)
    rows = problem.rows(inputs)
    assert rows is not None and rows[0] == 0 and rows[-1] == problem.size - 1
    some, whole = (as_outputs(problem.oracle(inputs, chosen)) for chosen in (rows, None))
    for a, b in zip(some, whole, strict=True):
        assert torch.equal(a, b[rows])


@pytest.mark.parametrize("problem", LARGE.values(), ids=LARGE)
def test_small_twin_is_verified_whole(problem):
    small = problem.small()
    assert small.op == problem.op
    assert small.rows(small.inputs(torch.float32, CPU)) is None


@pytest.mark.parametrize("problem", [*FUSED.values(), MIXED, DecodeAndPack("digitworld", 4)])
def test_inputs_depend_on_the_seed_alone(problem):
    first, again, other = (problem.inputs(torch.float32, CPU, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def wrong(run) -> Provider:
    return Provider("wrong", ("fused",), run)


def test_a_wrong_output_or_gradient_is_found():
    problem = FUSED["rope_qk_norm"]
    good = next(p for p in fused_providers.PROVIDERS if p.name == "vot-kernels torch")

    def without_gradient_of_k(problem, prepared, *inputs):
        q, k = good.run(problem, problem.layout(), *inputs)
        return q, k.detach() + 0 * k

    def without_last_token(problem, prepared, *inputs):
        q, k = good.run(problem, problem.layout(), *inputs)
        return q, torch.cat([k[:-1], torch.zeros_like(k[-1:])])

    verify(wrong(without_gradient_of_k), problem, torch.float32, CPU, gradients=False)
    with pytest.raises(ToleranceError, match="gradient of input 1"):
        verify(wrong(without_gradient_of_k), problem, torch.float32, CPU, gradients=True)
    with pytest.raises(ToleranceError, match="output 1"):
        verify(wrong(without_last_token), problem, torch.float32, CPU, gradients=False)


def test_states_stored_as_a_stack_are_not_copied():
    *states, _ = DenseResidual(5, width=4, states=3).inputs(torch.float32, CPU)
    stack = fused_providers._StoredStates.apply(*states)
    assert stack.data_ptr() == states[0].data_ptr()
    assert torch.equal(stack, torch.stack(states))


@pytest.mark.parametrize(
    ("provider", "problem"),
    accepted(encoder_providers.PROVIDERS, [MIXED, CLIP, replace(MIXED, experts=False)]),
)
def test_encoder_provider_agrees_with_the_oracle(provider, problem):
    verify(provider, provider.solves(problem), torch.float32, CPU, gradients=True)


def test_encoder_providers_refuse_what_they_cannot_do():
    asked = {
        (p.name, name): p.refuses(p.solves(problem), torch.float32, CPU, "both")
        for p in encoder_providers.PROVIDERS
        for name, problem in (("mixed", MIXED), ("clip", CLIP))
    }
    assert asked["padded batch SDPA", "mixed"] is None
    assert "exact softmax" in asked["padded batch SDPA", "clip"]
    assert "exact softmax already" in asked["exact SDPA", "mixed"]
    assert asked["exact SDPA", "clip"] is None
    assert asked["one by one", "clip"] == "there is one clip alone"
    assert asked["vot-kernels triton", "mixed"]


def test_padding_that_is_not_masked_is_found():
    padded = next(p for p in encoder_providers.PROVIDERS if p.name == "padded batch SDPA")

    def unmasked(problem, padding, *inputs):
        return padded.run(problem, replace(padding, mask=None), *inputs)

    with pytest.raises(ToleranceError, match="output 0"):
        verify(replace(padded, run=unmasked), MIXED, torch.float32, CPU, gradients=False)


def test_verified_clips_of_an_encoder_are_independent_of_the_others():
    problem = Encoder("nano", ((1, 30, 40), (1, 30, 30), (1, 2, 3), (1, 25, 40), (1, 3, 3)))
    assert problem.verified == [0, 2, 4]
    pixels, *weights = problem.inputs(torch.float32, CPU)
    rows = problem.rows((pixels,))
    assert len(rows) == 1200 + 6 + 9
    mask = torch.ones(problem.size, dtype=torch.bool).index_fill(0, rows, False)
    with torch.no_grad():
        clean = problem.oracle((pixels, *weights), rows)
        poisoned = problem.oracle((pixels.masked_fill(mask[:, None], torch.nan), *weights), rows)
    assert clean.shape == (len(rows), 96)
    assert torch.equal(clean, poisoned)


def test_served_by_restricts_every_op_and_restores():
    before = describe_backends(CPU)
    with pytest.raises(RuntimeError), served_by("reference"):
        inside = describe_backends(CPU)
        assert all(inside[op]["torch"] and not inside[op]["reference"] for op in OPS)
        raise RuntimeError
    assert describe_backends(CPU) == before


def test_every_op_of_an_encoder_is_gated():
    assert set(ops_of(MIXED)) < set(OPS)
    assert set(ops_of(MIXED)) - set(ops_of(replace(MIXED, experts=False))) == {"aoe"}
    ours = next(p for p in encoder_providers.PROVIDERS if p.name == "vot-kernels torch")
    workload = Workload("encoder", "gated", MIXED, torch.float32, "cpu")
    rules = Rules(rounds=1, gate=lambda op: f"{op} is red" if op in ("aoe", "rope_qk_norm") else None)
    outcome = race(workload, "forward", [ours], rules)[ours.name]
    assert outcome.status == Status.GATED
    assert outcome.reason == "aoe is red; rope_qk_norm is red"


def test_encoder_work_counts_the_clips_and_the_backward():
    single, double = (Encoder("nano", ((2, 3, 4),) * n, "hybrid") for n in (1, 2))
    work = {d: single.work(d, 4) for d in ("forward", "backward", "both")}
    assert double.work("forward", 4).flops == 2 * work["forward"].flops
    assert work["both"].flops == 3 * work["forward"].flops > 0
    assert work["both"].bytes == work["forward"].bytes + work["backward"].bytes


def test_fused_work_at_one_size():
    assert DenseResidual(10, width=4, states=3).work("forward", 2).bytes == (3 + 1) * 40 * 2
    assert DenseResidual(10, width=4, states=3).work("backward", 2).bytes == (2 * 3 + 1) * 40 * 2
    assert FUSED["rope_qk_norm"].work("forward", 4).bytes == 2 * 54 * 6 * 12 * 4
    assert FUSED["pack_patches"].work("forward", 4).bytes == 2 * 3 * (96 + 16 + 80) * 4
    for problem in FUSED.values():
        works = [problem.work(d, 2) for d in ("forward", "backward", "both")]
        assert works[2].bytes == works[0].bytes + works[1].bytes
        assert works[2].flops == works[0].flops + works[1].flops


@pytest.mark.parametrize(
    "provider", [p for p in video_providers.PROVIDERS if not p.missing()], ids=lambda p: p.name
)
def test_video_provider_agrees_with_the_oracle(provider):
    problem = DecodeAndPack("digitworld", 7, patch_size=8)
    assert provider.refuses(problem, torch.float32, CPU, "forward") is None
    verify(provider, problem, torch.float32, CPU, gradients=False)


def test_a_frame_too_late_is_found():
    loop = next(p for p in video_providers.PROVIDERS if p.name == "PyAV loop")

    def late(path, indices):
        return video_providers._pyav("SLICE", path, [min(i + 1, 15) for i in indices])

    def run(problem, prepared, *inputs):
        return video_providers._peer(late, problem, prepared, *inputs)

    with pytest.raises(ToleranceError):
        verify(replace(loop, run=run), DecodeAndPack("digitworld", 4), torch.float32, CPU, gradients=False)


def test_video_clips_are_as_described():
    av = pytest.importorskip("av")
    for name, (frames, height, width) in CLIPS.items():
        try:
            path = DecodeAndPack(name, 1).path()
        except FileNotFoundError:
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.frames, stream.height, stream.width) == (frames, height, width)


def test_a_clip_that_is_not_there_is_refused_in_words(monkeypatch):
    def gone(self):
        raise FileNotFoundError("the clip is not installed")

    monkeypatch.setattr(DecodeAndPack, "path", gone)
    asked = {
        p.refuses(DecodeAndPack("bikes", 4), torch.float32, CPU, "forward") for p in video_providers.PROVIDERS
    }
    assert asked == {"the clip is not installed"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES)
def test_workloads(suite, device):
    found = list(SUITES[suite].workloads(device))
    assert len({w.name for w in found}) == len(found)
    assert {w.suite for w in found} == {suite}
    assert bool(any(w.quick for w in found)) == (device == "cpu" or suite == "video")
    assert {w.device for w in found} == {"cpu" if suite == "video" else device}
    for workload in found:
        problem = workload.problem
        assert problem.describe() and problem.size > 0
        assert problem.work("forward", workload.dtype.itemsize).bytes > 0
        assert any(p.ours for p in providers_of(suite))
        if isinstance(problem, Encoder) and problem.experts:
            assert workload.dtype == torch.float32, "rounding would choose other experts"


def test_provider_names_can_be_chosen_on_the_command_line():
    names = [p.name for module in PROVIDERS for p in module.PROVIDERS]
    assert not [name for name in names if "," in name], "--provider takes a list separated by commas"


def test_padding_is_known_from_the_grid():
    padding = encoder_providers._padding(MIXED, torch.float32, CPU)
    assert isinstance(padding.packed, PackedLayout)
    assert padding.rows.tolist() == [*range(12), 12, 13, *range(24, 28)]
    assert padding.mask.sum((1, 2, 3)).tolist() == [12, 2, 4]
    assert encoder_providers._padding(CLIP, torch.float32, CPU).mask is None
