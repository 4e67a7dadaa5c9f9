"""The config lookup, and that the shipped tables cover what dispatch accepts."""

import json
import warnings

import pytest
import torch

from vot_kernels import tuning
from vot_kernels.tuning import INTERPRETER, Config, known_archs, lookup, nearest_arch, tables


def clear():
    for function in (tuning._lookup, tuning._table, tuning.nearest_arch):
        function.cache_clear()


@pytest.fixture
def tables_of(tmp_path, monkeypatch):
    """Write `text` as the table of op "scan" for each of some architectures, in place of the shipped ones."""

    def write(text, *archs):
        for arch in archs:
            (tmp_path / arch).mkdir()
            (tmp_path / arch / "scan.json").write_text(text)

    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    clear()
    yield write
    clear()


def entry(block, **when):
    return {"when": when, "blocks": {"BLOCK": block}, "num_warps": 4, "num_stages": 2}


TABLE = json.dumps(
    {"sum": [entry(1, bits=16, head_dim=[16, 64]), entry(2, bits=[16, 32]), entry(3, bits=64)]}
)


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ({"bits": 16, "head_dim": 16}, 1),
        ({"bits": 16, "head_dim": 64}, 1),
        ({"bits": 16, "head_dim": 65}, 2),
        ({"bits": 32, "head_dim": 16}, 2),
        ({"bits": 16}, 2),
        ({"bits": 64, "head_dim": 16}, 3),
    ],
)
def test_the_first_entry_that_fits_wins(tables_of, key, block):
    tables_of(TABLE, "sm_90")
    config = lookup("scan", "sum", "sm_90", **key)
    assert config == Config({"BLOCK": block}, num_warps=4, num_stages=2)
    assert config.launch_options() == {"BLOCK": block, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(("kernel", "key"), [("sum", {"bits": 8}), ("sum", {}), ("product", {"bits": 16})])
def test_nothing_fits(tables_of, kernel, key):
    tables_of(TABLE, "sm_90")
    with pytest.raises(LookupError, match=rf"No config of scan/{kernel} for sm_90 fits .*sm_90/scan\.json\."):
        lookup("scan", kernel, "sm_90", **key)


@pytest.mark.parametrize(
    ("arch", "found"),
    [("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_100"), ("sm_75", "sm_80")],
)
def test_unknown_gpus_use_the_nearest_table_and_say_so_once(tables_of, arch, found):
    tables_of(TABLE, "sm_80", "sm_90", "sm_100")
    assert known_archs("scan") == ("sm_80", "sm_90", "sm_100")
    with pytest.warns(UserWarning, match=rf"no scan configs for {arch} and uses those of {found}.*Add"):
        assert nearest_arch("scan", arch) == found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup("scan", "sum", arch, bits=16).blocks == {"BLOCK": 2}
        assert nearest_arch("scan", "sm_90") == "sm_90"


def test_missing_and_broken_tables(tables_of):
    with pytest.raises(LookupError, match="scan has no configs in "):
        lookup("scan", "sum", "sm_90")
    with pytest.raises(LookupError, match=r"scan has no configs for interpreter: .*scan\.json is missing\."):
        lookup("scan", "sum", INTERPRETER)
    tables_of("{", "sm_90")
    with pytest.raises(LookupError, match=r"scan\.json is not valid JSON"):
        lookup("scan", "sum", "sm_90")


ARCHS = [*known_archs("linear_attention"), INTERPRETER]


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tables_are_well_formed(arch):
    found = tables(arch)
    assert "linear_attention" in found
    for op, kernels in found.items():
        for kernel, entries in kernels.items():
            for one in entries:
                where = f"{arch}/{op}/{kernel}: {one}"
                assert set(one) <= {"when", "blocks", "num_warps", "num_stages", "limits"}, where
                assert one["num_warps"] in (1, 2, 4, 8, 16) and 1 <= one["num_stages"] <= 8, where
                sizes = [value for name, value in one["blocks"].items() if name.startswith(("BLOCK", "TILE"))]
                assert all(size > 0 and size & (size - 1) == 0 for size in sizes), where
                assert one.get("limits", {}).get("registers", 255) <= 255, where


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_attention_is_covered(dtype, head_dim, arch):
    """Whatever dispatch accepts has a config for every kernel, and a tile is a whole number of blocks."""
    from vot_kernels.ops.launch import padded
    from vot_kernels.ops.parts.group_states.triton import DOT_BITS

    key = {"dot_bits": DOT_BITS[dtype], "head_dim": padded(head_dim)}
    states = lookup("linear_attention", "group_states", arch, width=padded(head_dim), **key)
    configs = [states] + [
        lookup("linear_attention", kernel, arch, causal=causal, **key)
        for kernel in ("linear_values", "linear_features")
        for causal in (0, 1)
    ]
    assert all(states.blocks["TILE"] % config.blocks["BLOCK_T"] == 0 for config in configs)
    for kernel in ("reduce_states", "scan_states"):
        assert lookup("linear_attention", kernel, arch, dot_bits=key["dot_bits"]).blocks["BLOCK"] > 0
