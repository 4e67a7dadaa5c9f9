"""What `vot tune` keeps: where it lies, that a broken file changes nothing, and that it is read only if asked for."""

import json

import pytest
import torch

from vot_kernels import tuning
from vot_kernels.ops import launch
from vot_kernels.ops.launch import Kernel
from vot_kernels.tuning import lookup, tuned

GPU, ARCH = "NVIDIA H200 (made up)", "sm_90"
KEY = {"bits": 16, "states": 8}
ENTRY = {
    "variant": "own",
    "default": True,
    "when": {"bits": 16},
    "blocks": {"BLOCK": 4096},
    "num_warps": 8,
    "num_stages": 1,
}
TABLES = {"dense_residual": {"fwd": [ENTRY]}}


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """The file of the GPU; nothing stays in use after a test."""
    monkeypatch.setenv("VOT_TUNING_DIR", str(tmp_path))
    tuned.use_tuned_once.cache_clear()
    with tuning.using("sm_0", {}):
        yield tuned.path_for(GPU)


def test_a_file_belongs_to_a_gpu_a_triton_and_the_sources(path, tmp_path, monkeypatch):
    assert path.parent == tmp_path / "nvidia-h200-made-up"
    assert tuned.path_for("another") != path
    for name, other in (("_triton_version", "9.9"), ("_sources", "0" * 16)):
        with monkeypatch.context() as patch:
            patch.setattr(tuned, name, lambda other=other: other)
            assert other in tuned.path_for(GPU).name and tuned.path_for(GPU) != path


def test_what_is_written_is_used_before_the_shipped_configs(path):
    shipped = lookup("dense_residual", "fwd", ARCH, **KEY)
    assert not tuned.use_tuned(GPU, ARCH)
    tuned.write(path, TABLES)
    assert tuned.use_tuned(GPU, ARCH)
    found = lookup("dense_residual", "fwd", ARCH, **KEY)
    assert (found.blocks, found.variant) == ({"BLOCK": 4096}, "own")
    assert lookup("dense_residual", "fwd", ARCH, exclude=("own",), **KEY) == shipped
    assert lookup("dense_residual", "fwd", ARCH, prefer=("narrow",), **KEY).variant == "narrow"
    assert lookup("dense_residual", "fwd", "sm_80", **KEY) == lookup("dense_residual", "fwd", "sm_80", **KEY)
    assert lookup("dense_residual", "fwd", ARCH, bits=32, states=8) != found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not hold tables"),
        ('{"x": {"sum": {}}}', "does not hold tables"),
        ('{"x": {"sum": [1]}}', "does not hold tables"),
        ('{"x": {"sum": [{"blocks": {}}]}}', "does not hold tables"),
        (json.dumps({"x": {"sum": [ENTRY | {"blocks": {"BLOCK": "64"}}]}}), "does not hold tables"),
        (json.dumps({"x": {"sum": [ENTRY | {"num_warps": None}]}}), "does not hold tables"),
        (json.dumps({"x": {"sum": [ENTRY | {"max_registers": "96"}]}}), "does not hold tables"),
        (json.dumps({"x": {"sum": [ENTRY | {"when": {"bits": [16]}}]}}), "does not hold tables"),
    ],
)
def test_a_broken_file_is_named_and_the_shipped_configs_are_used(path, text, reason):
    before = lookup("dense_residual", "fwd", ARCH, **KEY)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert not tuned.use_tuned(GPU, ARCH)
    assert str(path) in str(caught[0].message)
    assert lookup("dense_residual", "fwd", ARCH, **KEY) == before and path.read_text() == text


@pytest.mark.parametrize("asked", [True, False])
def test_launches_use_it_only_if_asked(path, asked, monkeypatch):
    tuned.write(path, TABLES)
    monkeypatch.setattr(launch, "_TUNED", asked)
    monkeypatch.setattr(launch, "target_arch", lambda device: ARCH)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    kernel = Kernel("dense_residual", "fwd", "dense_residual.weighted_sum:_weighted_sum_kernel")
    assert (kernel.config(torch.device("cuda", 0), KEY).variant == "own") == asked
    assert kernel.config(torch.device("cpu"), KEY | {"bits": 32}).variant is None


def test_preferring_a_variant_obeys_what_a_call_excludes():
    with tuning.preferring("narrow"):
        assert lookup("dense_residual", "fwd", ARCH, **KEY).variant == "narrow"
        assert lookup("dense_residual", "fwd", ARCH, exclude=("narrow",), **KEY).variant is None
        assert lookup("dense_residual", "fwd", ARCH, prefer=("wide",), **KEY).variant == "wide"
    assert lookup("dense_residual", "fwd", ARCH, **KEY).variant is None


def test_candidates_are_few_and_begin_with_the_default():
    for arch in ("sm_80", "sm_90", "sm_100"):
        request = lookup("dense_residual", "fwd", arch, **KEY).request
        found = tuning.candidates(request)
        assert [entry.get("variant") for entry in found] == [None, "wide", "narrow"]
        assert tuning.candidates(request, most=2) == found[:2]
