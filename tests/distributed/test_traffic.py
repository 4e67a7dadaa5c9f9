"""What ranks receive is what the counters say, and the table of docs/scale.md is what they count."""

import importlib

import listing
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.traffic_cases import CASES
from vot_kernels.distributed import traffic

HOUR = traffic.Video(3600, 256, heads=16, kv_heads=16, head_dim=64)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(CASES, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_counted_bytes_are_those_of_the_collectives(outcomes, case):
    assert not outcomes[case], outcomes[case]


def test_by_hand():
    """Window 1 on 8 ranks: two frames of keys and values in bfloat16, and seven states of 64 x 65 float32 a head."""
    found = traffic.hybrid_attention(HOUR, 8, 3)
    assert found.forward == found.backward == 2 * 256 * 2 * 16 * 64 * 2 + 7 * 16 * 64 * 65 * 4
    assert traffic.exact_attention(HOUR, 8, 3).forward == 3600 * 256 * 7 // 8 * 2 * 16 * 64 * 2
    assert traffic.ring_attention(HOUR, 8).forward == traffic.exact_attention(HOUR, 8, 3).forward
    found = traffic.ulysses(HOUR, 8)
    assert found is not None and found.forward == 3600 * 256 // 8 * 4 * 16 * 64 * 2 * 7 // 8
    assert traffic.ulysses(HOUR, 32) is None


def test_the_length_of_the_video_plays_no_part():
    longer = traffic.Video(36000, 256, heads=16, kv_heads=16, head_dim=64)
    assert traffic.hybrid_attention(longer, 64, 20) == traffic.hybrid_attention(HOUR, 64, 20)
    assert traffic.ring_attention(longer, 64).forward > 9 * traffic.ring_attention(HOUR, 64).forward


def test_the_table():
    script = importlib.import_module("list_traffic")
    page = script.PAGE.read_text(encoding="utf-8")
    wrong = page.replace(" MB |", " TB |")
    assert wrong != page
    for other in (page, wrong):
        assert listing.written(other, script.MARK, script.lines()) == page, "run python docs/list_traffic.py"
