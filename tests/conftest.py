"""Shared by all tests: no network, no display, repeatable random numbers, tests skipped where they cannot run."""

import gc
import importlib.util
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.interpreter import speed_up
from tests.marks import why_skipped
from tests.torchvision_operators import make_torchvision_importable
from vot_kernels import testing
from vot_kernels.cpp.library import library

gc.disable()  # until all is imported: see pytest_collection_finish
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
make_torchvision_importable()  # before transformers looks for it

# Workers share the cores, and so do the processes that their tests start, which are not workers themselves.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Tests start `make` as a shell would, not as a part of the `make test` they run in.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TESTS", "JOBS"):
    os.environ.pop(name, None)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Without a GPU, torch.manual_seed keeps a formatted traceback for each kind of GPU, more than most tests take.
seed_torch = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
if INTERPRETING and HAS_TRITON:
    speed_up()

# Shared machines are sometimes slow, and a failing example must come back on the next run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes with NumPy, which warns of log 0 and NaN."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run for the interpreter does not import files without a test for it; most import far more than Triton."""
    if not config.option.markexpr.startswith("interpreter") or collection_path.suffix != ".py":
        return None
    return "interpreted" not in collection_path.read_text() or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = {
        "interpreting": INTERPRETING,
        "triton": HAS_TRITON,
        "gpu": torch.cuda.is_available() or "VOT_GPU_TESTS_DEVICE" in os.environ,  # see tests/gpu/conftest.py
        "no_cpp": library().problem,
    }
    for item in items:
        if reason := why_skipped({mark.name for mark in item.iter_markers()}, **here):
            item.add_marker(pytest.mark.skip(reason=reason))
    # The longest files are not among these: what comes last must be short, or all workers wait for one.
    items.sort(key=lambda item: "tests/ops/" in item.nodeid)


def pytest_collection_finish() -> None:
    """What is imported by now lives as long as the process: searching it for garbage takes half a second each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the same random numbers in every run, shifted by VOT_TEST_SEED unless a test is marked `fixed_seed`."""
    if "fixed_seed" in request.keywords:
        monkeypatch.setattr(testing, "SEED_SHIFT", 0)
    random.seed(testing.shifted(0))
    np.random.seed(testing.shifted(0))
    seed_torch(testing.shifted(0))
