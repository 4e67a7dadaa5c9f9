"""How many kernels a call launches, and that the benchmark of the host's share says so."""

import pytest
import torch

from benchmarks import host
from tests.marks import compiled
from vot_kernels import PackedLayout, hybrid_attention
from vot_kernels.ops.launch import record_launches

pytest.importorskip("triton")


def names(launches):
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launches]


def run(layout, window=(2, 1), **options):
    """The kernels of a forward, and those of its backward."""
    q, k, v = (torch.empty(96, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with record_launches("sm_90") as launches:
        out = hybrid_attention(
            q, k, v, layout, window=window, beta=torch.zeros(2), backend="triton", **options
        )
        forward = names(launches)
        launches.clear()
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        return forward, names(launches)


@compiled
def test_hybrid_attention_launches_few_kernels():
    layout = PackedLayout.from_lengths((96,), group_size=8)
    states = ["group_states", "far_states"]
    forward, backward = run(layout)
    assert forward == [*states, "key_ranges", "range_attention_fwd"]
    half = [*states, "range_attention_dq", *states, "key_ranges", "range_attention_dkdv"]
    assert backward == half and len(forward) <= 4 and len(backward) <= 7
    # The ranges follow from the layout, so the next layer has them.
    forward, backward = run(layout)
    assert forward == [*states, "range_attention_fwd"]
    assert backward == [name for name in half if name != "key_ranges"]


@compiled
def test_ranges_are_computed_anew_for_another_window_size_or_content():
    layout = PackedLayout.from_lengths((96,), group_size=8)
    run(layout)
    assert "key_ranges" in run(layout, 3, causal="group")[0]
    assert "key_ranges" not in run(layout)[0]
    layout.cu_groups.copy_(layout.cu_groups.clone())  # PyTorch counts that it was written to
    assert "key_ranges" in run(layout)[0]
    assert "key_ranges" in run(PackedLayout.from_lengths((96,), group_size=8))[0]


@compiled
def test_the_benchmark_counts_launches_and_time(capsys):
    assert host.main(["--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    [hybrid] = [
        line for line in lines if line.startswith("hybrid_attention forward ") and "and" not in line[:30]
    ]
    assert hybrid.endswith("3 launches, 4 on a new layout") and " us, least " in hybrid
