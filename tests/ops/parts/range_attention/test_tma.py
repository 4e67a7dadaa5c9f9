"""The descriptor paths of the range attention forward: when they are used, and that they change no bit."""

import json
from threading import Thread

import pytest
import torch

from tests.marks import compiled, interpreted
from vot_kernels import tuning
from vot_kernels.ops import launch as launching
from vot_kernels.ops.hybrid_attention import triton as hybrid_triton
from vot_kernels.ops.hybrid_attention.geometry import Geometry, Inputs
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.parts.attention import Grads, Options
from vot_kernels.ops.parts.range_attention.triton import (
    KeyRanges,
    _loads_by_descriptors,
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


def near(layout, window=None, causal=None):
    return Geometry.of(layout, window, causal).key_ranges()


def run(layout, q, k, v, window=None, causal=None, variant=None):
    ranges, scale = near(layout, window, causal), q.shape[-1] ** -0.5
    with uninitialized_is_nan():
        return range_attention_forward(q, k, v, ranges, scale, variant=variant)


def run_hybrid(layout, q, k, v, window, causal=None, variant=None):
    """With a far part, wherever there are groups to be far from."""
    geometry = Geometry.of(layout, window, causal)
    options = Options(scale=q.shape[-1] ** -0.5, variant=variant)
    beta = torch.linspace(-1, 1, q.shape[1])
    with uninitialized_is_nan():
        return hybrid_triton.forward(Inputs(q, k, v, beta), geometry, options)


VARIANTS = ("tma", "warp_specialized")
WAYS = {None: (0, 0), "tma": (1, 0), "warp_specialized": (1, 1)}


def way(config):
    """The variant of a forward, once it is sure that its blocks say the same."""
    blocks = config.blocks.get("USE_TMA", 0), config.blocks.get("WARP_SPECIALIZE", 0)
    assert blocks == WAYS[config.variant]
    return config.variant


@pytest.fixture
def uses(monkeypatch):
    """The variant of each forward launched so far."""
    seen = []
    inner = launching.launch

    def launch(kernel, grid, config, arguments):
        if kernel.__name__ == "_range_attention_fwd_kernel":
            seen.append(way(config))
        inner(kernel, grid, config, arguments)

    monkeypatch.setattr(launching, "launch", launch)
    return seen


def every_way(uses, function, *arguments, far=False, **options):
    """Return the results of each variant after checking that it ran; no far part is warp-specialized."""
    uses.clear()
    variants = [None, "warp_specialized"] if far else [None, *VARIANTS]
    results = [function(*arguments, variant=variant, **options) for variant in variants]
    assert uses == ([None, "tma"] if far else variants)
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
    out, lse = run(PackedLayout.from_lengths((0, 0)), *make_qkv(0, 1, 16), variant="warp_specialized")
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_a_neighbour_nor_slack_is_read(variant):
    """Its rows are not even multiplied by 0, because the product with NaN would be NaN."""
    layout = PackedLayout.from_lengths((18, 7, 20), group_size=6)
    inputs = make_qkv(45, 1, 16)
    poisoned = [with_slack(poison_segment(x, layout, 1), 20) for x in inputs]
    clean, dirty = (run(layout, *x, variant=variant) for x in (inputs, poisoned))
    for x, y, nothing in zip(clean, dirty, (0, -torch.inf), strict=True):
        assert torch.equal(x[:18], y[:18]) and torch.equal(x[25:], y[25:45])
        assert y[18:25].isnan().all() and (y[45:] == nothing).all()


DQ = "_range_attention_dq_kernel"


def dq_of(layout, q, k, v, *, variant, window=None, causal=None):
    """The gradient of q with the pair of kernels, and the block sizes of the one that computes it."""
    far = window is not None
    geometry = Geometry.of(layout, window, causal)
    options = Options(scale=q.shape[-1] ** -0.5, deterministic=True, variant=variant)
    inputs, blocks, inner = Inputs(q, k, v, None), [], launching.launch

    def launch(kernel, grid, config, arguments):
        if kernel.__name__ == DQ:
            blocks.append(config.blocks)
        inner(kernel, grid, config, arguments)

    out, lse = hybrid_triton.forward(inputs, geometry, options)
    d_out = make_tensor(*out.shape, dtype=q.dtype, seed=7)
    with pytest.MonkeyPatch.context() as patch, uninitialized_is_nan():
        patch.setattr(launching, "launch", launch)
        found = hybrid_triton.backward((inputs, out, lse), Grads(d_out, None), geometry, options)
    assert len(blocks) == 1 and ("BLOCK_F" in blocks[0]) == far
    return found.q, blocks[0]


@interpreted
@pytest.mark.parametrize("window, causal", [(None, None), (None, "token"), ((0, 1), None), (0, "token")])
def test_dq_is_the_same_through_descriptors(window, causal):
    layout = PackedLayout.from_lengths((3, 0, 30), group_size=5)
    inputs = make_qkv(33, 2, 16, kv_heads=1)
    plain, without = dq_of(layout, *inputs, variant="plain", window=window, causal=causal)
    found, blocks = dq_of(layout, *inputs, variant="tma", window=window, causal=causal)
    assert torch.equal(found, plain) and found.isfinite().all() and found.any()
    assert blocks == without | {"USE_TMA": 1}


@interpreted
def test_dq_reads_no_neighbour_through_descriptors():
    layout = PackedLayout.from_lengths((18, 7, 20), group_size=6)
    inputs = make_qkv(45, 1, 16)
    poisoned = [poison_segment(x, layout, 1) for x in inputs]
    clean, dirty = (dq_of(layout, *x, variant="tma")[0] for x in (inputs, poisoned))
    assert torch.equal(clean[:18], dirty[:18]) and torch.equal(clean[25:], dirty[25:])


@interpreted
@pytest.mark.parametrize("unfit", range(1, 3))
def test_dq_of_keys_that_fit_no_descriptor_takes_pointers(unfit):
    layout = PackedLayout.from_lengths((17, 2), group_size=7)
    inputs = list(make_qkv(19, 1, 16))
    inputs[unfit] = unaligned(19, 16)[unfit]
    assert "USE_TMA" not in dq_of(layout, *inputs, variant="tma")[1]
    inputs = [unaligned(19, 16)[0], *make_qkv(19, 1, 16)[1:]]
    assert "USE_TMA" in dq_of(layout, *inputs, variant="tma")[1], "queries are not loaded so"


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
    for variant in VARIANTS:
        out, lse = run(layout, *inputs, variant=variant)
    assert uses == [None] * 2
    wanted = run(layout, *(x.clone(memory_format=torch.contiguous_format) for x in inputs))
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


@interpreted
@pytest.mark.parametrize("unfit", range(3))
def test_one_input_that_fits_no_descriptor_is_enough(uses, unfit):
    inputs = list(make_qkv(19, 1, 16))
    inputs[unfit] = unaligned(19, 16)[unfit]
    run(PackedLayout.from_lengths((17, 2)), *inputs, variant="tma")
    assert uses == [None]


def unaligned(rows, head_dim):
    """Return views that begin one element late."""
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
        assert _loads_by_descriptors(arch, x, tensor())
    for arch in ("sm_75", "sm_80", "sm_86", "sm_89"):
        assert not _loads_by_descriptors(arch, x, tensor())


@pytest.mark.parametrize("x", UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", tuning.INTERPRETER])
def test_what_descriptors_do_not_take(x, arch):
    assert not _loads_by_descriptors(arch, x, tensor())
    assert not _loads_by_descriptors(arch, tensor(), x)


def chosen(arch, variant=None, head_dim=64, dtype=torch.bfloat16, offset=0):
    """The config of a forward on `arch`."""
    wide = torch.empty(3, 50, 2, head_dim + 8, dtype=dtype)[..., offset : offset + head_dim]
    with record_launches(arch) as launches:
        run(PackedLayout.from_lengths((30, 20)), *wide, variant=variant)
    return launches[-1].config


@compiled
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_shipped_entries_use_descriptors_where_asked_for_and_possible(arch, head_dim):
    pytest.importorskip("triton")
    plain, ordinary = chosen(arch, "plain", head_dim), chosen(arch, None, head_dim)
    assert way(plain) is None and way(ordinary) == ("tma" if arch == "sm_90" else None)
    for variant in VARIANTS:
        found = chosen(arch, variant, head_dim)
        assert way(found) == variant and found.limits["tma"]
        assert found.limits.get("warp_specialized", False) == (variant == "warp_specialized")
        assert not found.limits["spill_bytes"]
        assert chosen(arch, variant, head_dim, offset=4) == plain


@compiled
def test_the_forward_in_gluon_is_for_hopper_and_what_has_an_entry():
    """It is never taken unasked, and where it cannot run the default is."""
    pytest.importorskip("triton")

    def kernel(arch, variant="gluon", **options):
        with record_launches(arch) as launches:
            head_dim, dtype = options.get("head_dim", 64), options.get("dtype", torch.bfloat16)
            wide = torch.empty(3, 50, 2, head_dim + 8, dtype=dtype)
            offset = options.get("offset", 0)
            run(PackedLayout.from_lengths((30, 20)), *wide[..., offset : offset + head_dim], variant=variant)
        return launches[-1].kernel.__name__

    gluon, triton = "_range_attention_gluon_fwd_kernel", "_range_attention_fwd_kernel"
    assert kernel("sm_90") == kernel("sm_90", head_dim=128) == kernel("sm_90", dtype=torch.float16) == gluon
    assert kernel("sm_90", None) == kernel("sm_90", "tma") == triton
    for arch in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert kernel(arch) == triton
    for options in ({"head_dim": 96}, {"dtype": torch.float32}, {"offset": 4}):
        assert kernel("sm_90", **options) == triton


@compiled
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_warp_specialization_is_for_what_has_an_entry_alone(arch):
    """Without one, as with float32 or a far part, the next best variant is taken."""
    pytest.importorskip("triton")
    q, k, v = make_qkv(64, 1, 64, dtype=torch.bfloat16)
    layout = PackedLayout.from_lengths((64,), group_size=16)
    with record_launches(arch) as launches:
        run_hybrid(layout, q, k, v, window=0, variant="warp_specialized")
        run(layout, *(x.float() for x in (q, k, v)), variant="warp_specialized")
    forwards = [x.config for x in launches if x.kernel.__name__ == "_range_attention_fwd_kernel"]
    assert [way(config) for config in forwards] == ["tma", None]


@compiled
def test_a_variant_of_the_backward_changes_no_forward():
    pytest.importorskip("triton")
    assert chosen("sm_90", "fused") == chosen("sm_90")


@compiled
def test_older_gpus_never_use_descriptors():
    pytest.importorskip("triton")
    ordinary = chosen("sm_80")
    assert way(ordinary) is None
    assert all(chosen("sm_80", variant) == ordinary for variant in VARIANTS)
    for arch in (arch for arch in tuning.known_archs("range_attention") if int(arch[3:]) < 90):
        assert not any(
            entry["blocks"].get("USE_TMA", 0)
            for kernel in ("fwd", "bwd_dq")
            for entry in tuning.tables(arch)["range_attention"][kernel]
        )


@compiled
@pytest.mark.parametrize("switched", VARIANTS)
def test_one_word_of_an_entry_switches_descriptors_on(switched, monkeypatch, tmp_path):
    """`"default": true`, and ordinary calls use the variant where they can."""
    pytest.importorskip("triton")
    table = tuning.tables("sm_90")["range_attention"]
    entries = json.loads(json.dumps(table["fwd"]))
    for entry in entries:
        if entry.get("variant") == switched:
            entry["default"] = True
    (tmp_path / "sm_90").mkdir()
    (tmp_path / "sm_90" / "range_attention.json").write_text(json.dumps({**table, "fwd": entries}))
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    caches = [x for x in vars(tuning).values() if hasattr(x, "cache_clear")]
    try:
        for cache in caches:
            cache.cache_clear()
        assert way(chosen("sm_90")) == switched
        assert way(chosen("sm_90", offset=4)) is None
    finally:
        for cache in caches:
            cache.cache_clear()


@compiled
def test_the_workspace_is_there_on_every_thread_and_the_callers_allocator_stays():
    triton = pytest.importorskip("triton")
    from triton.runtime._allocation import _allocator

    class Noted:
        """A kernel that notes the allocator of its launches."""

        seen = []

        def __getitem__(self, grid):
            return lambda **_: self.seen.append(_allocator.get())

    before = _allocator.get()

    def own(size, alignment, stream):
        raise AssertionError("never asked")

    def launch(blocks):
        launching.launch(Noted(), (1,), tuning.Config(blocks, 4, 1), {"x_ptr": torch.zeros(4)})

    triton.set_allocator(own)
    try:
        launch({"USE_TMA": 1})
        thread = Thread(target=launch, args=({"USE_TMA": 1},))
        thread.start()
        thread.join()
        launch({"USE_TMA": 0})
        assert Noted.seen == [launching._allocate_workspace] * 2 + [own]
        assert _allocator.get() is own
    finally:
        triton.set_allocator(before)
