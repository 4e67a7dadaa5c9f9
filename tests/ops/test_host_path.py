"""What a small call costs on the host, counted: calls of functions, not time."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import vot_kernels
from tests.marks import cpp
from vot_kernels import PackedLayout, hybrid_attention, linear_attention, moe, pack_patches, packed_attention
from vot_kernels.testing import make_tensor

PACKAGE = str(Path(vot_kernels.__file__).parent)


def calls_of(function) -> Counter:
    """How often the package's own code calls each function, of Python or not, in one call that is not the first."""
    counts: Counter = Counter()

    def count(frame, event, argument):
        caller = frame if event == "c_call" else frame.f_back
        if (
            event in ("call", "c_call")
            and caller is not None
            and caller.f_code.co_filename.startswith(PACKAGE)
        ):
            counts[argument.__name__ if event == "c_call" else frame.f_code.co_name] += 1

    function()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts


Q, K, V = make_tensor(3, 16, 4, 32)
X, W_GATE_UP, W_DOWN = make_tensor(16, 32), make_tensor(4, 64, 32), make_tensor(4, 32, 32)
IMAGES = [make_tensor(3, 32, 32)]
CHOSEN, WEIGHTS = torch.arange(32).view(16, 2) % 4, torch.full((16, 2), 0.5)
GROUPED, PLAIN = PackedLayout.from_lengths([16], group_size=4), PackedLayout.from_lengths([16])
# A call that nothing records asks about ten things in order to pass by the dispatcher, which costs more.
CALLS = {
    "hybrid_attention": (lambda: hybrid_attention(Q, K, V, GROUPED, backend="cpp"), 200),
    "packed_attention": (lambda: packed_attention(Q, K, V, PLAIN, backend="cpp"), 175),
    "linear_attention": (lambda: linear_attention(Q, K, V, PLAIN, backend="cpp"), 100),
    "moe": (lambda: moe(X, W_GATE_UP, W_DOWN, CHOSEN, WEIGHTS, backend="cpp"), 115),
    "pack_patches": (lambda: pack_patches(IMAGES, 16, backend="cpp"), 64),
}


@cpp
@pytest.mark.parametrize("op", CALLS)
def test_a_small_call_makes_few_calls(op):
    call, most = CALLS[op]
    with torch.no_grad():
        counts = calls_of(call)
    assert counts.total() <= most, counts


@cpp
@pytest.mark.parametrize("op", ["hybrid_attention", "packed_attention", "linear_attention"])
def test_the_plan_of_a_known_layout_is_found_without_reading_it(op):
    with torch.no_grad():
        counts = calls_of(CALLS[op][0])
    assert not counts.keys() & {"tobytes", "numpy", "diff", "item", "tolist"}, counts


def test_the_count_sees_a_layout_that_is_new():
    layouts = [PackedLayout.from_lengths([9], group_size=n) for n in (3, 4)]
    with torch.no_grad():
        counts = calls_of(lambda: hybrid_attention(*make_tensor(3, 9, 1, 4), layouts.pop(), backend="torch"))
    assert counts["tobytes"] > 0
