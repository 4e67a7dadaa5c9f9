"""What is skipped where."""

import pytest

from tests.marks import why_skipped

HERE = {"interpreting": False, "triton": True, "gpu": False}


@pytest.mark.parametrize(
    ("marks", "changed", "reason"),
    [
        ([], {}, None),
        (["slow"], {"triton": False}, None),
        (["gpu"], {}, "CUDA device"),
        (["gpu"], {"gpu": True}, None),
        (["interpreter"], {}, "TRITON_INTERPRET=1 python -m pytest -m interpreter"),
        (["interpreter"], {"interpreting": True}, None),
        (["interpreter"], {"interpreting": True, "triton": False}, "not installed"),
        (["interpreter", "gpu"], {"interpreting": True}, "CUDA device"),
        (["compiled"], {}, None),
        (["compiled"], {"interpreting": True}, "unset TRITON_INTERPRET"),
    ],
)
def test_reasons(marks, changed, reason):
    found = why_skipped(marks, **HERE | changed)
    assert found is None if reason is None else reason in found
