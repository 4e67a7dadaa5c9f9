"""Fixtures of the tests on a GPU: one file per op, `OP` in each names it.

`VOT_GPU_TESTS_DEVICE=cpu` runs them on the CPU, to try the tests themselves where there is no GPU.
"""

import os

import pytest
import torch

from vot_kernels.ops.dispatch import describe_backends

DEVICE = os.environ.get("VOT_GPU_TESTS_DEVICE", "cuda")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend of the module's op that this device can serve."""
    reasons = describe_backends(device)[request.module.OP][request.param]
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
