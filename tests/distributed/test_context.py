"""`context_parallel`: a VotEncoder over 3 ranks gives what it gives in one process, with FSDP2 too."""

import pytest

from tests.distributed.context_cases import CASES
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(CASES, 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(outcomes, case):
    assert not outcomes[case], outcomes[case]
