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


# Each pair is compiled anew, which takes far longer than the test itself: every head_dim in bfloat16, which is what
# models use, and each other dtype once more beside 64.
SIZES = [(torch.bfloat16, d) for d in (16, 64, 72, 80, 96, 128, 256)] + [
    (torch.float32, 80),
    (torch.float16, 128),
]


@pytest.fixture(params=SIZES, ids=lambda size: f"{str(size[0]).removeprefix('torch.')}-{size[1]}")
def size(request: pytest.FixtureRequest) -> tuple[torch.dtype, int]:
    """dtype and head_dim."""
    return request.param


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
