"""Marks of tests that run Triton kernels without a GPU, and the rule for skipping tests.

Triton reads TRITON_INTERPRET once, when it is imported: a process has the kernels either on the interpreter or
compiled. `make test` is therefore two runs of pytest, and each skips the tests of the other kind.
"""

from collections.abc import Collection

import pytest

interpreted = pytest.mark.interpreter  # runs kernels on Triton's interpreter
compiled = pytest.mark.compiled  # needs kernels that can be compiled, or CPU tensors to be refused
cpp = pytest.mark.cpp  # runs the C++ kernels

# What computes on the CPU, apart from the reference: parameters of an op's tests.
COMPUTING = ("torch", pytest.param("cpp", marks=cpp))


def why_skipped(
    marks: Collection[str], *, interpreting: bool, triton: bool, gpu: bool, no_cpp: str | None
) -> str | None:
    """The reason in words, None for a test that can run.

    Args:
        marks: names of the test's marks.
        interpreting: TRITON_INTERPRET=1 is set.
        triton: it is installed.
        gpu: torch finds a CUDA device, or the tests for one run on another device.
        no_cpp: why the C++ kernels cannot run, None if they can.
    """
    if "gpu" in marks and not gpu:
        return "needs a CUDA device; torch finds none"
    if "interpreter" in marks and not interpreting:
        return "needs Triton's interpreter: TRITON_INTERPRET=1 python -m pytest -m interpreter PATH"
    if "interpreter" in marks and not triton:
        return "needs Triton, which is not installed"
    if "compiled" in marks and interpreting:
        return "needs Triton without its interpreter: unset TRITON_INTERPRET"
    if "cpp" in marks and no_cpp is not None:
        return f"needs the C++ kernels: {no_cpp}"
    return None
