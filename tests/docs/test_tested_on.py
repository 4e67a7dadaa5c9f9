"""docs/tested-on.md says what the tests' marks say, and leaves no report out."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "list_reports.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("list_reports", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.written(page) == page, "run python docs/list_reports.py"


def test_every_report_has_a_test_or_a_reason(script):
    marked = set(script.tests())
    assert marked <= set(script.SYMPTOMS)
    assert set(script.SYMPTOMS) == marked | set(script.NOT_HERE)
    assert not marked & set(script.NOT_HERE)
