"""Models of transformers over 2 ranks: transformers or torch spreads them, this package computes them."""

import pytest

from tests.distributed.models_cases import CASES
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(CASES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(outcomes, case):
    assert not outcomes[case], outcomes[case]
