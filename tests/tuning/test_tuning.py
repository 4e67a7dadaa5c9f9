"""The config lookup, and that the shipped tables cover what dispatch accepts."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from vot_kernels import tuning
from vot_kernels.tuning import INTERPRETER, Config, known_archs, lookup, nearest_arch, tables


def clear():
    for function in (tuning._lookup, tuning._table, tuning.nearest_arch):
        function.cache_clear()


@pytest.fixture
def tables_of(tmp_path, monkeypatch):
    """Write `text` as the table of the family "scan" for each of some architectures, in place of the shipped ones."""

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


def variant_entry(block, variant, default, **when):
    return {"variant": variant, "default": default, "why": "as an example", **entry(block, **when)}


VARIANTS = json.dumps(
    {
        "sum": [
            variant_entry(1, "wide", False, bits=16),
            variant_entry(2, "deep", False, bits=[16, 32]),
            variant_entry(3, "quick", True, bits=64),
            entry(4),
        ]
    }
)


@pytest.mark.parametrize(
    ("bits", "options", "block", "variant"),
    [
        (16, {}, 4, None),
        (16, {"prefer": ("wide",)}, 1, "wide"),
        (16, {"prefer": ("deep", "wide")}, 2, "deep"),
        (32, {"prefer": ("wide", "deep")}, 2, "deep"),
        (32, {"prefer": ("wide",)}, 4, None),
        (16, {"prefer": ("unheard of",)}, 4, None),
        (64, {}, 3, "quick"),
        (64, {"prefer": ("wide",)}, 3, "quick"),
        (64, {"exclude": ("quick",)}, 4, None),
        (16, {"prefer": ("wide",), "exclude": ("wide",)}, 1, "wide"),
    ],
)
def test_variants_are_taken_by_default_or_by_name(tables_of, bits, options, block, variant):
    tables_of(VARIANTS, "sm_90")
    config = lookup("scan", "sum", "sm_90", bits=bits, **options)
    assert config.blocks == {"BLOCK": block} and config.variant == variant
    assert config is lookup("scan", "sum", "sm_90", bits=bits, **options)  # cached


@pytest.mark.parametrize(("kernel", "key"), [("sum", {"bits": 8}), ("sum", {}), ("product", {"bits": 16})])
def test_nothing_fits(tables_of, kernel, key):
    tables_of(TABLE, "sm_90")
    with pytest.raises(LookupError, match=rf"No config of scan/{kernel} for sm_90 fits .*sm_90/scan\.json\."):
        lookup("scan", kernel, "sm_90", **key)


@pytest.mark.parametrize(
    ("arch", "found"),
    [("sm_86", "sm_80"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("sm_75", "sm_80")],
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


@pytest.mark.parametrize(
    ("arch", "found"), [("sm_87", "sm_80"), ("sm_110", "sm_100"), ("sm_130", "sm_120"), ("sm_75", "sm_89")]
)
def test_a_gpu_takes_no_table_of_one_with_more_shared_memory(tables_of, arch, found):
    tables_of(TABLE, "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
    with pytest.warns(UserWarning, match=f"uses those of {found}"):
        assert nearest_arch("scan", arch) == found


@pytest.mark.parametrize(("arch", "found"), [("sm_86", "sm_89"), ("sm_121", "sm_120")])
def test_gpus_that_hardly_differ_share_a_table(tables_of, arch, found):
    tables_of(TABLE, "sm_80", "sm_89", "sm_100", "sm_120")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nearest_arch("scan", arch) == found


def test_smaller_configs_are_those_of_smaller_gpus_then_fewer_stages(tables_of):
    """Another size of the tile would not fit what the launcher has allocated; entries of other variants are others."""
    tables_of(json.dumps({"sum": [entry(8) | {"num_stages": 3}]}), "sm_90")
    tables_of(json.dumps({"sum": [entry(6, bits=32), variant_entry(5, "wide", True), entry(4)]}), "sm_80")
    tables_of(json.dumps({"sum": [{**entry(2), "blocks": {"BLOCK": 2, "TILE": 64}}]}), "sm_89")
    config = lookup("scan", "sum", "sm_90", bits=16)
    found = [(one.blocks["BLOCK"], one.num_stages) for one in tuning.smaller(config)]
    assert found == [(4, 2), (8, 2), (8, 1)]
    assert [one.num_stages for one in tuning.smaller(Config({"BLOCK": 1}, 4, 3))] == [2, 1]


def test_missing_and_broken_tables(tables_of):
    with pytest.raises(LookupError, match="scan has no configs in "):
        lookup("scan", "sum", "sm_90")
    with pytest.raises(LookupError, match=r"scan has no configs for interpreter: .*scan\.json is missing\."):
        lookup("scan", "sum", INTERPRETER)
    tables_of("{", "sm_90")
    with pytest.raises(LookupError, match=r"scan\.json is not valid JSON"):
        lookup("scan", "sum", "sm_90")


ARCHS = [*known_archs("linear_attention"), INTERPRETER]
NAMES_OF_AN_ENTRY = {"when", "blocks", "num_warps", "num_stages", "limits", "max_registers"}


def families():
    """The folders of device code that kernels are launched from."""
    folders = [path for path in (Path(__file__).parents[2] / "kernels" / "triton").iterdir() if path.is_dir()]
    return {path.name for path in folders if path.name not in ("common", "__pycache__")}


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tables_are_well_formed(arch):
    found = tables(arch)
    assert set(found) == families()
    for family, kernels in found.items():
        for kernel, entries in kernels.items():
            for one in entries:
                where = f"{arch}/{family}/{kernel}: {one}"
                assert set(one) <= {*NAMES_OF_AN_ENTRY, "variant", "default", "why"}, where
                assert isinstance(one.get("why", ""), str) and isinstance(one.get("variant", ""), str), where
                assert ("variant" in one) == ("default" in one), where
                assert one.get("default", True) in (True, False), where
                assert one.get("default", True) or "why" in one or arch == INTERPRETER, where
                assert one["num_warps"] in (1, 2, 4, 8, 16) and 1 <= one["num_stages"] <= 8, where
                sizes = [value for name, value in one["blocks"].items() if name.startswith(("BLOCK", "TILE"))]
                assert all(size > 0 and size & (size - 1) == 0 for size in sizes), where
                assert one.get("limits", {}).get("registers", 255) <= 255, where


def test_the_entries_of_hopper_say_how_much_work_is_done_twice():
    for kernel, entries in tables("sm_90")["range_attention"].items():
        for one in entries:
            usual = one.get("when", {}).get("bits") == 16 and one["when"].get("head_dim") in (64, 128)
            if usual and kernel != "bwd_start":
                assert 1 <= one["limits"]["tensor_work"] <= 1.25, f"{kernel}: {one}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_attention_is_covered(dtype, head_dim, arch):
    """Every call that dispatch accepts has a config for every kernel, and a tile is a whole number of blocks."""
    from vot_kernels.ops.launch import padded
    from vot_kernels.ops.parts.group_states.triton import dot_bits

    key = {"dot_bits": dot_bits(torch.empty(0, dtype=dtype)), "head_dim": padded(head_dim)}
    states = lookup("group_states", "group_states", arch, width=padded(head_dim), **key)
    configs = [states] + [
        lookup("linear_attention", kernel, arch, causal=causal, **key)
        for kernel in ("apply", "feature_grad")
        for causal in (0, 1)
    ]
    assert all(states.blocks["TILE"] % config.blocks["BLOCK_T"] == 0 for config in configs)
    for kernel in ("reduce_states", "scan_states", "far_states"):
        assert lookup("group_states", kernel, arch, dot_bits=key["dot_bits"]).blocks["BLOCK"] > 0
