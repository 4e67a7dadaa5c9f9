"""Which backend is chosen, and what is said of those that are not."""

from types import SimpleNamespace

import pytest
import torch

from tests.marks import cpp
from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.ops import launch as _launch
from vot_kernels.ops.dispatch import BACKENDS, describe_backends, load, select
from vot_kernels.ops.launch import why_not_triton

GPU = torch.device("cuda")
REFUSAL = "Tesla T4 has compute capability 7.5, Triton kernels need 8.0"


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts a GPU of some capability in place of those of this machine."""

    def put(name, major, minor):
        properties = SimpleNamespace(name=name, major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

    monkeypatch.setattr(_launch, "_HAS_TRITON", True)
    return put


def on_gpu(dtype=torch.float16):
    """What `select` looks at of a tensor."""
    return SimpleNamespace(device=GPU, dtype=dtype, ndim=3, shape=(8, 2, 64))


@pytest.mark.parametrize("name, major, minor", [("Tesla V100", 7, 0), ("Tesla T4", 7, 5), ("Tesla P4", 6, 1)])
def test_old_gpus_get_no_kernels(gpu, name, major, minor):
    gpu(name, major, minor)
    assert why_not_triton(GPU) == [f"{name} has compute capability {major}.{minor}, Triton kernels need 8.0"]
    assert select("hybrid_attention", "auto", on_gpu()) == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_others_do(gpu, capability):
    gpu("a GPU", *capability)
    assert why_not_triton(GPU) == []
    assert select("hybrid_attention", "auto", on_gpu()) == "triton"


def test_a_refusal_says_which_gpu_it_is(gpu):
    gpu("Tesla T4", 7, 5)
    with pytest.raises(ValueError, match=f"No backend can serve packed_attention .*{REFUSAL}"):
        select("packed_attention", "triton", on_gpu())
    assert describe_backends("cuda")["linear_attention"]["triton"] == [REFUSAL]


def test_a_gpu_that_is_not_there_is_not_called_old(monkeypatch):
    monkeypatch.setattr(_launch, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_triton(GPU) == []


@cpp
@pytest.mark.parametrize("op", ["aoe", "moe"])
def test_experts_of_any_width_run_in_cpp(op):
    assert {select(op, "auto", torch.zeros(8, width)) for width in (1, 256, 8192)} == {"cpp"}


def test_backends_stand_in_order_of_preference():
    assert all(tuple(reasons) == BACKENDS for reasons in describe_backends("cpu").values())
    cpu = torch.zeros(8, 2, 64)
    first = "torch" if why_not_cpp("cpu") else "cpp"
    assert select("hybrid_attention", "auto", cpu) == first
    assert select("hybrid_attention", "auto", cpu.double()) == "torch"
    assert select("hybrid_attention", "auto", torch.zeros(8, 2, 257)) == "torch"
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'triton', 'cpp', 'torch', 'reference'"
    ):
        select("hybrid_attention", "cuda", cpu)


def test_only_backends_are_loaded():
    assert load("aoe", "torch").__name__ == "vot_kernels.ops.aoe.torch"
    with pytest.raises(
        ValueError, match="backend must be one of 'triton', 'cpp', 'torch', 'reference', got 'op'"
    ):
        load("aoe", "op")
