"""The descriptor paths of the range attention forward: when they are taken, and that they change no bit."""

import json
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from tests.marks import compiled, interpreted
from vot_kernels import tuning
from vot_kernels.ops.hybrid_attention import triton as hybrid_triton
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.parts.attention import Options
from vot_kernels.ops.parts.range_attention import triton as triton_backend
from vot_kernels.ops.parts.range_attention.triton import (
    KeyRanges,
    _allocate_workspace,
    _launch_with_workspace,
    _takes_descriptors,
    prefer_tma,
    range_attention_forward,
)
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    make_qkv,
    make_tensor,
    poison_segment,
    uninitialized_is_nan,
    with_slack,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, on log 0 and NaN


def near(layout, window=None, causal=None):
    return Geometry.of(layout, window, causal).key_ranges()


def run(layout, q, k, v, window=None, causal=None):
    with uninitialized_is_nan():
        return range_attention_forward(q, k, v, near(layout, window, causal), q.shape[-1] ** -0.5)


def run_hybrid(layout, q, k, v, window, causal=None):
    """With a far part, wherever there are groups to be far from."""
    geometry, options = Geometry.of(layout, window, causal), Options(scale=q.shape[-1] ** -0.5)
    beta = torch.linspace(-1, 1, q.shape[1])
    with uninitialized_is_nan():
        return hybrid_triton.forward(Inputs(q, k, v, beta), geometry, options)


POINTERS, DESCRIPTORS, SPECIALIZED = "pointers", "descriptors", "warp-specialized descriptors"


def path(config):
    """How a forward of this config loads keys and values."""
    if not config.blocks.get("USE_TMA", 0):
        return POINTERS
    return SPECIALIZED if config.blocks.get("WARP_SPECIALIZE", 0) else DESCRIPTORS


@pytest.fixture
def uses(monkeypatch):
    """Of each forward kernel launched so far, how it loads."""
    seen = []
    inner = _launch_with_workspace

    def launch(kernel, grid, config, **arguments):
        seen.append(path(config))
        inner(kernel, grid, config, **arguments)

    monkeypatch.setattr(triton_backend, "_launch_with_workspace", launch)
    return seen


def every_way(uses, function, *arguments, far=False, **options):
    """The results by each path, once it is sure that they came about so; no far part is warp-specialized."""
    uses.clear()
    results = [function(*arguments, **options)]
    for warp_specialize in (True,) if far else (False, True):
        with prefer_tma(warp_specialize=warp_specialize):
            results.append(function(*arguments, **options))
    assert uses == ([POINTERS, DESCRIPTORS] if far else [POINTERS, DESCRIPTORS, SPECIALIZED])
    return results


def same_bits(results):
    for other in results[1:]:
        for name, x, y in zip(("out", "lse"), results[0], other, strict=True):
            assert x.isnan().equal(y.isnan()), name
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


@interpreted
@pytest.mark.parametrize("lengths", [(1,), (1, 0, 15, 16, 17), (3, 33, 2), (0, 0, 1, 0, 2, 0, 0)])
def test_packings(uses, lengths):
    layout = PackedLayout.from_lengths(lengths, group_size=7)
    same_bits(every_way(uses, run, layout, *make_qkv(sum(lengths), 1, 16)))


@interpreted
def test_no_rows_launch_nothing(uses):
    with prefer_tma(warp_specialize=True):
        out, lse = run(PackedLayout.from_lengths((0, 0)), *make_qkv(0, 1, 16))
    assert out.shape == (0, 1, 16) and lse.shape == (0, 1) and uses == []


@interpreted
@pytest.mark.parametrize("window, causal", [(0, "token"), ((2, 0), None), ((2, 0), "group")])
def test_windows(uses, window, causal):
    layout = PackedLayout.from_lengths((21,), group_size=6)
    same_bits(every_way(uses, run, layout, *make_qkv(21, 1, 16), window=window, causal=causal))


@interpreted
@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 64), (torch.float16, 16), (torch.float16, 128)])
def test_grouped_heads_of_other_sizes_and_dtypes(uses, dtype, head_dim):
    layout = PackedLayout.from_lengths((18,), group_size=4)
    same_bits(every_way(uses, run, layout, *make_qkv(18, 2, head_dim, kv_heads=1, dtype=dtype), window=2))


@interpreted
@pytest.mark.parametrize("window, causal", [((0, 1), None), (0, "token")])
def test_far_groups(uses, window, causal):
    layout = PackedLayout.from_lengths((3, 0, 15), group_size=5)
    inputs = make_qkv(18, 1, 16)
    results = every_way(uses, run_hybrid, layout, *inputs, far=True, window=window, causal=causal)
    same_bits(results)
    assert not torch.equal(results[1][0], run(layout, *inputs, window=window, causal=causal)[0])


@interpreted
@pytest.mark.parametrize("warp_specialize", [False, True])
def test_neither_a_neighbour_nor_slack_is_read(warp_specialize):
    """Not even times a weight of 0: that of NaN would be NaN."""
    layout = PackedLayout.from_lengths((18, 7, 20), group_size=6)
    inputs = make_qkv(45, 1, 16)
    poisoned = [with_slack(poison_segment(x, layout, 1), 20) for x in inputs]
    with prefer_tma(warp_specialize=warp_specialize):
        clean, dirty = run(layout, *inputs), run(layout, *poisoned)
    for x, y, nothing in zip(clean, dirty, (0, -torch.inf), strict=True):
        assert torch.equal(x[:18], y[:18]) and torch.equal(x[25:], y[25:45])
        assert y[18:25].isnan().all() and (y[45:] == nothing).all()


@interpreted
@pytest.mark.parametrize("lengths", [([3, 9], [5, 30]), ([20, 4, 0], [7, 0, 3]), ([5], [0])])
def test_rows_and_keys_of_different_lengths(uses, lengths):
    cu_rows, cu_keys = (PackedLayout.from_lengths(n).cu_seqlens for n in lengths)
    ranges = KeyRanges.of_segments(cu_rows, cu_keys, 4, 2)
    q = make_tensor(sum(lengths[0]), 2, 16)
    k, v = (make_tensor(sum(lengths[1]) + 1, 1, 16, seed=seed) for seed in (1, 2))
    same_bits(every_way(uses, range_attention_forward, q, k, v, ranges, 0.25))


@interpreted
def test_strides(uses):
    layout = PackedLayout.from_lengths((17,), group_size=7)
    inputs = make_tensor(17, 3, 2, 32).unbind(1)
    same_bits(every_way(uses, run, layout, *inputs, window=1))
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    same_bits(every_way(uses, run, layout, *inputs, window=1))


@interpreted
@pytest.mark.parametrize("make", [lambda n: make_qkv(n, 1, 24), lambda n: unaligned(n, 16)])
def test_inputs_that_fit_no_descriptor_take_pointers(uses, make):
    layout = PackedLayout.from_lengths((17, 2), group_size=7)
    inputs = make(19)
    for warp_specialize in (False, True):
        with prefer_tma(warp_specialize=warp_specialize):
            out, lse = run(layout, *inputs)
    assert uses == [POINTERS] * 2
    wanted = run(layout, *(x.clone(memory_format=torch.contiguous_format) for x in inputs))
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


@interpreted
@pytest.mark.parametrize("unfit", range(3))
def test_one_input_that_fits_no_descriptor_is_enough(uses, unfit):
    inputs = list(make_qkv(19, 1, 16))
    inputs[unfit] = unaligned(19, 16)[unfit]
    with prefer_tma():
        run(PackedLayout.from_lengths((17, 2)), *inputs)
    assert uses == [POINTERS]


def unaligned(rows, head_dim):
    """Views that begin one number late."""
    wide = make_tensor(3, rows, 1, head_dim + 1)
    return [x[..., 1:] for x in wide]


def tensor(rows=8, heads=2, head_dim=64, dtype=torch.bfloat16):
    return torch.empty(rows, heads, head_dim, dtype=dtype)


FITTING = {
    "contiguous": tensor(),
    "smallest": tensor(1, 1, 16),
    "float32": tensor(head_dim=256, dtype=torch.float32),
    "qkv in one tensor": torch.empty(8, 3, 2, 64, dtype=torch.float16)[:, 1],
    "heads first": tensor().transpose(0, 1),
    "16 bytes late": torch.empty(8, 2, 72, dtype=torch.float16)[..., 8:],
}
UNFIT = {
    "base": torch.empty(8, 2, 72, dtype=torch.float16)[..., 4:68],
    "row stride": torch.empty(8, 132, dtype=torch.float16)[:, :128].unflatten(1, (2, 64)),
    "head stride": torch.empty(8, 2, 68, dtype=torch.float16)[..., :64],
    "columns apart": tensor(head_dim=128)[..., ::2],
    "no power of two": tensor(head_dim=80),
    "narrow": tensor(head_dim=8),
    "one row for all": tensor(1).expand(8, 2, 64),
    "rows of 2**40 bytes": tensor(1).as_strided((1, 2, 64), (2**39, 64, 1)),
}


@pytest.mark.parametrize("x", FITTING.values(), ids=FITTING.keys())
def test_what_descriptors_take(x):
    for arch in ("sm_90", "sm_100", "sm_120", tuning.INTERPRETER):
        assert _takes_descriptors(arch, x, tensor())
    for arch in ("sm_75", "sm_80", "sm_86", "sm_89"):
        assert not _takes_descriptors(arch, x, tensor())


@pytest.mark.parametrize("x", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", tuning.INTERPRETER])
def test_what_descriptors_do_not_take(x, arch):
    assert not _takes_descriptors(arch, x, tensor())
    assert not _takes_descriptors(arch, tensor(), x)


def chosen(arch, head_dim=64, dtype=torch.bfloat16, offset=0):
    """The config of a forward on `arch`."""
    wide = torch.empty(3, 50, 2, head_dim + 8, dtype=dtype)[..., offset : offset + head_dim]
    with record_launches(arch) as launches:
        run(PackedLayout.from_lengths((30, 20)), *wide)
    return launches[-1].config


@compiled
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_shipped_entries_use_descriptors_where_preferred_and_possible(arch, head_dim):
    pytest.importorskip("triton")
    ordinary = chosen(arch, head_dim)
    assert path(ordinary) == POINTERS
    for warp_specialize, wanted in ((False, DESCRIPTORS), (True, SPECIALIZED)):
        with prefer_tma(warp_specialize=warp_specialize):
            preferred = chosen(arch, head_dim)
            assert path(preferred) == wanted and preferred.limits["tma"]
            assert preferred.limits.get("warp_specialized", False) == warp_specialize
            assert not preferred.limits["spill_bytes"]
            assert preferred.limits["registers"] <= ordinary.limits["registers"]
            assert chosen(arch, head_dim, offset=4) == ordinary
    assert chosen(arch, head_dim) == ordinary


@compiled
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_warp_specialization_is_for_what_has_an_entry_alone(arch):
    """Without one, as with float32 or a far part, the next best path is taken."""
    pytest.importorskip("triton")
    q, k, v = make_qkv(64, 1, 64, dtype=torch.bfloat16)
    layout = PackedLayout.from_lengths((64,), group_size=16)
    with prefer_tma(warp_specialize=True), record_launches(arch) as launches:
        run_hybrid(layout, q, k, v, window=0)
        run(layout, *(x.float() for x in (q, k, v)))
    forwards = [x.config for x in launches if x.kernel.__name__ == "_range_attention_fwd_kernel"]
    assert [path(config) for config in forwards] == [DESCRIPTORS, POINTERS]


@compiled
def test_older_gpus_never_use_descriptors():
    pytest.importorskip("triton")
    ordinary = chosen("sm_80")
    for warp_specialize in (False, True):
        with prefer_tma(warp_specialize=warp_specialize):
            assert chosen("sm_80") == ordinary and path(ordinary) == POINTERS
    for arch in (arch for arch in tuning.known_archs("range_attention") if int(arch[3:]) < 90):
        assert not any(
            entry["blocks"].get("USE_TMA", 0) for entry in tuning.tables(arch)["range_attention"]["fwd"]
        )


@compiled
@pytest.mark.parametrize("switched", [DESCRIPTORS, SPECIALIZED])
def test_an_entry_switches_descriptors_on(switched, monkeypatch, tmp_path):
    """As the module says: let an entry begin at `"tma": 1`, and ordinary calls use it where they can."""
    pytest.importorskip("triton")
    table = tuning.tables("sm_90")["range_attention"]
    entries = json.loads(json.dumps(table["fwd"]))
    for entry in entries:
        if path(SimpleNamespace(**entry)) == switched:
            entry["when"]["tma"] = [1, 3]
    (tmp_path / "sm_90").mkdir()
    (tmp_path / "sm_90" / "range_attention.json").write_text(json.dumps({**table, "fwd": entries}))
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    caches = [x for x in vars(tuning).values() if hasattr(x, "cache_clear")]
    try:
        for cache in caches:
            cache.cache_clear()
        assert path(chosen("sm_90")) == switched
        assert path(chosen("sm_90", offset=4)) == POINTERS
    finally:
        for cache in caches:
            cache.cache_clear()


@compiled
def test_the_workspace_is_there_on_every_thread_and_the_callers_allocator_stays(monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime._allocation import _allocator

    seen = []
    monkeypatch.setattr(triton_backend, "launch", lambda *_, **__: seen.append(_allocator.get()))
    before = _allocator.get()

    def own(size, alignment, stream):
        raise AssertionError("never asked")

    triton.set_allocator(own)
    try:
        _launch_with_workspace(None, (1,), None)
        thread = Thread(target=_launch_with_workspace, args=(None, (1,), None))
        thread.start()
        thread.join()
        assert seen == [_allocate_workspace] * 2
        assert _allocator.get() is own
    finally:
        triton.set_allocator(before)


@compiled
def test_preferring_ends_with_its_block():
    pytest.importorskip("triton")
    with pytest.raises(KeyError), prefer_tma():
        with prefer_tma(warp_specialize=True):
            assert path(chosen("sm_90")) == SPECIALIZED
        assert path(chosen("sm_90")) == DESCRIPTORS
        raise KeyError
    assert path(chosen("sm_90")) == POINTERS
