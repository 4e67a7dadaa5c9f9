"""The suites `aoe` and `moe`: oracle, problems, providers (absent ones as stubs of their signature), counters."""

import inspect
import sys
from dataclasses import replace
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import counters
from benchmarks.core import Provider
from benchmarks.problems.experts import CLEAR, AoE, MoE
from benchmarks.providers import experts, experts_peers, providers_of
from benchmarks.verify import verify, verify_on
from benchmarks.workloads import experts as workloads_experts
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.nn.autonomy_of_experts import matched_hidden
from vot_kernels.ops.moe.reference import moe
from vot_kernels.testing import ToleranceError, make_tensor

CPU = torch.device("cpu")
SMALL_AOE = AoE(tokens=96, dim=32, experts=4, top_k=2, rank=16, d_ffn=24).small()
SMALL_MOE = MoE(tokens=96, dim=32, hidden=16, experts=4, top_k=2, skew=0.5)


def named(name: str, suite: str) -> Provider:
    return next(p for p in providers_of(suite) if p.name == name and p.run is not None)


# The oracle


def test_moe_reference_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    w_gate_up, w_down = make_tensor(3, 4, 2, seed=1).double(), make_tensor(3, 2, 2, seed=2).double()
    idx, weights = (
        torch.tensor([[2, 0], [1, 2]]),
        torch.tensor([[0.7, 0.2], [-1.0, 0.5]], dtype=torch.float64),
    )
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for t in range(2):
        for j in range(2):
            expert = int(idx[t, j])
            gate, up = w_gate_up[expert, :2] @ x[t], w_gate_up[expert, 2:] @ x[t]
            hidden = gate * torch.sigmoid(gate) * up
            expected[t] += weights[t, j] * (w_down[expert] @ hidden)
    torch.testing.assert_close(moe(x, w_gate_up, w_down, idx, weights), expected, rtol=1e-12, atol=1e-12)


def test_moe_reference_is_differentiable_in_all_but_the_ids():
    x, w_gate_up, w_down, idx, weights = replace(SMALL_MOE, tokens=5, dim=3, hidden=2, experts=3).inputs(
        torch.float64, CPU
    )
    leaves = [t.requires_grad_() for t in (x, w_gate_up, w_down, weights)]
    assert torch.autograd.gradcheck(lambda a, b, c, w: moe(a, b, c, idx, w), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_reference_follows_the_layout_of_transformers(dtype):
    pytest.importorskip("transformers")
    inputs = SMALL_MOE.inputs(dtype, CPU)
    provider = named("transformers grouped_mm", "moe")
    eager = experts_peers._meta_experts("eager", SMALL_MOE.experts, SMALL_MOE.dim, SMALL_MOE.hidden, 2)
    assert eager.gate_up_proj.shape == inputs[1].shape and eager.down_proj.shape == inputs[2].shape
    verify_on(replace(provider, prepare=lambda *_: eager), SMALL_MOE, inputs, gradients=True)


def test_moe_reference_without_tokens_and_with_half_precision():
    problem = replace(SMALL_MOE, tokens=0)
    assert problem.oracle(problem.inputs(torch.float32, CPU), None).shape == (0, SMALL_MOE.dim)
    assert moe(*SMALL_MOE.inputs(torch.float16, CPU)).dtype == torch.float16


# Problems


@pytest.mark.parametrize(
    ("dim", "d_ffn", "rank", "hidden"),
    [(768, 3072, 256, 3840), (1280, 5120, 400, 6472), (1536, 768, 512, 768), (1536, 768, 128, 1048)],
)
def test_width_gives_equal_parameters(dim, d_ffn, rank, hidden):
    assert matched_hidden(dim, d_ffn, rank) == hidden
    parameters = rank * dim + hidden * (rank + 2 * dim)
    assert abs(parameters / (3 * dim * d_ffn) - 1) < 4e-3


@pytest.mark.parametrize("problem", [SMALL_AOE, SMALL_MOE], ids=["aoe", "moe"])
def test_inputs_depend_on_the_seed_alone(problem):
    first, again, other = (problem.inputs(torch.float32, CPU, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "problem",
    [SMALL_AOE, AoE(700, dim=64, experts=64, top_k=8, rank=32, d_ffn=64), AoE(40, 32, 3, 3, 16, 32)],
    ids=["small", "many experts", "all chosen"],
)
def test_verified_tokens_have_a_clear_selection(problem):
    inputs = problem.inputs(torch.bfloat16, CPU)
    rows = problem.rows(inputs)
    assert 0 < len(rows) <= 128 and len(rows.unique()) == len(rows) and int(rows.max()) < problem.tokens
    x, w_down = inputs[0].double(), inputs[1].double()
    ranked = torch.stack([(x[rows] @ w.T).norm(dim=-1) for w in w_down], 1).sort(-1, descending=True).values
    assert len(rows) >= 20
    if problem.top_k < problem.experts:
        last, following = ranked[:, problem.top_k - 1], ranked[:, problem.top_k]
        assert bool(((last - following) / last >= CLEAR).all())


def test_a_selection_without_clear_tokens_is_an_error_and_no_empty_check():
    x, w_down, *rest = SMALL_AOE.inputs(torch.float32, CPU)
    with pytest.raises(ValueError, match="clear selection"):
        SMALL_AOE.rows((x, w_down[:1].expand_as(w_down), *rest))


def test_loads_are_about_equal_and_skew_makes_them_unequal():
    problem = AoE(2048, dim=64, experts=8, top_k=2, rank=32, d_ffn=64)
    x, w_down, *_ = problem.inputs(torch.float32, CPU)
    chosen = torch.einsum("td,nrd->tnr", x, w_down).norm(dim=-1).topk(2, -1).indices
    load = torch.bincount(chosen.flatten(), minlength=8) / 2048
    assert load.min() > 0.6 * 2 / 8 and load.max() < 1.5 * 2 / 8
    even, skewed = (
        torch.bincount(MoE(2048, 8, 8, 8, 2, skew).inputs(torch.float32, CPU)[3].flatten())
        for skew in (0, 1.0)
    )
    assert even.max() / even.min() < 1.3 and skewed[0] > 4 * skewed[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_are_consistent(device):
    found = list(workloads_experts.workloads(device))
    names = [(w.suite, w.name) for w in found]
    assert len(set(names)) == len(names)
    for w in found:
        assert w.device == device and w.suite == w.problem.op
        small = w.problem.small()
        assert small.size <= 256 and small.small() == small
        assert type(small) is type(w.problem)
        assert all(p.problem.hidden % 8 == 0 for p in found)
    if device == "cpu":
        assert [w.problem for w in found if w.quick]
        readme = max((w.problem for w in found if w.suite == "aoe"), key=lambda problem: problem.size)
        assert (readme.tokens, readme.dim, readme.experts, readme.top_k, readme.rank) == (
            8192,
            512,
            16,
            2,
            64,
        )
    else:
        targets = {
            (w.problem.dim, w.problem.experts, w.problem.top_k, w.problem.rank)
            for w in found
            if w.suite == "aoe" and w.problem.tokens == 65536 and "backward" in w.directions
        }
        assert targets == {(768, 8, 2, 256), (1280, 8, 2, 400), (1536, 64, 8, 512), (1536, 64, 8, 128)}
        first = next(w.problem for w in found if w.suite == "moe")
        assert first == MoE(32768, dim=2048, hidden=768, experts=128, top_k=8)


# Providers that run here


def _runnable(suite: str, problem, dtype: torch.dtype) -> list[Provider]:
    return [
        p
        for p in (*experts.PROVIDERS, *experts_peers.PROVIDERS)
        if suite in p.suites
        and p.quick_size
        and not p.missing()
        and not p.refuses(p.solves(problem), dtype, CPU, "both")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("suite", "problem"),
    [("aoe", SMALL_AOE), ("aoe", replace(SMALL_AOE, experts=16, top_k=8)), ("moe", SMALL_MOE)],
    ids=["aoe", "aoe many", "moe"],
)
def test_providers_agree_with_the_oracle(suite, problem, dtype):
    providers = _runnable(suite, problem, dtype)
    wanted = {"masked loop", "gathered loop"} | ({"vot-kernels torch"} if suite == "aoe" else set())
    if hasattr(torch, "_grouped_mm"):
        wanted.add("torch._grouped_mm")
    assert wanted <= {p.name for p in providers}
    for provider in providers:
        solved = provider.solves(problem)
        verify_on(provider, solved, solved.inputs(dtype, CPU), gradients=True)


def test_full_size_is_verified_on_rows():
    problem = MoE(tokens=1100, dim=32, hidden=16, experts=4, top_k=2)
    assert len(problem.rows(problem.inputs(torch.float32, CPU))) == 128
    verify(named("gathered loop", "moe"), problem, torch.float32, CPU, gradients=True)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda problem, prepared, x, *w: experts.masked_aoe(problem, prepared, x, *w) * 1.01,
        lambda problem, prepared, *inputs: experts.masked_aoe(replace(problem, top_k=1), prepared, *inputs),
        lambda problem, prepared, x, down, up, p, o: experts.masked_aoe(problem, prepared, x, down, up, o, p),
        lambda problem, prepared, x, down, *w: experts.masked_aoe(problem, prepared, x, down.detach(), *w),
    ],
    ids=["scaled", "one expert less", "weights exchanged", "no gradient through the norms"],
)
def test_wrong_providers_are_caught(mistake):
    with pytest.raises(ToleranceError):
        verify_on(Provider("wrong", ("aoe",), mistake), SMALL_AOE, SMALL_AOE.inputs(torch.float32, CPU), True)


def test_gate_and_up_exchanged_is_caught():
    def run(problem, prepared, x, w_gate_up, w_down, idx, weights):
        return experts.gathered_moe(
            problem, prepared, x, w_gate_up.roll(problem.hidden, 1), w_down, idx, weights
        )

    with pytest.raises(ToleranceError):
        verify_on(Provider("wrong", ("moe",), run), SMALL_MOE, SMALL_MOE.inputs(torch.float32, CPU), False)


def test_compiled_reference_agrees_and_refuses_many_experts(monkeypatch):
    provider = named("torch.compile of the reference", "moe")
    assert not provider.quick_size
    assert "64" in provider.refuses(replace(SMALL_MOE, experts=64), torch.float32, CPU, "both")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    experts._compiled.cache_clear()
    try:
        for suite, problem in (("aoe", SMALL_AOE), ("moe", SMALL_MOE)):
            p = named("torch.compile of the reference", suite)
            verify_on(p, problem, problem.inputs(torch.float32, CPU), gradients=True)
    finally:
        experts._compiled.cache_clear()


def test_ours_serves_both_suites():
    providers = [p for p in providers_of("moe") if p.ours]
    assert [p.name for p in providers] == [f"vot-kernels {name}" for name in ("triton", "cpp", "torch")]
    for problem in (SMALL_AOE, SMALL_MOE):
        triton = named("vot-kernels triton", problem.op)
        assert "float64" in triton.refuses(problem, torch.float64, CPU, "forward")
    computing = [p for p in providers if p.refuses(SMALL_MOE, torch.float32, CPU, "forward") is None]
    assert [p.name for p in computing][-1] == "vot-kernels torch"
    assert ("vot-kernels cpp" in [p.name for p in computing]) == (why_not_cpp("cpu") is None)
    for provider in computing:
        verify_on(provider, SMALL_MOE, SMALL_MOE.inputs(torch.float32, CPU), gradients=True)
    context = named("equal-parameter MoE (vot-kernels)", "aoe")
    assert context.refuses(context.solves(SMALL_AOE), torch.float32, CPU, "forward") is None
    assert context.instead and context.solves(SMALL_AOE) == SMALL_AOE.plain()


@pytest.mark.parametrize(
    ("problem", "dtype", "message"),
    [
        (SMALL_MOE, torch.float64, "float64"),
        (replace(SMALL_MOE, dim=36), torch.bfloat16, "16 bytes"),
        (replace(SMALL_AOE, rank=12), torch.bfloat16, "16 bytes"),
        (replace(SMALL_AOE, rank=12), torch.float32, None),
    ],
)
def test_grouped_mm_refuses(problem, dtype, message):
    reason = experts.refuses_grouped(problem, dtype, CPU, "both")
    assert reason is None if message is None else message in reason


# Peers that are not here, or need a GPU: stubs with the parameters of the real thing


def _stub(monkeypatch, name: str, **members) -> ModuleType:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    module.__spec__ = SimpleNamespace(name=name, loader=None, origin="stub", submodule_search_locations=[])
    monkeypatch.setitem(sys.modules, name, module)
    return module


def _liger(monkeypatch) -> None:  # liger-kernel 0.8.5, liger_kernel/ops/fused_moe.py
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32 and gate_up_proj.shape[1] == 2 * down_proj.shape[2]
        return moe(x, gate_up_proj, down_proj, top_k_index, top_k_weights)

    _stub(monkeypatch, "liger_kernel")
    _stub(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=SimpleNamespace(apply=apply))


def _grouped(rows, weights, ends):
    """rows of each expert @ weights [experts, in, out]."""
    begins = [0, *ends.tolist()[:-1]]
    return torch.cat([rows[a:b] @ w for a, b, w in zip(begins, ends.tolist(), weights, strict=True)])


def _scattermoe(monkeypatch) -> None:  # scattermoe 0.3.0, scattermoe/parallel_experts.py
    def flatten_sort_count(expert_idxs, num_experts):
        ordered, order = torch.sort(expert_idxs.flatten())
        return ordered, order, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
        expert_biases=None, gates=None, grouped_in=False, grouped_out=False,
    ):  # fmt: skip
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        out = _grouped(rows, expert_weights, expert_offsets)
        if not grouped_out:
            out = out[sorted_scattered_idxs.argsort()]
        if gates is None:
            return out
        return (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)

    _stub(monkeypatch, "scattermoe", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)


def _sonicmoe(monkeypatch) -> None:  # sonic-moe 0.1.2.post1, sonicmoe/functional/__init__.py
    class ActivationType(Enum):
        SWIGLU = "swiglu"

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
        is_inference_mode_enabled=False, concat_layout=False,
    ):  # fmt: skip
        assert b1 is None and b2 is None and concat_layout and activation_type is ActivationType.SWIGLU
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert torch.equal(token_indices, token_indices.sort().values)
        assert w1.shape == (2 * w2.shape[1], x.shape[1], E) and w2.shape == (x.shape[1], w2.shape[1], E)
        for w in (w1, w2):
            assert w.stride(2) > w.stride(0) > w.stride(1) == 1
        assert is_inference_mode_enabled is not torch.is_grad_enabled()
        k = len(router_scores) // len(x)
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        scores = router_scores.float().view(-1, k)
        return moe(x, w1, w2, expert_indices.view(-1, k), scores), expert_indices.bincount(minlength=E)

    _stub(monkeypatch, "sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    _stub(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)


def _moe_ops(monkeypatch) -> None:  # moe-ops 0.1.0, moe_ops/{permute,grouped_gemm,unpermute}_ops.py
    def permute(input, indices, num_out_tokens=0, E=None):
        assert indices.dtype == torch.int32
        tokens, k = indices.shape
        order = indices.flatten().sort(stable=True).indices
        place = order.argsort().view(tokens, k)
        counts = indices.flatten().bincount(minlength=E)
        return input[order // k], place.T.flatten().int(), F.pad(counts.cumsum(0), (1, 0)).int()

    def grouped_gemm(A, B, offsets, trans_b=True):
        return _grouped(A, B.transpose(1, 2) if trans_b else B, offsets[1:])

    def unpermute(input, row_id_map, prob, num_tokens, num_topK, max_tokens=-1):
        rows = input[row_id_map.view(num_topK, num_tokens).T.long()]
        return (rows.float() * prob[..., None].float()).sum(1).to(input.dtype)

    _stub(monkeypatch, "moe_ops", permute=permute, grouped_gemm=grouped_gemm, unpermute=unpermute)


STUBS = {"Liger fused MoE": _liger, "ScatterMoE": _scattermoe, "SonicMoE": _sonicmoe, "moe-ops": _moe_ops}


@pytest.mark.parametrize("name", STUBS)
def test_absent_peers_through_stubs_of_their_signature(name, monkeypatch):
    provider = named(name, "moe")
    assert provider.refuses(SMALL_MOE, torch.bfloat16, CPU, "both") == "needs a CUDA device"
    STUBS[name](monkeypatch)
    if name != "ScatterMoE":
        assert provider.missing() is None
    for gradients in (False, True):
        verify_on(provider, SMALL_MOE, SMALL_MOE.inputs(torch.bfloat16, CPU), gradients)


def test_peers_refuse_what_their_kernels_do_not_take(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert "sm_90" in named("SonicMoE", "moe").refuses(SMALL_MOE, torch.bfloat16, cuda, "both")
    assert "float32" in named("Liger fused MoE", "moe").refuses(SMALL_MOE, torch.float32, cuda, "both")
    moe_ops = named("moe-ops", "moe")
    assert moe_ops.refuses(SMALL_MOE, torch.bfloat16, cuda, "both") is None
    assert "power of two" in moe_ops.refuses(replace(SMALL_MOE, experts=6), torch.bfloat16, cuda, "both")
    large = MoE(32768, dim=2048, hidden=768, experts=128, top_k=8)
    batched = named("transformers batched_mm", "moe")
    assert "gather" in batched.refuses(large, torch.bfloat16, cuda, "forward")
    assert batched.refuses(replace(large, tokens=64), torch.bfloat16, cuda, "forward") is None
    assert experts.refuses_grouped(large, torch.bfloat16, cuda, "both") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "sm_80" in experts.refuses_grouped(large, torch.bfloat16, cuda, "both")


def test_scattermoe_is_imported_from_the_folder_that_is_named(monkeypatch, tmp_path):
    provider = named("ScatterMoE", "moe")
    monkeypatch.delenv(experts_peers.SCATTERMOE, raising=False)
    assert experts_peers.SCATTERMOE in provider.missing()
    monkeypatch.setenv(experts_peers.SCATTERMOE, str(tmp_path))
    assert str(tmp_path) in provider.missing()
    (tmp_path / "scattermoe").mkdir()
    (tmp_path / "scattermoe" / "parallel_experts.py").write_text("")
    (tmp_path / "scattermoe" / "__init__.py").write_text("from . import parallel_experts\n")
    assert provider.missing() is None
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "scattermoe", raising=False)
    try:
        module = experts_peers._import_scattermoe()
        assert module.__file__.startswith(str(tmp_path)) and sys.path == before
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == "scattermoe"]:
            del sys.modules[key]


def test_providers_have_one_name_per_suite_and_import_nothing_foreign():
    for suite in ("aoe", "moe"):
        names = [p.name for p in providers_of(suite)]
        assert len(set(names)) == len(names) and names[0].startswith("vot-kernels")
    source = inspect.getsource(experts_peers)
    for package in ("transformers", "liger_kernel", "scattermoe", "sonicmoe", "moe_ops"):
        assert f"\nimport {package}" not in source and f"\nfrom {package}" not in source


# Counters, against counts by hand


def test_aoe_work_by_hand():
    problem = AoE(tokens=10, dim=8, experts=4, top_k=2, rank=2, d_ffn=6)
    assert problem.hidden == 8  # (3·8·6 - 2·8) / (2 + 16) = 7.1
    # forward: caches 10·4·2·8 = 640, bodies 10·2·8·(2 + 8 + 8) = 2880 multiply-adds
    forward = counters.aoe(problem, "forward", 2)
    assert forward.flops == 2 * (640 + 2880)
    # weights: 4·(2·8 + 8·2 + 8·8 + 8·8) = 640 numbers; x and y 80 each
    assert forward.bytes == 2 * (640 + 160)
    backward = counters.aoe(problem, "backward", 2)
    # caches of the chosen: 10·2·2·8 = 320, twice; bodies twice
    assert backward.flops == 2 * (2 * 320 + 2 * 2880)
    assert backward.bytes == 2 * (2 * 640 + 240)
    both = counters.aoe(problem, "both", 2)
    assert (both.flops, both.bytes) == (forward.flops + backward.flops, forward.bytes + backward.bytes)


def test_moe_work_by_hand():
    problem = MoE(tokens=3, dim=4, hidden=5, experts=8, top_k=2)
    forward = counters.moe(problem, "forward", 2)
    assert forward.flops == 2 * 3 * 2 * (10 * 4 + 4 * 5)
    # 6 slots reach at most 6 of 8 experts of 60 numbers; x, y 12 each; 6 weights; 6 ids of 8 bytes
    assert forward.bytes == 2 * (24 + 360 + 6) + 48
    backward = counters.moe(problem, "backward", 2)
    assert backward.flops == 2 * forward.flops
    assert backward.bytes == 2 * (36 + 360 + 480 + 12) + 48
    assert problem.work("both", 2) == counters.moe(problem, "both", 2)
    assert problem.work("both", 2).bytes == forward.bytes + backward.bytes


def test_counted_flops_are_those_of_the_profiled_products():
    from torch.utils.flop_counter import FlopCounterMode

    x, w_gate_up, w_down, idx, weights = SMALL_MOE.inputs(torch.float32, CPU)
    leaves = [t.requires_grad_() for t in (x, w_gate_up, w_down)]
    with FlopCounterMode(display=False) as counted:
        moe(*leaves, idx, weights).sum().backward()
    assert counted.get_total_flops() == SMALL_MOE.work("both", 4).flops
