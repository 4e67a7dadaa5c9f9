"""Every attention provider is correct; those of absent packages run on stand-ins with the packages' signatures."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.core import DIRECTIONS, Provider, Workload
from benchmarks.problems.attention import Attention
from benchmarks.providers import (
    flash_attention,
    hybrid_peers,
    linear_peers,
    naive_attention,
    pytorch_attention,
)
from benchmarks.race import Rules, race
from benchmarks.verify import verify
from benchmarks.workloads import attention as workloads
from benchmarks.workloads import packings
from vot_kernels.ops.hybrid_attention import reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import ToleranceError

CPU = torch.device("cpu")
MODULES = (naive_attention, pytorch_attention, flash_attention, linear_peers, hybrid_peers)
PROVIDERS = {p.name: p for module in MODULES for p in module.PROVIDERS}
KINDS = {"softmax": "packed_attention", "linear": "linear_attention", "hybrid": "hybrid_attention"}
LENGTHS = (70, 33, 1, 96)


def problem(kind: str, **changes) -> Attention:
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": 16, "group_size": 16}
    return Attention(KINDS[kind], **{"lengths": LENGTHS} | sizes | changes)


def check(provider: Provider, problem: Attention, gradients: bool = True) -> None:
    verify(provider, provider.solves(problem), torch.float32, CPU, gradients)


HERE = [
    (suite, provider)
    for provider in PROVIDERS.values()
    for suite in provider.suites
    if provider.quick_size
    and provider.missing() is None
    and provider.refuses(provider.solves(problem(suite)), torch.float32, CPU, "both") is None
]
VARIANTS = {
    "ragged": {},
    "grouped heads": {"kv_heads": 2},
    "one segment": {"lengths": (128,), "window": (2, 1)},
    "causal": {"causal": True},
}


def test_what_a_cpu_can_run_is_there() -> None:
    assert {(suite, p.name) for suite, p in HERE} >= {
        *((suite, "naive") for suite in KINDS),
        ("softmax", "SDPA per segment"),
        ("softmax", "padded SDPA"),
        ("linear", "torch linear"),
        ("hybrid", "exact SDPA per segment"),
        ("hybrid", "SDPA + torch linear"),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("suite", "provider"), HERE, ids=[f"{s}-{p.name}" for s, p in HERE])
def test_output_and_gradients(suite: str, provider: Provider, variant: str) -> None:
    if suite == "hybrid" and variant == "causal":
        pytest.skip("the hybrid problem is bidirectional")
    given = problem(suite, **VARIANTS[variant])
    if (reason := provider.refuses(given, torch.float32, CPU, "both")) is not None:
        pytest.skip(reason)
    check(provider, given)


# --- stand-ins: the signatures of the packages, the mathematics of our reference ---


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output `[tokens, heads, d]` and lse `[heads, tokens]` of sequences with keys of their own."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    share, outs, lses = q.shape[1] // k.shape[1], [], []
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    for a, b, c, d in zip(*(x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril(), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_gradients(grad, q, k, v, out, lse, cu_q, cu_k) -> tuple[Tensor, Tensor, Tensor]:
    """The flash backward, with probabilities from the given lse, not from the scores' own."""
    scale, dq, dk, dv = q.shape[-1] ** -0.5, *(torch.zeros_like(x) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(*(x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
        key, value = (x[c:d].repeat_interleave(share, 1) for x in (k, v))
        p = (torch.einsum("qhd,khd->hqk", q[a:b], key) * scale - lse[:, a:b, None]).exp()
        delta = (grad[a:b] * out[a:b]).sum(-1).T[..., None]
        ds = scale * p * (torch.einsum("qhd,khd->hqk", grad[a:b], value) - delta)
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, key)
        dk[c:d] = torch.einsum("hqk,qhd->khd", ds, q[a:b]).unflatten(1, (-1, share)).sum(2)
        dv[c:d] = torch.einsum("hqk,qhd->khd", p, grad[a:b]).unflatten(1, (-1, share)).sum(2)
    return dq, dk, dv


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of that name, and its parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules or end == len(parts):
            module = ModuleType(path)
            module.__spec__, module.__path__ = ModuleSpec(path, None, is_package=True), []
            monkeypatch.setitem(sys.modules, path, module)
            if end > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, False)
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def flash_attn_2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8.3, flash_attn.flash_attn_varlen_func."""
    assert dropout_p == 0.0 and window_size == (-1, -1)
    assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
    out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_2_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    """flash-attn 2.8.3, flash_attn.flash_attn_interface._flash_attn_varlen_backward: writes dq, dk, dv."""
    assert (dropout_p, causal, softcap, alibi_slopes, deterministic) == (0.0, False, 0.0, None, False)
    assert (window_size_left, window_size_right) == (-1, -1) and softmax_scale == q.shape[-1] ** -0.5
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
    found = varlen_gradients(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
    for target, value in zip((dq, dk, dv), found, strict=True):
        target.copy_(value)


def flash_attn_3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """fa3-fwd 0.0.3, fa3_fwd_interface.flash_attn_varlen_func."""
    assert max_seqlen_q == max_seqlen_k == longest(cu_seqlens_q)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)[0]


def flash_attn_4_varlen(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """flash-attn-4 4.0.0b36, flash_attn.cute.flash_attn_varlen_func, which returns a pair even without `return_lse`."""
    assert qv is None and max_seqlen_q == max_seqlen_k == longest(cu_seqlens_q)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)[0], None


def varlen_attn_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """torch 2.11."""
    assert window_size in ((-1, -1), (-1, 0)) and max_q == max_k == longest(cu_seq_q)
    return varlen(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0))[0]


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.13, which takes grouped heads only with a flag."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_attn_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


def longest(bounds: Tensor) -> int:
    return int(bounds.diff().max())


SOFTMAX = {
    "flash-attn 2": ("flash_attn", {"flash_attn_varlen_func": flash_attn_2_varlen}),
    "flash-attn 3": ("fa3_fwd_interface", {"flash_attn_varlen_func": flash_attn_3_varlen}),
    "flash-attn 4": ("flash_attn.cute", {"flash_attn_varlen_func": flash_attn_4_varlen}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SOFTMAX)
def test_flash_attention(monkeypatch: pytest.MonkeyPatch, name: str, variant: str) -> None:
    module, members = SOFTMAX[name]
    install(monkeypatch, module, **members)
    check(PROVIDERS[name], problem("softmax", **VARIANTS[variant]), gradients=name != "flash-attn 3")
    if variant != "causal":
        exact = PROVIDERS[f"exact {name}"]
        assert exact.suites == ("hybrid",) and "exact softmax" in exact.instead
        check(exact, problem("hybrid", **VARIANTS[variant]), gradients=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", [varlen_attn_2_11, varlen_attn_2_13])
def test_varlen_attn(monkeypatch: pytest.MonkeyPatch, function, variant: str) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    check(PROVIDERS["varlen_attn"], problem("softmax", **VARIANTS[variant]))


@pytest.mark.parametrize("causal", [False, True])
def test_this_torch_accepts_the_call_of_varlen_attn(causal: bool) -> None:
    given = problem("softmax", causal=causal, kv_heads=2)
    inputs = [x.to("meta", torch.bfloat16) for x in given.inputs(torch.float32, CPU)]
    provider = PROVIDERS["varlen_attn"]
    out = provider.run(given, provider.prepare(given, torch.bfloat16, torch.device("meta")), *inputs)
    assert out.shape == inputs[0].shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_xformers(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """xformers 0.0.35."""

    class BlockDiagonalMask:
        def __init__(self, lengths: list[int], causal: bool = False) -> None:
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert isinstance(q_seqlen, list) and kv_seqlen is None and device == CPU
            return cls(q_seqlen)

        def make_causal(self):
            return BlockDiagonalMask(self.lengths, True)

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert query.shape == key.shape == value.shape and query.shape[0] == 1
        shape = query.shape
        bounds = torch.tensor([0, *attn_bias.lengths]).cumsum(0).int()
        flat = (x[0].reshape(shape[1], -1, shape[-1]) for x in (query, key, value))
        return varlen(*flat, bounds, bounds, attn_bias.causal)[0].reshape(shape)

    install(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    check(PROVIDERS["xformers"], problem("softmax", **VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("function", ["chunk", "fused"])
def test_flash_linear_attention(monkeypatch: pytest.MonkeyPatch, function: str, variant: str) -> None:
    """fla-core 0.6.0."""

    def linear_attn(
        q,
        k,
        v,
        scale=None,
        initial_state=None,
        output_final_state=False,
        normalize=True,
        cu_seqlens=None,
    ):
        assert q.ndim == 4 and q.shape == k.shape == v.shape and cu_seqlens.dtype == torch.int64
        weights = torch.einsum("qhd,khd->hqk", q[0], k[0]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        weights = (weights * (owner[:, None] == owner)).tril()
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-10)
        return torch.einsum("hqk,khd->qhd", weights, v[0])[None], None

    members = {"chunk_linear_attn": linear_attn, "fused_chunk_linear_attn": linear_attn}
    install(monkeypatch, "fla.ops.linear_attn", **members)
    provider = PROVIDERS[f"flash-linear-attention {function}"]
    assert provider.missing() is None
    check(provider, problem("linear", **VARIANTS[variant]))


HYBRID = [variant for variant in VARIANTS if variant != "causal"]


@pytest.mark.parametrize("variant", HYBRID)
def test_composite_on_flash_attn_2(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_2_varlen)
    backward = {"_flash_attn_varlen_backward": flash_attn_2_varlen_backward}
    install(monkeypatch, "flash_attn.flash_attn_interface", **backward)
    check(PROVIDERS["flash-attn 2 + torch linear"], problem("hybrid", **VARIANTS[variant]))


@pytest.mark.parametrize("variant", HYBRID)
def test_composite_on_the_flash_attention_of_pytorch(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    real = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward

    def meta(x: object) -> object:
        return x.to("meta") if isinstance(x, Tensor) else x

    def forward(*args, **options):
        q, k, v, cu_q, cu_k, max_q, max_k, *_ = args
        real[0](*map(meta, args), **options)  # this torch accepts the call
        assert (max_q, max_k) == (longest(cu_q), longest(cu_k))
        return *varlen(q, k, v, cu_q, cu_k), None, None, None

    def backward(*args):
        real[1](*map(meta, args))
        return varlen_gradients(*args[:8])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    check(PROVIDERS["FA2 of PyTorch + torch linear"], problem("hybrid", **VARIANTS[variant]))


SLA = '''
import torch


class SparseLinearAttention(torch.nn.Module):
    """Blocks chosen by the products of their means; the linear part goes through a projection."""

    def __init__(
        self, head_dim, topk, feature_map="softmax", BLKQ=64, BLKK=64, use_bf16=True, tie_feature_map_qk=True
    ):
        super().__init__()
        assert not use_bf16 and feature_map == "softmax"
        self.topk, self.block = topk, BLKQ
        self.proj_l = torch.nn.Linear(head_dim, head_dim)
        torch.nn.init.zeros_(self.proj_l.weight)
        torch.nn.init.zeros_(self.proj_l.bias)

    def forward(self, q, k, v, return_sparsity=False):
        length = q.shape[2]
        owner = torch.arange(length) // self.block
        blocks = int(owner[-1]) + 1
        mean = torch.eye(blocks)[:, owner] / owner.bincount()[:, None]
        score = (mean @ q) @ (mean @ (k - k.mean(2, keepdim=True))).transpose(2, 3)
        best = score.topk(min(blocks, int(self.topk * blocks)), -1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)[:, :, owner][..., owner]
        sparse = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~chosen, -torch.inf).softmax(-1) @ v
        q, k = q.softmax(-1), k.softmax(-1)
        linear = q @ (k.transpose(2, 3) @ v) / (1e-5 + q @ k.sum(2)[..., None])
        return sparse + self.proj_l(linear)
'''


BIDIRECTIONAL = """
import torch

def varlen_linear_attention(q, k, v, cu_seqlens, max_seqlen, scale=None, eps=1e-6):
    assert cu_seqlens.dtype == torch.int32 and q.shape == k.shape
    outs = []
    for a, b, c in zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)), strict=True):
        state, total = torch.einsum("thd,the->hde", b, c), b.sum(0)
        outs.append(torch.einsum("thd,hde->the", a, state) / (torch.einsum("thd,hd->th", a, total)[..., None] + eps))
    return torch.cat(outs)
"""


def test_flash_bidirectional_linear_attention(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    provider = PROVIDERS["flash-bidirectional-linear-attention"]
    monkeypatch.delenv("VOT_BENCH_BIDIRECTIONAL", raising=False)
    assert "VOT_BENCH_BIDIRECTIONAL" in provider.missing()
    monkeypatch.setenv("VOT_BENCH_BIDIRECTIONAL", str(tmp_path))
    assert "holds no" in provider.missing()
    folder = tmp_path / "flash_bla" / "ops" / "linear_attn"
    folder.mkdir(parents=True)
    (folder / "varlen.py").write_text(BIDIRECTIONAL)
    assert provider.missing() is None
    for name in list(sys.modules):
        if name.startswith("flash_bla"):
            monkeypatch.delitem(sys.modules, name)
    given = problem("linear", lengths=(20, 7, 33), heads=4, kv_heads=2, head_dim=16)
    verify(provider, given, torch.float32, CPU, gradients=True)
    assert "bidirectional" in provider.refuses(replace(given, causal=True), torch.bfloat16, CPU, "forward")
    assert "not empty" in provider.refuses(replace(given, lengths=(3, 0)), torch.bfloat16, CPU, "forward")


def test_sla(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    provider = PROVIDERS["SLA"]
    monkeypatch.delenv("VOT_BENCH_SLA", raising=False)
    assert "VOT_BENCH_SLA" in provider.missing()
    monkeypatch.setenv("VOT_BENCH_SLA", str(tmp_path))
    assert "holds no" in provider.missing()
    (tmp_path / "sparse_linear_attention").mkdir()
    (tmp_path / "sparse_linear_attention" / "core.py").write_text(SLA)
    monkeypatch.setattr(sys, "path", list(sys.path))
    hybrid_peers._sla_module.cache_clear()
    given = provider.solves(
        problem("hybrid", lengths=(1024, 256, 100), head_dim=64, group_size=64, window=(2, 1))
    )
    assert given.group_size == 256
    try:
        # All is float32, so that the 1e-5 in SLA's normaliser shows, which is neither a rounding nor an error.
        inputs = given.inputs(torch.float32, CPU)
        modules = provider.prepare(given, torch.float32, CPU)
        out = provider.run(given, modules, *inputs)
        torch.testing.assert_close(out, given.oracle(inputs, None), rtol=1e-5, atol=1e-5)
        rows = torch.tensor([0, 300, 1023, 1024, 1300, 1379])
        torch.testing.assert_close(given.oracle(inputs, rows), given.oracle(inputs, None)[rows])
        small = given.small()
        assert small.rows(inputs) is None and provider.prepare(small, torch.float32, CPU)[512].topk * 8 >= 2
    finally:
        hybrid_peers._sla_module.cache_clear()
        for name in [name for name in sys.modules if name.startswith("sparse_linear_attention")]:
            del sys.modules[name]


def test_sla_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = PROVIDERS["SLA"]

    def reason(**changes) -> str:
        sizes = {"lengths": (1024,), "head_dim": 64, "group_size": 64, "window": (2, 1)} | changes
        return provider.refuses(provider.solves(problem("hybrid", **sizes)), torch.bfloat16, CPU, "forward")

    assert "grouped" in reason(kv_heads=2)
    assert "head_dim" in reason(head_dim=16)
    assert "multiple" in reason(group_size=50)
    assert "whole number" in reason(lengths=(1000,))
    assert "told apart" in reason(lengths=(256 * 65,))
    assert "GPU" in reason()


# --- refusals and the race ---


def test_gpu_kernels_refuse_a_cpu_and_float32() -> None:
    for name in ("flash-attn 2", "flash-attn 4", "varlen_attn", "cuDNN SDPA per segment", "xformers"):
        assert "NVIDIA" in PROVIDERS[name].refuses(problem("softmax"), torch.bfloat16, CPU, "forward")
        cuda = torch.device("cuda")
        assert "float32" in PROVIDERS[name].refuses(problem("softmax"), torch.float32, cuda, "forward")
    refuses = PROVIDERS["flash-attn 3"].refuses
    assert "backward" in refuses(problem("softmax"), torch.bfloat16, CPU, "both")
    assert "float16" in refuses(problem("softmax"), torch.float16, CPU, "forward")


def test_quadratic_memory_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naive_attention, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(pytorch_attention, "available_memory", lambda: 8 << 30)
    huge, fine = (problem("hybrid", lengths=(n,), heads=8, kv_heads=8) for n in (16384, 1024))
    for name in ("naive", "torch.compile of naive per segment"):
        refuses = PROVIDERS[name].refuses
        assert "8 x 16,384 x 16,384 take 48.0 GiB" in refuses(huge, torch.float32, CPU, "forward")
        assert refuses(fine, torch.float32, CPU, "both") is None
        assert (
            refuses(huge, torch.float32, torch.device("cuda"), "forward") is None
        )  # it raises an error itself
    uneven = problem("softmax", lengths=(32768, *[16] * 99), heads=8, kv_heads=8, head_dim=64)
    refuses = PROVIDERS["padded SDPA"].refuses
    assert "padded from 34,352 to 3,276,800 tokens" in refuses(uneven, torch.float32, CPU, "forward")
    assert refuses(problem("softmax"), torch.float32, CPU, "both") is None


def test_a_wrong_provider_gets_no_figure() -> None:
    from dataclasses import replace

    naive = PROVIDERS["naive"]
    wrong = replace(naive, run=lambda *given: naive.run(*given) * 1.001)
    with pytest.raises(ToleranceError):
        check(wrong, problem("softmax"))


def test_the_race_shows_every_provider_of_the_suite() -> None:
    providers = [p for p in PROVIDERS.values() if "hybrid" in p.suites]
    workload = Workload("hybrid", "test", problem("hybrid"), torch.float32, "cpu")
    outcomes = race(workload, "both", providers, Rules(rounds=1, quick=True, input_sets=1))
    assert list(outcomes) == [p.name for p in providers]
    timed = {name for name, outcome in outcomes.items() if outcome.status == "timed"}
    assert timed >= {"naive", "SDPA + torch linear", "exact SDPA per segment"}
    assert all(outcome.reason for name, outcome in outcomes.items() if name not in timed)
    assert not [o for o in outcomes.values() if o.status in ("error", "mismatch")]


# --- workloads ---


@pytest.mark.parametrize("total", [4096, 8192, 65536])
def test_packings_fill_their_total(total: int) -> None:
    packed = {
        "uniform": packings.uniform(total, 13),
        "ragged": packings.ragged(total),
        "long": packings.long_among_short(total),
        "zipf": packings.zipf(total, total // 8),
        "images": packings.qwen_vl(total),
    }
    for lengths in packed.values():
        assert sum(lengths) == total and min(lengths) > 0 and len(lengths) > 1
    assert sorted(packed["long"])[-1] >= total // 2 > 2 * sorted(packed["long"])[-2]
    assert packed["zipf"] == packings.zipf(total, total // 8) != packings.zipf(total, total // 8, seed=1)


def test_ragged_is_the_design_table() -> None:
    k = 1024
    expected = [16 * k, 12 * k, 8 * k, 8 * k, 6 * k, 4 * k, 4 * k, 2 * k, 2 * k, k, k]
    assert list(packings.ragged(64 * k)) == expected
    with pytest.raises(ValueError, match="multiple of 64"):
        packings.ragged(100)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads(device: str) -> None:
    found = list(workloads.workloads(device))
    names = [(w.suite, w.name) for w in found]
    assert len(set(names)) == len(names) and {suite for suite, _ in names} == set(KINDS)
    for w in found:
        assert w.device == device and w.problem.kind == KINDS[w.suite]
        assert set(w.directions) <= set(DIRECTIONS)
        assert ("gqa" in w.name) == (w.problem.heads != w.problem.kv_heads)
        assert ("causal" in w.name) == w.problem.causal
        assert f"d{w.problem.head_dim}" in w.name
    assert all(set(w.quick) <= set(w.directions) for w in found)
    assert {w.suite for w in found if w.quick} == (set(KINDS) if device == "cpu" else set())


def test_first_cuda_workload_has_1024_near_tokens() -> None:
    first = next(iter(workloads.workloads("cuda")))
    inner = first.problem.near_pairs() / first.problem.size
    assert first.suite == "hybrid" and 1016 <= inner < 1024  # fewer at the two ends


def test_asymmetric_windows_agree_between_the_oracle_by_rows_and_the_reference() -> None:
    given = problem("hybrid", window=(2, 1))
    q, k, v, beta = given.inputs(torch.float64, CPU)
    rows = torch.arange(given.size)
    expected = reference.hybrid_attention(q, k, v, given.layout(), window=(2, 1), beta=beta)[0]
    torch.testing.assert_close(given.oracle((q, k, v, beta), rows), expected)
    groups = PackedLayout.from_lengths(given.lengths, 16)
    distance = groups.token_groups - groups.token_groups[:, None]
    same = groups.token_segments == groups.token_segments[:, None]
    assert given.near_pairs() == int((same & (distance >= -2) & (distance <= 1)).sum())
