"""Shared by all tests: no network, no display, repeatable random numbers, tests skipped where they cannot run."""

import importlib.util
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.marks import why_skipped

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Shared machines are slow at times; a failing example must come back on the next run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = {
        "interpreting": os.environ.get("TRITON_INTERPRET") == "1",
        "triton": importlib.util.find_spec("triton") is not None,
        "gpu": torch.cuda.is_available() or "VOT_GPU_TESTS_DEVICE" in os.environ,  # see tests/gpu/conftest.py
    }
    for item in items:
        if reason := why_skipped({mark.name for mark in item.iter_markers()}, **here):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
