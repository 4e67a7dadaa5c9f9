"""How far a query goes from a public op to its kernel: each function that hands it on is one more to read."""

import sys
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import vot_kernels
from tests.marks import interpreted
from vot_kernels import PackedLayout
from vot_kernels.testing import make_qkv

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(vot_kernels.__file__).parent
MOST_FUNCTIONS, MOST_FILES = 14, 8  # as docs/architecture.md says
Walk = list[tuple[str, str]]


def walks(tensor: torch.Tensor, call: Any) -> list[Walk]:
    """For each function of the package that is called with `tensor`, those on the stack that hold it, the first first.

    Each is a file and the name of a function; a tuple or a dataclass of tensors holds the tensor, too.
    """
    found: list[Walk] = []
    place = tensor.data_ptr()

    def holds(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.data_ptr() == place
        if is_dataclass(type(value)):
            value = vars(value)
        parts = value.values() if isinstance(value, dict) else value
        return isinstance(value, dict | tuple | list) and any(map(holds, parts))

    def place_of(frame: FrameType) -> tuple[str, str] | None:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(PACKAGE) or not any(map(holds, frame.f_locals.values())):
            return None
        return str(file.relative_to(PACKAGE)), frame.f_code.co_name

    def profile(frame: FrameType | None, event: str, _: object) -> None:
        if event != "call" or place_of(frame) is None:
            return
        walk: Walk = []
        while frame is not None:
            walk.insert(0, place_of(frame))
            frame = frame.f_back
        found.append(list(filter(None, walk)))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreted), "cpp", "torch"])
def test_a_query_reaches_its_kernel_in_few_steps(backend):
    layout = PackedLayout.from_lengths([9, 7], group_size=4)
    q, k, v = make_qkv(16, 2, 16)

    def call() -> None:
        vot_kernels.hybrid_attention(q, k, v, layout, window=1, backend=backend)

    try:
        call()  # loads modules, builds the tables of the layout
    except ValueError as error:
        pytest.skip(str(error))
    found = walks(q, call)
    ways = [walk for walk in found if (f"ops/hybrid_attention/{backend}.py", "forward") in walk]
    assert ways and all(("ops/hybrid_attention/op.py", "hybrid_attention") in walk for walk in ways)
    longest = max(found, key=len)
    assert len(longest) <= MOST_FUNCTIONS and len(dict(longest)) <= MOST_FILES, longest
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert f"{MOST_FUNCTIONS} functions in {MOST_FILES} files" in text
