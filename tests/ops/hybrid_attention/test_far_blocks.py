"""The blocks of far attention on the C++ kernels: what they cost, counted, and which keys they give a row."""

import numpy as np
import pytest

from vot_kernels.ops.hybrid_attention.far_blocks import plan_blocks
from vot_kernels.ops.hybrid_attention.geometry import Geometry
from vot_kernels.ops.parts.range_attention.cpp import RangeBounds
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import shifted

HEAD_DIM = 64


def plan(lengths, group_size, window, causal=None):
    geometry = Geometry.of(PackedLayout.from_lengths(lengths, group_size=group_size), window, causal)
    near = RangeBounds.of(geometry.key_ranges()).near
    return near, plan_blocks(geometry, HEAD_DIM, HEAD_DIM, 1)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("length", [16, 64, 150, 256, 1000, 5000])
def test_work_exceeds_that_of_exact_attention_by_little(length, group_size):
    """Products of all pairs, near or far, and of states; exact attention takes all pairs of a segment twice."""
    exact = 2 * HEAD_DIM * length**2
    for window in (0, 1, 4, 16, 256):
        near, blocks = plan([length], group_size, window)
        products = 2 * HEAD_DIM * int((near[1] - near[0]).sum()) + blocks.products
        assert products <= 1.5 * exact
        rows = blocks.states.shape[1] * HEAD_DIM  # of all states
        assert rows <= 4 * length + HEAD_DIM


def test_every_key_counts_once_as_near_or_far():
    numbers = np.random.default_rng(shifted(0))
    for _ in range(30):
        lengths = numbers.choice([0, 1, 9, 64, 130, 300], numbers.integers(1, 5))
        window, causal = int(numbers.integers(0, 9)), numbers.choice([None, "group", "token"])
        near, blocks = plan(lengths.tolist(), int(numbers.choice([1, 3, 8, 50])), window, causal)
        reach = near if blocks.reach is None else blocks.reach.numpy()
        assert (reach[0] <= near[0]).all() and (near[1] <= reach[1]).all()
        states, segments, slots = (x.numpy() for x in (blocks.states, blocks.segments, blocks.slots))
        before, after = (None if side is None else side.numpy() for side in blocks.sides)
        begins = np.append(0, np.cumsum(lengths))
        for begin, end in zip(begins[:-1], begins[1:], strict=True):
            for row in range(begin, end):
                seen = np.zeros(end - begin, int)
                seen[reach[0, row] - begin : reach[1, row] - begin] += 1
                if (slot := slots[row]) >= 0:
                    segment = np.searchsorted(segments, slot, "right") - 1
                    far = [*range(segments[segment], before[slot])] if before is not None else []
                    far += [*range(after[slot], segments[segment + 1])] if after is not None else []
                    for first, last in states[:, far].T:
                        seen[first - begin : last - begin] += 1
                own = end if causal is None else near[1, row]
                assert (seen[: own - begin] == 1).all() and (seen[own - begin :] == 0).all()


def test_what_a_segment_gets_depends_on_it_alone():
    _, alone = plan([300], 3, 4)
    _, packed = plan([64, 300, 7], 3, 4)
    assert (packed.reach.numpy()[:, 64:364] - 64 == alone.reach.numpy()).all()


def test_large_groups_have_states_of_their_own_and_no_pairs():
    _, blocks = plan([4096], 256, 1)
    assert blocks.reach is None and blocks.states.shape[1] == 16
