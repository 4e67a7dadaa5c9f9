"""Fixtures of the tests on a GPU: one file per op, `OP` in each names it.

`VOT_GPU_TESTS_DEVICE=cpu` runs them on the CPU, to try the tests themselves where there is no GPU.
`VOT_GPU_TESTS_SHARD=2/6` runs the second of six parts.
"""

import os
import re

import pytest
import torch

from vot_kernels.ops.dispatch import describe_backends

DEVICE = os.environ.get("VOT_GPU_TESTS_DEVICE", "cuda")


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"VOT_GPU_TESTS_SHARD must be K/N with 1 <= K <= N, like 2/6, got {text!r}.")
    return int(match[1]), int(match[2])


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every N-th case, because neighbours take about equally long.

    Tests that differ only in the backend are one case: only one of them compiles, and those that need most of the
    GPU's memory do not run side by side. Every shard starts at another place in the list, because neighbours often
    share kernels, which then come from Triton's cache.
    """
    if "VOT_GPU_TESTS_SHARD" not in os.environ:
        return
    shard, count = _parse_shard(os.environ["VOT_GPU_TESTS_SHARD"])
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.replace("triton", "torch"), []).append(item)
    mine = list(cases.values())[shard - 1 :: count]
    first = len(mine) * (shard - 1) // count
    kept = [item for case in mine[first:] + mine[:first] for item in case]
    others = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in others])
    items[:] = kept


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


# Each pair is compiled separately, which takes far longer than the test itself, so we test every head_dim in bfloat16,
# which models use, and each other dtype once more with 64.
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
