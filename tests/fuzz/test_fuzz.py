"""A few of the fuzzer's calls in every run of the tests; `make fuzz` makes ten thousand."""

import pytest

from tests.fuzz.__main__ import OTHERS, fuzz
from tests.fuzz.calls import MAKERS
from tests.fuzz.checks import is_a_sentence


@pytest.mark.parametrize("kind", [*MAKERS, *OTHERS])
def test_random_calls(kind):
    failures = [fuzz(seed=0, index=index, kinds=[kind]) for index in range(12)]
    assert not any(failures), "\n".join(filter(None, failures))


def test_a_failure_is_reported_with_what_reproduces_it(monkeypatch):
    monkeypatch.setattr("tests.fuzz.__main__.check", lambda call, draw: 1 / 0)
    assert "--seed 0 --index 3: moe: ZeroDivisionError" in (fuzz(seed=0, index=3, kinds=["moe"]) or "")


def test_what_is_internal_text_and_what_is_an_address():
    assert not is_a_sentence("expected scalar type Float but found c10::Half.")
    assert is_a_sentence("budget must be an int >= 0, got <object object at 0x7fa565c9fc10>.")
