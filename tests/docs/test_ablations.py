"""The tables of ablations follow from the committed rows."""

import importlib
import json

import listing
import pytest

from vot_kernels.files import read_json_lines
from vot_kernels.pipelines.ablation.parts import PARTS


@pytest.fixture(scope="module")
def ablations():
    return importlib.import_module("list_ablations")


def test_the_tables_of_ablations(ablations):
    result, page = json.loads(ablations.RESULT.read_text()), ablations.PAGE.read_text()
    assert listing.written(page, ablations.MARK, ablations.lines(result)) == page, (
        "run python docs/list_ablations.py"
    )


def test_the_summary_follows_from_the_rows(ablations):
    """Every value is that of a run, and every variant that is summarised is one of a part."""
    rows = read_json_lines(ablations.RESULT.with_suffix(".rows.jsonl"))
    known = {(name, value) for row in rows for name, value in row["metrics"].items()}
    parts = {part.name: part for part in PARTS}
    for part in json.loads(ablations.RESULT.read_text())["parts"]:
        assert [v["name"] for v in part["variants"]] == [v.name for v in parts[part["name"]].variants]
        for variant in part["variants"]:
            for name, measured in variant["measures"].items():
                assert {(name, value) for value in measured["values"]} <= known
                assert len(measured["values"]) == part["seeds"]
