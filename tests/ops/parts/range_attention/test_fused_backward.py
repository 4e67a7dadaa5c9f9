"""The backward in which the kernel of dk and dv also adds to dq: when it is used, and that it is correct."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.marks import compiled, interpreted
from vot_kernels import tuning
from vot_kernels.ops import launch as launching
from vot_kernels.ops.flash_attention import flash_attn_varlen_func
from vot_kernels.ops.hybrid_attention import hybrid_attention, reference
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.packed_attention.reference import packed_attention as packed_attention_reference
from vot_kernels.ops.parts.range_attention import triton as range_triton
from vot_kernels.ops.parts.range_attention.triton import (
    KeyRanges,
    fuses_backward,
    range_attention_backward,
    range_attention_forward,
)
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    PACKINGS,
    check_against_reference,
    make_qkv,
    make_tensor,
    max_error,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)

BETA = torch.tensor([0.5, -math.inf])


@pytest.fixture
def added(monkeypatch):
    """Of each launch for dk and dv so far, whether it adds to dq."""
    seen = []
    inner = launching.launch

    def launch(kernel, grid, config, arguments):
        if "dk_ptr" in arguments:
            seen.append(config.variant == "fused")
            assert (arguments["dq_ptr"] is not None) == bool(config.blocks.get("ADD_DQ", 0)) == seen[-1]
        inner(kernel, grid, config, arguments)

    monkeypatch.setattr(launching, "launch", launch)
    return seen


def check_packed(layout, inputs, *, roundings=4.0, **options):
    """out, lse and the gradients obey the tolerance rule."""

    def run(q, k, v):
        options_of_op = {"return_lse": True, "backend": "triton", "_variant": "fused"}
        return packed_attention(q, k, v, layout, **options_of_op, **options)

    def oracle(q, k, v):
        return packed_attention_reference(q, k, v, layout, **options)

    with uninitialized_is_nan():
        check_against_reference(run, oracle, inputs, roundings=roundings, names=["out", "lse"])


def check_hybrid(layout, inputs, **options):
    """The same with q, k, v, beta, q_features, k_features, of which the last three may be None."""

    def arguments(q, k, v, beta, q_features=None, k_features=None):
        features = {"q_features": q_features, "k_features": k_features}
        return (q, k, v, layout), {"beta": beta, **features, **options}

    def run(*tensors):
        given, named = arguments(*tensors)
        return hybrid_attention(*given, **named, return_lse=True, backend="triton", _variant="fused")

    def oracle(*tensors):
        given, named = arguments(*tensors)
        return reference.hybrid_attention(*given, **named)

    with uninitialized_is_nan():
        check_against_reference(run, oracle, inputs, roundings=16, names=["out", "lse"])


def gradients(layout, inputs, *, function=hybrid_attention, variant="fused", rows=None, **options):
    """out, lse and the gradients of the inputs, for fixed gradients of both that `rows` more rows would have too."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    options |= {"return_lse": True, "backend": "triton", "_variant": variant}
    with uninitialized_is_nan():
        out, lse = function(*leaves[:3], layout, **options)
        rows = len(out) if rows is None else rows
        grads = (
            make_tensor(rows, *out.shape[1:], seed=7, dtype=out.dtype),
            make_tensor(rows, lse.shape[1], seed=8),
        )
        grads = [x[: len(out)] for x in grads]
        return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, grads)]


@interpreted
@pytest.mark.parametrize(
    "name", sorted(PACKINGS.keys() - {"around_blocks"})
)  # the others have such lengths too
def test_packings(name, added):
    lengths = PACKINGS[name]
    check_packed(PackedLayout.from_lengths(lengths), make_qkv(sum(lengths), 1))
    assert added == ([True] if lengths else [])


@interpreted
def test_causal_grouped_heads_of_an_odd_size(added):
    layout = PackedLayout.from_lengths((18, 0, 5))
    check_packed(layout, make_qkv(23, 4, 24, kv_heads=2), causal=True)
    assert added == [True]


@interpreted
@pytest.mark.parametrize("causal", [None, "group", "token"])
@pytest.mark.parametrize("window", [0, (2, 0)])
def test_windows_and_far_groups(window, causal, added):
    layout = PackedLayout.from_lengths((3, 0, 19), group_size=6)
    check_hybrid(layout, [*make_qkv(22, 2, kv_heads=1), BETA], window=window, causal=causal)
    assert added == [True]


@interpreted
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_feature_maps(feature_map):
    layout = PackedLayout.from_lengths((3, 20), group_size=6)
    check_hybrid(layout, [*make_qkv(23, 1), None], window=0, feature_map=feature_map)


@interpreted
def test_given_features(added):
    layout = PackedLayout.from_lengths((3, 20), group_size=6)
    features = make_tensor(23, 2, 20, seed=8).abs(), make_tensor(23, 1, 20, seed=9).abs()
    check_hybrid(layout, [*make_qkv(23, 2, kv_heads=1), BETA, *features], window=0, causal="group")
    assert added == [True]


@interpreted
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales(scale):
    layout = PackedLayout.from_lengths((19, 6))
    check_packed(layout, make_qkv(25, 1), scale=scale)


@interpreted
@pytest.mark.parametrize("far", [False, True])
def test_half_precision(far, added):
    layout = PackedLayout.from_lengths((20, 3), group_size=6)
    inputs = make_qkv(23, 2, kv_heads=1, dtype=torch.float16)
    if far:
        check_hybrid(layout, [*inputs, BETA.half()], window=0)
    else:
        check_packed(layout, inputs, causal=True)
    assert added == [True]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_past_the_end_have_no_weight(dtype):
    """Scores of -100 for all keys: exp(0 - lse) is infinite, and 0 stands for the keys that a block lacks."""
    layout = PackedLayout.from_lengths((20,))
    q, k, v = make_qkv(20, 1, dtype=torch.float64)
    direction = torch.ones(16, dtype=torch.float64)
    q, k = 0.2 * q + 5 * direction, 0.2 * k - 5 * direction
    check_packed(layout, [x.to(dtype) for x in (q, k, v)], roundings=64)


@interpreted
def test_a_neighbours_nan_and_slack_do_not_leak(added):
    layout = PackedLayout.from_lengths((18, 3, 9), group_size=6)
    inputs = make_qkv(30, 1)
    poisoned = [with_slack(poison_segment(x, layout, 1), 20) for x in inputs]
    for function, options in ((packed_attention, {}), (hybrid_attention, {"window": 0})):
        clean = gradients(layout, inputs, function=function, rows=50, **options)
        dirty = gradients(layout, poisoned, function=function, rows=50, **options)
        for i, (x, y) in enumerate(zip(clean, dirty, strict=True)):
            assert torch.equal(x[:18], y[:18]) and torch.equal(x[21:], y[21:30])
            assert y[18:21].isnan().all()
            assert torch.equal(y[30:], torch.full_like(y[30:], -math.inf if i == 1 else 0))
    assert added == [True] * 4


@interpreted
@pytest.mark.parametrize("far", [False, True])
def test_gradients_of_slack_rows_are_ignored(far):
    layout = PackedLayout.from_lengths((17,), group_size=6)
    leaves = [with_slack(x, 5).requires_grad_() for x in make_qkv(17, 1)]
    window = {"window": 0} if far else {"window": None}
    with uninitialized_is_nan():
        out = hybrid_attention(*leaves, layout, backend="triton", _variant="fused", **window)
        grads = torch.autograd.grad(out, leaves, with_slack(make_tensor(17, 1, 16), 5))
    for x in grads:
        assert x[:17].isfinite().all() and torch.equal(x[17:], torch.zeros(5, 1, 16))


@interpreted
def test_rows_that_see_nothing_have_gradient_zero():
    """More rows than keys, causal and aligned at the end: the first rows see no key, and a segment has none."""
    cu_rows, cu_keys = (PackedLayout.from_lengths(n).cu_seqlens for n in ((40, 4, 3), (7, 0, 20)))
    ranges = KeyRanges.of_segments(cu_rows, cu_keys, None, 0)
    q, k, v = make_tensor(47, 2, 16), make_tensor(27, 1, 16, seed=1), make_tensor(27, 1, 16, seed=2)
    with uninitialized_is_nan():
        out, lse = range_attention_forward(q, k, v, ranges, 0.25)
        saved = make_tensor(47, 2, 16, seed=3), None, out, lse, q, k, v, ranges, 0.25
        found = range_attention_backward(*saved, variant="fused")
        wanted = range_attention_backward(*saved)
    for x, y in zip(found, wanted, strict=True):
        assert max_error(x, y) < 1e-5
    unseen = [*range(33), *range(40, 44)]
    assert torch.equal(found[0][unseen], torch.zeros(37, 2, 16))
    assert (found[0][33:40] != 0).any() and (found[0][44:] != 0).any()


@interpreted
def test_dk_and_dv_repeat_and_all_equals_the_pair(added):
    layout = PackedLayout.from_lengths((20, 3))
    inputs = make_qkv(23, 1)
    fused = gradients(layout, inputs, function=packed_attention, causal=True)
    again = gradients(layout, inputs, function=packed_attention, causal=True)
    pair = gradients(layout, inputs, function=packed_attention, causal=True, variant=None)
    assert added == [True, True, False]
    for x, y in zip(fused[3:], again[3:], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(fused, pair, strict=True):
        assert x.dtype == y.dtype and max_error(x, y) < 1e-5


@interpreted
@pytest.mark.parametrize("head_dim", [16, 24])
def test_adding_through_descriptors_gives_the_same(head_dim, monkeypatch):
    """The interpreter cannot reduce through a descriptor; what it lacks is given to it here."""
    from triton.runtime import interpreter

    reduced = []

    def reduce(self, kind, descriptor, value, indices):
        assert kind == interpreter._ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = descriptor.materialize_pointers(indices)
        zero = interpreter.TensorHandle(value.data * 0, value.dtype)
        before = self.create_masked_load(pointers, mask, zero, None, None, False)
        total = interpreter.TensorHandle(before.data + value.data, value.dtype)
        reduced.append(mask.sum())
        return self.create_masked_store(pointers, total, mask, None, None)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_descriptor_reduce", reduce, raising=False)
    layout = PackedLayout.from_lengths((18, 7, 0, 9))
    inputs = [poison_segment(x, layout, 1) for x in make_qkv(34, 2, head_dim, kv_heads=1)]
    pointers = gradients(layout, inputs, function=packed_attention)
    assert not reduced
    inner = range_triton._keys_config

    def through_descriptors(*arguments, **variants):
        config = inner(*arguments, **variants)
        return replace(config, blocks={**config.blocks, "USE_TMA": 1})

    monkeypatch.setattr(range_triton, "_keys_config", through_descriptors)
    for x, y in zip(pointers, gradients(layout, inputs, function=packed_attention), strict=True):
        assert x.isnan().equal(y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
    assert reduced and min(reduced) < 16 * head_dim  # blocks were cut off at the end of their rows


def op_arguments(far):
    layout = PackedLayout.from_lengths((5, 0, 1), group_size=3)
    tensors = [layout.cu_seqlens, layout.cu_groups, layout.segment_groups]
    tensors += [layout.host_cu_seqlens, layout.host_cu_groups, layout.host_segment_groups]
    qkv = [with_slack(x, 1, value=0.0) for x in make_qkv(6, 1)]
    window = (0, 0) if far else (None, None)
    options = (*window, None, "softmax", 0.5, False, "fused", "triton")
    return (*qkv, BETA[:1].clone() if far else None, None, None, *tensors, *options)


@interpreted
@pytest.mark.parametrize("far", [False, True])
def test_opcheck(far, added):
    arguments = op_arguments(far)
    out, lse = torch.ops.vot_kernels.hybrid_attention_fwd(*arguments)
    backward = torch.ops.vot_kernels.hybrid_attention_bwd.default
    given = (torch.ones_like(out), torch.ones_like(lse), out, lse, *arguments)
    torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))
    assert added and all(added)
    if far:
        return  # of the forward, which takes the choice along and no more, one check is enough
    leaves = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(torch.ops.vot_kernels.hybrid_attention_fwd.default, tuple(leaves))


@interpreted
def test_compiles(added):
    counter = CompileCounterWithBackend("aot_eager")

    def step(*inputs, **options):
        return packed_attention(*inputs, **options)

    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    layout = PackedLayout.from_lengths((5, 6, 1), group_size=4)
    inputs = make_qkv(12, 2, kv_heads=1)
    for variant, fused in (("fused", True), (None, False)):
        added.clear()
        found = gradients(layout, inputs, function=compiled_step, variant=variant)
        wanted = gradients(layout, inputs, function=packed_attention, variant=variant)
        assert added == [fused] * 2
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 2


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_asks_for_repeatable_bits_or_nothing(deterministic, monkeypatch):
    asked = []
    inner = range_triton.fuses_backward

    def ask(q, variant, deterministic, **options):
        asked.append((variant, deterministic))
        return inner(q, variant, deterministic, **options)

    monkeypatch.setattr(range_triton, "fuses_backward", ask)
    bounds = PackedLayout.from_lengths((5, 6)).cu_seqlens
    leaves = [x.requires_grad_() for x in make_qkv(11, 1)]
    options = {"deterministic": deterministic, "backend": "triton"}
    out = flash_attn_varlen_func(*leaves, bounds, bounds, 6, 6, **options)
    torch.autograd.grad(out.sum(), leaves)
    assert asked == [(None, deterministic)]


# The choice, which takes no interpreter.


def recorded(arch, op=packed_attention, variant="fused", dtype=torch.bfloat16, head_dim=64, **options):
    """The launches for dq and for dk and dv of a backward on `arch`, by name."""
    layout = PackedLayout.from_lengths((30, 20), group_size=8)
    leaves = [torch.empty(50, 2, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    options |= {"backend": "triton", "_variant": variant}
    with record_launches(arch) as launches:
        out = op(*leaves, layout, **options)
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    names = {"_range_attention_dq_kernel": "dq", "_range_attention_dkdv_kernel": "dkdv"}
    found = [(names[x.kernel.__name__], x) for x in launches if x.kernel.__name__ in names]
    assert len(found) == 2
    return dict(found)


def is_fused(launches):
    skips = launches["dq"].arguments.get("SKIP_NEAR", False)
    adds = bool(launches["dkdv"].arguments.get("ADD_DQ", 0))
    given = launches["dkdv"].arguments["dq_ptr"] is not None
    assert skips == adds == given
    return adds


ARCHS = tuning.known_archs("range_attention")


@compiled
@pytest.mark.parametrize("op", [packed_attention, hybrid_attention])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_gpu_has_it_for_every_dtype_and_size(arch, op):
    pytest.importorskip("triton")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 32, 64, 72, 80, 128, 256):
            launches = recorded(arch, op, dtype=dtype, head_dim=head_dim)
            assert is_fused(launches)
            dq, dkdv = launches["dq"], launches["dkdv"]
            assert dq.arguments["dq_ptr"] is dkdv.arguments["dq_ptr"]
            assert dq.arguments["dq_ptr"].dtype == torch.float32
            descriptors = int(arch[3:]) >= 90
            assert bool(dkdv.arguments.get("USE_TMA", 0)) == descriptors
            assert dkdv.config.limits.get("tma", False) == descriptors
            assert dq.config.limits["spill_bytes"] == 0
            few = dkdv.config.limits["spill_bytes"] <= 120 and "local_in_loops" not in dkdv.config.limits
            assert few, "what spills must be little and lie outside the loops"


@compiled
def test_heads_that_descriptors_do_not_take_keep_the_pair_where_others_use_them():
    pytest.importorskip("triton")
    for arch in ARCHS:
        assert is_fused(recorded(arch, head_dim=18)) == (int(arch[3:]) < 90)


@compiled
@pytest.mark.parametrize("op", [packed_attention, hybrid_attention])
@pytest.mark.parametrize("arch", ARCHS)
def test_ordinary_calls_take_it_where_it_takes_fewer_instructions(arch, op):
    """That is on sm_90 for narrow heads in 16 bits, as docs/gpu-static.md counts."""
    pytest.importorskip("triton")
    assert is_fused(recorded(arch, op, variant=None)) == (arch == "sm_90" and op is packed_attention)
    assert not is_fused(recorded(arch, op, variant=None, head_dim=128))
    assert not is_fused(recorded(arch, op, variant="plain"))


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Change the entries "bwd_dkdv" of sm_90 by a function."""
    caches = [x for x in vars(tuning).values() if hasattr(x, "cache_clear")]

    def change(function):
        shipped = tuning.tables("sm_90")["range_attention"]
        entries = json.loads(json.dumps(shipped["bwd_dkdv"]))
        for entry in entries:
            function(entry)
        shutil.copytree(tuning.CONFIGS / "sm_90", tmp_path / "sm_90")
        path = tmp_path / "sm_90" / "range_attention.json"
        path.write_text(json.dumps({**shipped, "bwd_dkdv": entries}))
        monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
        for cache in caches:
            cache.cache_clear()

    yield change
    for cache in caches:
        cache.cache_clear()


@compiled
def test_one_word_makes_it_the_default_of_a_gpu_and_head_dim(table):
    pytest.importorskip("triton")

    def switch_on(entry):
        when = entry["when"]
        if entry.get("variant") == "fused":
            entry["default"] = when["head_dim"] == 64 and when["bits"] == 16 and not when["far"]

    table(switch_on)
    assert is_fused(recorded("sm_90", variant=None))
    assert is_fused(recorded("sm_90", variant="fused"))
    assert not is_fused(recorded("sm_90", variant=None, head_dim=128))
    assert not is_fused(recorded("sm_90", variant=None, dtype=torch.float32))
    assert not is_fused(recorded("sm_90", hybrid_attention, variant=None, window=0))
    q = torch.empty(4, 1, 64, dtype=torch.bfloat16)
    with record_launches("sm_90"):
        assert fuses_backward(q) and not fuses_backward(q, deterministic=True)
    with uninitialized_is_nan():  # it switches deterministic algorithms on
        assert not is_fused(recorded("sm_90", variant=None))
        assert not is_fused(recorded("sm_90", hybrid_attention, variant=None, window=None))
        assert is_fused(recorded("sm_90", variant="fused"))


@compiled
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_other_backends_always_repeat(backend):
    layout = PackedLayout.from_lengths((9, 0, 4), group_size=4)
    for op in (packed_attention, hybrid_attention):
        found = []
        for variant in (None, "fused"):
            leaves = [x.requires_grad_() for x in make_qkv(13, 2, kv_heads=1)]
            out = op(*leaves, layout, backend=backend, _variant=variant)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for results in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], results, strict=True))


@compiled
@pytest.mark.parametrize("op", [packed_attention, hybrid_attention])
def test_an_unknown_variant_is_refused(op):
    layout = PackedLayout.from_lengths((4,))
    with pytest.raises(ValueError) as caught:
        op(*make_qkv(4), layout, _variant="fast")
    message = (
        "_variant must be one of None, 'plain', 'tma', 'warp_specialized', 'gluon', 'fused', got 'fast'."
    )
    assert str(caught.value) == message


@compiled
def test_whether_it_fuses_is_known_before_it_runs():
    variants = (None, "plain", "tma", "fused")
    with record_launches("sm_90"):
        for head_dim, far, by_default in ((64, False, True), (64, True, False), (128, False, False)):
            q = torch.empty(4, 1, head_dim, dtype=torch.bfloat16)
            found = [fuses_backward(q, variant, far=far) for variant in variants]
            assert found == [by_default, False, by_default, True]
            assert not fuses_backward(q, deterministic=True, far=far)
