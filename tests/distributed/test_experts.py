"""Experts over 2 and 4 ranks: results and gradients are those of one process."""

import pytest

from tests.distributed.expert_cases import CASES
from tests.distributed.ranks import run_ranks
from vot_kernels.distributed import expert_slice


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    return run_ranks(CASES, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(outcomes, case):
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize(("experts", "ranks"), [(6, 4), (3, 4), (64, 8), (0, 2)])
def test_every_expert_has_one_rank(experts, ranks):
    slices = [expert_slice(experts, rank, ranks) for rank in range(ranks)]
    assert [i for own in slices for i in range(own.start, own.stop)] == list(range(experts))
    sizes = [own.stop - own.start for own in slices]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="rank from 0 to world_size - 1"):
        expert_slice(experts, ranks, ranks)
