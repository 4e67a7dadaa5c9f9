"""docs/tested-on.md says what the tests' marks say, and leaves no report out."""

import importlib

import listing
import pytest


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("list_reports")


def test_the_table_is_up_to_date(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert listing.written(page, script.MARK, script.lines()) == page, "run python docs/list_reports.py"


def test_every_report_has_a_test_or_a_reason(script):
    marked = set(script.tests())
    assert marked <= set(script.SYMPTOMS)
    assert set(script.SYMPTOMS) == marked | set(script.NOT_HERE)
    assert not marked & set(script.NOT_HERE)
