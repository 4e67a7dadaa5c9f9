"""Shared by all tests: no network, no display, repeatable random numbers, GPU tests skipped without a GPU."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from vot_kernels import testing

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Shared machines are slow at times; a failing example must come back on the next run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or "VOT_GPU_TESTS_DEVICE" in os.environ:  # see tests/gpu/conftest.py
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every run, but for VOT_TEST_SEED, from which `fixed_seed` exempts a test."""
    if "fixed_seed" in request.keywords:
        monkeypatch.setattr(testing, "SEED_SHIFT", 0)
    random.seed(testing.shifted(0))
    np.random.seed(testing.shifted(0))
    torch.manual_seed(testing.shifted(0))
